"""Forward passes with the weights that the reference was made with."""

from typing import Any

import torch
from tests.parity.reference import ATOL, HALF_STORE_ATOL, Case, Seen, backbone_states, close, watch
from tests.parity.released import ReleasedBank
from torch import Tensor


def test_every_segment_and_the_memory_after_it_match_the_released_code(eval_case: Case) -> None:
    case, model, tensors = eval_case, eval_case.reference.model(), eval_case.tensors
    bank = case.bank(model)
    for index, record in enumerate(case.added):
        input_ids = case.segment(tensors, index)
        with torch.no_grad():
            seen = watch(model, bank, input_ids)
        check(case, tensors, record, seen, bank)
        alone, alone_logits = backbone_states(model, input_ids)
        compare(tensors, record, "backbone_hidden", alone)
        compare(tensors, record, "backbone_logits", alone_logits)
        bank.add(seen.kv)
        assert bank.fill == record["dstore_idx_after"], record["prefix"]
        if "evicted_after" in record:
            assert bank.evicted == record["evicted_after"], record["prefix"]
    check_store(case, tensors, bank)


def test_probes_read_the_memory_and_do_not_write_it(probed_case: Case) -> None:
    case, model, tensors = probed_case, probed_case.reference.model(), probed_case.tensors
    bank = case.bank(model)
    with torch.no_grad():
        for index in range(len(case.added)):
            bank.add(model.encode(case.segment(tensors, index)))
        for record in case.probes:
            seen = watch(model, bank, tensors[f"{record['prefix']}tokens"])
            check(case, tensors, record, seen, bank)
            assert bank.fill == record["dstore_idx_after"]
        bank.reset()
        again = model(case.segment(tensors, 0), memory=bank).logits
    close(again, tensors["after_reset.logits"], "after_reset.logits")
    close(again, tensors["seg0.logits"], "seg0.logits")


def check(case: Case, tensors: dict[str, Tensor], record: dict[str, Any], seen: Seen, bank: ReleasedBank) -> None:
    """Everything the reference recorded about one forward pass, before its segment is written."""
    compare(tensors, record, "logits", seen.logits, HALF_STORE_ATOL["logits"] if case.half_store else ATOL)
    compare(tensors, record, "side_hidden", torch.stack(seen.side_hidden))
    compare(tensors, record, "side_final", seen.side_final)
    compare(tensors, record, "cached_k", merge_heads(seen.kv.keys))
    compare(tensors, record, "cached_v", merge_heads(seen.kv.values))
    if f"{record['prefix']}chunk_ids" in tensors:
        compare(tensors, record, "query", merge_heads(seen.queries))
        check_chunks(tensors, record, seen, bank)


def merge_heads(value: Tensor) -> Tensor:
    """(B, H, T, D) -> (B, T, C), as the reference stores projections."""
    return value.transpose(1, 2).flatten(2)


def check_chunks(tensors: dict[str, Tensor], record: dict[str, Any], seen: Seen, bank: ReleasedBank) -> None:
    """The same chunks, scores, keys and values; a missing chunk is -1 in the reference.

    Chunks are compared as sets, because two of them may score alike to the last digit; scores are compared in order.
    """
    prefix = record["prefix"]
    theirs = tensors[f"{prefix}chunk_ids"].transpose(1, 2).long().cpu()
    theirs, their_order = torch.where(theirs < 0, -1, theirs + record.get("evicted_before", 0)).sort(
        dim=-1, stable=True
    )
    ours = seen.retrieved.chunks.cpu()
    ours, our_order = torch.where(ours < 0, -1, ours + bank.evicted).sort(dim=-1, stable=True)
    assert torch.equal(ours, theirs), f"{prefix}chunk_ids"
    compare(tensors, record, "chunk_scores", seen.retrieved.scores.transpose(1, 2))
    for name, found in (("retrieved_k", seen.retrieved.keys), ("retrieved_v", seen.retrieved.values)):
        if f"{prefix}{name}" in tensors:
            reordered = by_chunk(tensors[f"{prefix}{name}"], their_order)
            close(by_chunk(found, our_order), reordered, f"{prefix}{name}")


def by_chunk(tokens: Tensor, order: Tensor) -> Tensor:
    """(B, H, T, K, D) with its chunks in the order (B, H, T, R)."""
    chunks = tokens.unflatten(3, (order.shape[3], -1))
    return chunks.gather(3, order.to(tokens.device)[..., None, None].expand_as(chunks))


def check_store(case: Case, tensors: dict[str, Tensor], bank: ReleasedBank) -> None:
    """What is left in memory, oldest first, against the store's used slots."""
    stored = bank.storage[0, : bank.fill].transpose(0, 1)  # (H, chunks, 2, S, D)
    for name, ours in (("memory_keys", stored[:, :, 0]), ("memory_vals", stored[:, :, 1])):
        if name in tensors:
            theirs = tensors[name][:, : ours.shape[1]].float()
            assert not tensors[name][:, ours.shape[1] :].any()
            close(ours.float(), theirs, name, HALF_STORE_ATOL["memory_keys"] if case.half_store else ATOL)


def compare(tensors: dict[str, Tensor], record: dict[str, Any], name: str, ours: Tensor, atol: float = ATOL) -> None:
    """Compare with the reference's tensor of that name, where it kept one."""
    full = f"{record['prefix']}{name}"
    if full in tensors:
        close(ours, tensors[full], full, atol)
