"""What a forward pass says about what it read: chunks, scores and shares, led back to documents."""

import pytest
import torch
from tests.family_table import ids
from tests.generation.models import longmem

from longmem import LongMem, MemoryBank


def filled(model: LongMem) -> MemoryBank:
    bank = MemoryBank.for_model(model, rows=2, capacity_tokens=64)
    bank.add(model.encode(ids(2, 15, seed=3)), documents=["letter 0", "letter 1"])
    bank.end_document()
    return bank


@pytest.mark.parametrize("fusion", ["gate", "softmax"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "alibi_gpt"])
def test_shares_are_gate_times_attention_mass(name: str, fusion: str) -> None:
    model = longmem(name, fusion=fusion)
    bank = filled(model)
    with torch.no_grad():
        out = model(ids(), memory=bank, explain=True)
    found, family, side = out.reads[0].retrieved, model.backbone.family, model.sidenet
    attention = family.attention(side.layers[model.augmented_layer])
    probe, seen = family.probe(side.sources[model.augmented_layer], attention), {}
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(qkv=probe(module, args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        model(ids(), memory=bank)
    scaling, softcap = seen["qkv"].scaling, seen["qkv"].softcap
    scores = torch.einsum("bhtd,bhtkd->bhtk", out.reads[0].queries, found.keys) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    mass = scores.masked_fill(~found.mask, -torch.inf).softmax(-1).unflatten(-1, (-1, 2)).sum(-1)
    torch.testing.assert_close(out.explanation.shares, mass * out.share[..., None])
    torch.testing.assert_close(out.explanation.share, out.share)
    assert torch.equal(out.explanation.chunks, found.chunks)
    assert torch.equal(out.explanation.scores, found.scores)


def test_every_chunk_found_is_led_back_to_its_document_also_when_memory_is_written_meanwhile() -> None:
    model = longmem()
    bank = filled(model)
    out = model(ids(), memory=bank, explain=True)
    assert torch.equal(out.logits, model(ids(), memory=bank).logits)
    assert model(ids(), memory=bank).explanation is None
    for row in range(2):
        one = model(ids(1), memory=bank, memory_rows=torch.tensor([row]), explain=True).explanation
        for reading in [*out.explanation.over(row=row), *one.over()]:
            assert reading.origin == bank.provenance(row, reading.chunk)
            length = 1 if reading.chunk == 7 else 2
            where = (reading.origin.document, reading.origin.start_token, reading.origin.length)
            assert where == (f"letter {row}", 2 * reading.chunk, length)
    before = out.explanation.token(0)
    bank.reset()
    assert out.explanation.token(0) == before  # it outlives the memory
    empty = model(ids(), memory=bank, explain=True).explanation
    assert empty.token(4) == [] and (empty.shares == 0).all() and (empty.chunks == -1).all()
