"""Which layers are worth remembering: what ``longmem layers`` shows, and what ``auto`` takes.

By their effect: facts are told in one conversation and asked for in another, and text is read with its earlier part in
memory, while one layer, or a set of layers, reads memory without any training (one softmax over local and retrieved
tokens). What the whole context in the window is worth is measured too. Sets grow by the layer that adds most.

By their keys, which explains the effect: a model that has learned to copy from its context finds, from the current
token, the token that followed an earlier occurrence of it. Every head of every layer is asked for that token's key with
its position-free query, as memory is searched. What is not found cannot help; what is found need not.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from longmem.config import TrainingFreeConfig, positions, side_layout, usual_window
from longmem.data.facts import ToldFact, asked_ids, told_ids, told_session
from longmem.data.tokens import check_tokenizer, token_ids
from longmem.errors import BackboneError, ConfigError, DataError, not_a_multiple
from longmem.evaluation.results import Json, write_json
from longmem.memory import MemoryBank
from longmem.modeling.backbone import position_free_qkv
from longmem.modeling.baselines import TrainingFree
from longmem.modeling.families import Family
from longmem.progress import Progress, track
from longmem.types import AttentionKV

DISTANCES = (128, 256, 512, 1024)
MOST_PIECES = 4  # of a row, for distances shorter than it
MOST_LAYERS = 4  # of a set
SESSIONS, TOLD = 4, 8  # conversations, and facts that each tells
FACTS = "facts"  # the kind of cases that ask for facts
WINDOW = 512  # tokens of text, of which the second half is predicted


def measure_layers(
    model: PreTrainedModel,
    texts: Sequence[Tensor] = (),
    tokenizer: Any = None,
    *,
    stride: int | None = None,
    num_retrieved: int = 64,
    chunk_size: int = 4,
    seed: int = 0,
    quiet: bool = False,
) -> Json:
    """Measure what reading memory is worth at each layer, then at the best layer and the one that adds most, and so on.

    Args:
        model: any causal language model that ``Backbone`` takes, in its place and dtype.
        texts: token ids (n,) of documents; half of the last tokens is predicted, all before is in memory.
        tokenizer: for the facts; None measures text alone.
        stride: of the SideNet to be: only layers that it copies are tried; None tries all that can be remembered.

    Returns:
        JSON. ``alone``: the backbone without memory; ``context``: with all that was told before, as far as it has
        positions, in its window; ``single``: every layer by itself; ``sets``: the best set of each size, each one layer
        larger than the one before, while that adds something; ``best``: the layers of the largest, None where reading
        is worth nothing. Each has its ``layers``; ``nats``, the mean loss of the tokens of the values asked for
        (``facts``) and of the predicted ``text``; ``worth``, nats gained against ``alone`` on both together; and
        ``share``, that over the worth of ``context``.

    Raises:
        ConfigError: the SideNet would copy no layer that can be remembered.
    """
    texts = [ids for ids in texts if len(ids) > 2]  # a shorter one has nothing to remember before what is predicted
    candidates = _candidates(model, stride)
    work = _Work(model, candidates, {"num_retrieved": num_retrieved, "chunk_size": chunk_size})
    for ids in texts:
        seen = min(WINDOW, work.positions, len(ids) // 2)
        before, predicted = ids[: -seen - 1], ids[-seen - 1 :]
        work.cases.append(Case("text", predicted, torch.arange(seen // 2, seen), before, work.encode(before)))
    draw = random.Random(seed)
    for _ in range(SESSIONS if tokenizer is not None else 0):
        session = told_session(draw, TOLD)
        before = torch.tensor(told_ids(session, tokenizer))
        kv = work.encode(before)
        work.cases += [facts_case([fact], tokenizer, before, kv) for fact in session.facts]
    without, within = work.losses(()), work.losses((), in_context=True)
    most_worth = sum(without.values()) - sum(within.values())

    def effect(layers: tuple[int, ...], nats: dict[str, float]) -> Json:
        worth = sum(without.values()) - sum(nats.values())
        return {"layers": layers, "nats": nats, "worth": worth, "share": worth / most_worth if most_worth > 0 else 0.0}

    single, sets, best = list[Json](), list[Json](), effect((), without)
    total = len(candidates) * MOST_LAYERS - MOST_LAYERS * (MOST_LAYERS - 1) // 2
    with Progress("measuring layers", total, "sets", quiet=quiet) as progress:
        while len(best["layers"]) < min(MOST_LAYERS, len(candidates)):
            tried = []
            for layer in (layer for layer in candidates if layer not in best["layers"]):
                layers = tuple(sorted((*best["layers"], layer)))
                tried.append(effect(layers, work.losses(layers)))
                progress.advance(note=f"layers {', '.join(map(str, layers))}")
            single, larger = single or tried, max(tried, key=lambda effect: effect["worth"])
            if sets and larger["worth"] <= best["worth"]:
                break
            sets.append(larger)
            best = larger
        named = ", ".join(map(str, best["layers"]))
        progress.say(f"layers {named} give {best['share']:.0%} of what everything in the window gives, untrained")
    taken = best["layers"] if best["worth"] > 0 else None
    alone, context = effect((), without), effect((), within)
    return {"alone": alone, "context": context, "single": single, "sets": sets, "best": taken}


def best_layers(
    model: PreTrainedModel,
    texts: Sequence[Tensor],
    tokenizer: Any,
    *,
    kept: Path | None = None,
    device: torch.device | str | None = None,
    **settings: Any,
) -> tuple[int, ...] | None:
    """The layers whose memory is worth most on these texts; None, for the paper's layer, where none is worth anything.

    For ``from_backbone(..., memory_layers=lambda model: best_layers(model, texts, tokenizer))``.

    Args:
        model, texts, tokenizer, settings: of ``measure_layers``.
        kept: a file for what is measured; where it is there already it is read instead.
        device: where the backbone is measured, and stays; None leaves it where it is.
    """
    if kept is not None and kept.exists():
        found = json.loads(kept.read_text(encoding="utf-8"))
    else:
        if tokenizer is not None:
            check_tokenizer(tokenizer, model)
        if device is not None:
            torch.nn.Module.to(model, device)
        found = measure_layers(model, texts, tokenizer, **settings)
        if kept is not None:
            write_json(kept, found)
    return None if found["best"] is None else tuple(found["best"])


def _candidates(model: PreTrainedModel, stride: int | None) -> tuple[int, ...]:
    family = Family.of(model)
    known = family.memory_layers()
    found = known if stride is None else sorted({*side_layout(family.config, stride).sources} & {*known})
    if not found:
        some = ", ".join(map(str, known))
        raise ConfigError(f"stride ({stride}) copies no layer that can be remembered ({some}); try 1")
    return tuple(found)


@torch.no_grad()
def encode_text(model: TrainingFree, ids: Tensor, segment: int) -> AttentionKV:
    """What a text (t,) leaves in memory, (1, n*Hkv, t, D), read in segments of so many tokens."""
    parts = [model.encode(part[None].to(model.device)) for part in ids.split(segment)]
    return AttentionKV(torch.cat([p.keys for p in parts], dim=2), torch.cat([p.values for p in parts], dim=2))


def scored_loss(model: TrainingFree, ids: Tensor, scored: Tensor, memory: MemoryBank | None) -> Tensor:
    """Mean nats of the tokens after the places ``scored`` of a text (t,)."""
    ids, scored = ids.to(model.device), scored.to(model.device)
    found = model(ids[None, :-1], memory=memory, logits_to_keep=scored, use_cache=False)
    return functional.cross_entropy(found.logits[0].float(), ids[scored + 1])


class Case(NamedTuple):
    """Predict ``ids[p + 1]`` for every p of ``scored``, with in memory what was read before."""

    kind: str
    ids: Tensor
    scored: Tensor
    before: Tensor
    kv: AttentionKV  # of ``before``, or of a longer text that begins with it, (1, n*Hkv, T, D)


def facts_case(facts: Sequence[ToldFact], tokenizer: Any, before: Tensor, kv: AttentionKV) -> Case:
    """A conversation that asks for facts of an earlier one, ``before``; scored are the tokens of their values."""
    asked = asked_ids(facts, tokenizer)
    scored = torch.tensor([at - 1 for first, end in asked.values for at in range(first, end)])
    return Case(FACTS, torch.tensor(asked.ids), scored, before, kv)


class _Work:
    """The backbone, read at any set of the candidate layers."""

    def __init__(self, model: PreTrainedModel, candidates: tuple[int, ...], settings: dict[str, Any]) -> None:
        self.model, self.candidates = model, candidates
        self.settings: dict[str, Any] = {"fusion": "softmax", "gate": 0.5, **settings}
        self.positions = positions(model.config) or 1 << 20
        self.cases: list[Case] = []
        self.all = self._reader(candidates)
        try:
            self.all.encode(torch.zeros(1, 1, dtype=torch.long, device=self.all.device))
        except BackboneError:  # the family does not give its local scores: memory gets a share of every head
            self.settings |= {"fusion": "gate", "gate": 0.1}
            self.all = self._reader(candidates)

    def encode(self, before: Tensor) -> AttentionKV:
        """What a text leaves in memory at every candidate layer."""
        return encode_text(self.all, before, usual_window(self.model.config))

    @torch.no_grad()
    def losses(self, layers: tuple[int, ...], *, in_context: bool = False) -> dict[str, float]:
        """Mean nats of every kind of case, reading at these layers; ``in_context``: with what was before in the window,
        what memory could be worth at most."""
        reader = self._reader(layers) if layers else None
        losses: dict[str, list[float]] = {}
        for case in self.cases:
            ids = torch.cat([case.before, case.ids])[-self.positions - 1 :] if in_context else case.ids
            bank = None if reader is None else self._bank(reader, case.kv)
            loss = scored_loss(reader or self.all, ids, case.scored + len(ids) - len(case.ids), bank)
            losses.setdefault(case.kind, []).append(float(loss))
        return {kind: sum(some) / len(some) for kind, some in losses.items()}

    def _bank(self, reader: TrainingFree, kv: AttentionKV) -> MemoryBank:
        size, own = reader.config.chunk_size, reader.memory_heads
        bank = MemoryBank.for_model(reader, rows=1, capacity_tokens=-(-kv.keys.shape[2] // size) * size)
        places = [self.candidates.index(layer) for layer in reader.memory_layers]
        heads = [head for place in places for head in range(place * own, (place + 1) * own)]
        bank.add(AttentionKV(kv.keys[:, heads], kv.values[:, heads]))
        return bank

    def _reader(self, layers: tuple[int, ...]) -> TrainingFree:
        config = TrainingFreeConfig(memory_layers=layers, **self.settings)
        known = None if layers == self.candidates else self.all.fingerprint  # hashing all weights takes seconds
        return TrainingFree(config, self.model, fingerprint=known)


@torch.no_grad()
def explain_layers(
    model: Any,
    text: Tensor,
    *,
    distances: Sequence[int] = DISTANCES,
    rows: int = 4,
    chunk_size: int = 4,
    num_retrieved: int = 64,
    seed: int = 0,
) -> Json:
    """Rank the keys of every layer and head of a causal language model.

    Args:
        text: (rows, n) token ids, n at least the smallest distance; random tokens are ranked beside it.
        distances: tokens between the two occurrences.
        rows: of random tokens.

    Returns:
        ``scores`` of each layer, 0 is chance and 1 is best. ``ranks``: for each source and distance, by layer and head,
        the median ``rank`` of the right key and the share of queries that find the right chunk (``recall``; ``chance``
        is a blind head's). ``copying``: nats per token on the first and the second pass of the same tokens within one
        window.

    Raises:
        ConfigError: a query could retrieve everything there is, or a part of a chunk.
        BackboneError: a model that cannot be remembered.
    """
    if min(distances) <= num_retrieved:
        raise ConfigError(
            f"distances ({', '.join(map(str, distances))}) must all exceed num_retrieved ({num_retrieved}): a query "
            "may not retrieve everything there is"
        )
    if problems := not_a_multiple("num_retrieved", num_retrieved, "chunk_size", chunk_size):
        raise ConfigError(problems)
    config, segment = Family.of(model).config, usual_window(model.config)
    special = [token for token in (model.config.bos_token_id, model.config.eos_token_id) if isinstance(token, int)]
    drawn = random_tokens(config.vocab_size, rows, max(distances), seed=seed, special=special)
    sources = {"text": text, "random": drawn}
    jobs = [(source, d) for source, t in sources.items() for d in sorted(set(distances)) if d <= t.shape[1]]
    scores: dict[int, list[float]] = {}
    ranks, copying, chunks = [], [], num_retrieved // chunk_size
    for source, distance in track(jobs, "ranking keys", len(jobs), "distances"):
        count = min(MOST_PIECES, sources[source].shape[1] // distance)
        pieces = sources[source][:, : count * distance].reshape(-1, distance).to(model.device)
        length = distance - distance % min(segment, distance)  # of whole segments
        heads = rank_keys(model, pieces[:, :length], segment=segment, chunk_size=chunk_size, num_chunks=chunks)
        for layer, (rank, _) in heads.items():
            scores.setdefault(layer, []).append(findability(rank, length))
        ranks.append(
            {
                "source": source,
                "distance": length,
                "chance": min(1.0, chunks / max(1, length // chunk_size)),
                "rank": {layer: rank.tolist() for layer, (rank, _) in heads.items()},
                "recall": {layer: recall.tolist() for layer, (_, recall) in heads.items()},
            }
        )
        if 2 * distance <= segment:
            first, second = copy_loss(model, pieces)
            copying.append({"source": source, "distance": distance, "first_loss": first, "second_loss": second})
    means = {layer: sum(some) / len(some) for layer, some in scores.items()}
    return {"scores": means, "ranks": ranks, "copying": copying}


def findability(rank: Tensor, keys: int) -> float:
    """How far the best quarter of the heads gets from a blind median rank, half of the keys (0), to the first (1), on a
    log scale.

    A quarter, because memory has a gate for every head: a few that find the right key are enough.
    """
    best = rank.topk(max(1, len(rank) // 4), largest=False).values
    return 1 - best.log().mean().item() / math.log(keys / 2)


@torch.no_grad()
def copy_loss(model: Any, token_ids: Tensor) -> tuple[float, float]:
    """Mean loss, in nats, of the first and the second pass of text (B, n) that is read twice in one window.

    Both passes are scored on the same n-1 targets; the first token has no context in the first pass.
    """
    length = token_ids.shape[1]
    logits = model(torch.cat([token_ids, token_ids], dim=1), use_cache=False).logits[:, :-1]
    targets = torch.cat([token_ids[:, 1:], token_ids], dim=1)
    losses = functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
    return losses[:, : length - 1].mean().item(), losses[:, length:].mean().item()


@torch.no_grad()
def rank_keys(
    model: Any, token_ids: Tensor, *, segment: int, chunk_size: int = 4, num_chunks: int = 16
) -> dict[int, tuple[Tensor, Tensor]]:
    """How well the heads of every layer find the token that followed an earlier occurrence.

    Text of n tokens is encoded twice, in separate segments, as memory and the text that reads it are. The right key for
    the query of token t in the second pass is that of token t+1 in the first, where the model should look to copy. The
    second pass is cut half a segment later, so that no query has the context of its key.

    Args:
        token_ids: (B, n) text; n is the distance over which it repeats.
        segment: tokens encoded at once; n has whole segments, or is shorter than one.

    Returns:
        by layer, the median rank (H,) of the right key among the n of the first pass, 1 is best, and the share (H,) of
        queries whose right chunk is among the best ``num_chunks``.
    """
    segment = min(segment, token_ids.shape[1])
    ranks: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for row in token_ids:  # row by row: all layers' keys are held at once
        first = position_free_qkv(model, row.view(-1, segment))
        second = position_free_qkv(model, row.roll(-(segment // 2)).view(-1, segment))
        for layer in first:
            # (segments, H, T, D) -> (H, segments * T, D)
            queries = second[layer].queries.transpose(0, 1).flatten(1, 2).roll(segment // 2, dims=1)
            keys = first[layer].keys.transpose(0, 1).flatten(1, 2)
            ranks.setdefault(layer, []).append(_ranks(queries, keys, chunk_size))
    found = {}
    for layer, rows in ranks.items():
        by_token, by_chunk = (torch.cat(each, dim=1) for each in zip(*rows, strict=True))
        found[layer] = (by_token.median(dim=1).values, (by_chunk <= num_chunks).float().mean(dim=1))
    return found


def random_tokens(vocab_size: int, rows: int, length: int, *, seed: int = 0, special: Sequence[int] = ()) -> Tensor:
    """(rows, length) token ids drawn at random, none twice in a row of the result while the vocabulary lasts."""
    generator = torch.Generator().manual_seed(seed)
    ordinary = torch.tensor([token for token in range(vocab_size) if token not in set(special)])
    times = range(math.ceil(length / len(ordinary)))
    draws = [[ordinary[torch.randperm(len(ordinary), generator=generator)] for _ in times] for _ in range(rows)]
    return torch.stack([torch.cat(parts)[:length] for parts in draws])


def _ranks(queries: Tensor, keys: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Ranks (H, n-1) of the next token's key and (H, n') of its chunk, from queries (H, n, D) and keys (Hkv, n, D).

    Equal scores share their mean rank. A last, short chunk is left out, and so are the queries that look for it.
    """
    length = keys.shape[1]
    whole, following = length // chunk_size * chunk_size, torch.arange(1, length, device=keys.device)
    keys = keys.float().repeat_interleave(len(queries) // len(keys), dim=0)
    by_token, by_chunk = [], []
    for asked, own in zip(queries.float(), keys, strict=True):  # all scores (H, n, n) at once can be too many
        chunks = own[:whole].unflatten(0, (-1, chunk_size)).mean(dim=1)
        by_token.append(_rank(asked[:-1] @ own.T, following))
        by_chunk.append(_rank(asked[: whole - 1] @ chunks.T, following[: whole - 1] // chunk_size))
    return torch.stack(by_token).cpu(), torch.stack(by_chunk).cpu()


def _rank(scores: Tensor, right: Tensor) -> Tensor:
    """(Q, N) scores, (Q,) right answers -> (Q,) ranks."""
    wanted = scores.gather(1, right[:, None])
    above, level = (scores > wanted).sum(dim=1), (scores == wanted).sum(dim=1)
    return above.float() + (level + 1) / 2


def layers_report(
    model: Any,
    text: Tensor,
    tokenizer: Any = None,
    *,
    stride: int | None = None,
    distances: Sequence[int] = DISTANCES,
    rows: int = 4,
    **common: Any,
) -> Json:
    """Both measurements of a backbone, as ``longmem layers`` keeps them.

    Args:
        text: (rows, n) token ids.
        stride: of the SideNet to be, for which only layers that it copies are taken; None is a reader without one.
        common: ``chunk_size``, ``num_retrieved`` and ``seed`` of both.

    Returns:
        what ``explain_layers`` returns; ``effect``, what ``measure_layers`` returns; ``num_layers`` of the backbone;
        ``memory_layers`` that the family can remember, ``allowed``, those of them that may be taken; ``recommended``,
        the layers whose memory is worth most together, None where it is worth nothing; ``default``, the paper's choice.
    """
    family = Family.of(model)
    explained = explain_layers(model, text, distances=distances, rows=rows, **common)
    effect = measure_layers(model, list(text), tokenizer, stride=stride, **common)
    return {
        "num_layers": len(family.layers),
        "memory_layers": family.memory_layers(),
        "allowed": list(_candidates(model, stride)),
        "recommended": effect["best"],
        "default": family.default_memory_layer(stride or 2),
        "effect": effect,
        **explained,
    }


def conclusion(result: Json) -> str:
    """One sentence for a reader in a hurry."""
    if result["recommended"] is None:
        return (
            "no layer is worth reading: the backbone has no use yet for what it was told; train it longer, or keep the "
            f"paper's layer {result['default']}"
        )
    layers = ", ".join(map(str, result["recommended"]))
    return f"remember {layers} (the paper's rule gives {result['default']})"


def text_rows(documents: Iterable[str], tokenizer: Any, rows: int, length: int) -> Tensor:
    """(rows, length) token ids, from places spread over the text.

    Raises:
        DataError: there is not enough text for one row.
    """
    ids = [token for text in documents for token in token_ids(tokenizer, text)]
    if len(ids) < length:
        raise DataError(
            f"--data has {len(ids):,} tokens, {length:,} are needed; give more text, or smaller --distances"
        )
    starts = [(len(ids) - length) * (2 * row + 1) // (2 * rows) for row in range(rows)]
    return torch.tensor([ids[start : start + length] for start in starts])
