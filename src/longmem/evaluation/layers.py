"""Which layer is worth remembering: the two measurements behind ``longmem layers``.

By its keys: every head of every layer is asked, with its position-free queries, for the token that followed an earlier
occurrence of the current one, in repeated text and in repeated random tokens. See ``longmem.modeling.copying``.

By its effect, since a key that is found is not yet a memory that helps: facts are told in one conversation and asked
for in another, and text is read with its earlier part in memory, while one layer, or a set of layers, reads memory
without any training (one softmax over local and retrieved tokens). What the whole context in the window is worth is
measured too.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from longmem.config import TrainingFreeConfig
from longmem.data.told import asked_ids, told_ids, told_session
from longmem.errors import ConfigError, DataError
from longmem.evaluation.loading import backbone_of, checkpoint_folder
from longmem.evaluation.results import Json, RunHeader, as_json
from longmem.memory import MemoryBank
from longmem.modeling import loading
from longmem.modeling.baselines import TrainingFree
from longmem.modeling.copying import (
    allowed_memory_layers,
    best_memory_layer,
    copy_loss,
    default_memory_layer,
    layer_scores,
    random_tokens,
    retrieval_by_layer,
)
from longmem.modeling.families import Family
from longmem.progress import Progress, track
from longmem.types import AttentionKV

MOST_LAYERS = 4  # of a set whose effect is measured
DISTANCES = (128, 256, 512, 1024)
MOST_PIECES = 4  # of a row, for distances shorter than it
STANDARD_TEXT = ("argparse.py", "difflib.py", "doctest.py", "inspect.py", "subprocess.py", "typing.py")
"""Standard library sources that stand in for ``--data``: text that every machine has."""


@torch.no_grad()
def measure_layers(
    model: Any,
    text: Tensor | None,
    *,
    distances: Sequence[int] = DISTANCES,
    segment: int | None = None,
    rows: int = 4,
    chunk_size: int = 4,
    num_retrieved: int = 64,
    stride: int = 2,
    seed: int = 0,
    name: str = "",
    command: str = "",
) -> Json:
    """Rank every layer and head of a causal language model.

    Args:
        model: any causal language model that ``Backbone`` takes, in its place and dtype.
        text: (rows, n) token ids of text, n at least the smallest distance; None measures random tokens only.
        distances: tokens between the two occurrences.
        segment: tokens encoded at once; None is the model's window, at most 1,024.
        rows: of random tokens.
        stride: of the SideNet that will copy the layer.
        name: of the model, for the record.
        command: as typed, for the record.

    Returns:
        the JSON of the result file. ``num_layers`` of the backbone; ``memory_layers`` that the family can remember;
        ``allowed``, those of them that a SideNet of this stride copies; ``scores`` of each layer, 0 is chance and 1 is
        best; ``recommended``, the best allowed layer, None where the backbone does not copy yet; ``default``, the
        paper's choice. ``ranks``: for each source and distance, by layer and head, the median ``rank`` of the right key
        and the share of queries that find the right chunk (``recall``; ``chance`` is a blind head's). ``copying``: nats
        per token on the first and the second pass of the same tokens within one window.

    Raises:
        ConfigError: settings that contradict each other.
        BackboneError: a model that cannot be remembered.
    """
    family = Family.of(model)
    segment = segment or min(getattr(family.config, "max_position_embeddings", None) or 1024, 1024)
    problems = [f"segment ({segment}) must be at least 2"] if segment < 2 else []
    if chunk_size < 1 or num_retrieved < 1 or num_retrieved % max(1, chunk_size):
        said = f"must be a multiple of chunk_size ({chunk_size}); try 64 and 4"
        problems.append(f"num_retrieved ({num_retrieved}) {said}")
    elif not distances or min(distances) <= num_retrieved:
        problems.append(
            f"distances ({', '.join(map(str, distances))}) must all exceed num_retrieved ({num_retrieved}): a query "
            "may not retrieve everything there is"
        )
    if problems:
        raise ConfigError(problems)
    special = [token for token in (model.config.bos_token_id, model.config.eos_token_id) if isinstance(token, int)]
    drawn = random_tokens(family.config.vocab_size, rows, max(distances), seed=seed, special=special)
    sources = {"random": drawn} if text is None else {"text": text, "random": drawn}
    jobs = [(source, d) for source, t in sources.items() for d in sorted(set(distances)) if d <= t.shape[1]]
    found, ranks, copying = [], [], []
    for source, distance in track(jobs, "measuring layers", len(jobs), "distances"):
        count = min(MOST_PIECES, sources[source].shape[1] // distance)
        pieces = sources[source][:, : count * distance].reshape(-1, distance).to(next(model.parameters()).device)
        heads = retrieval_by_layer(
            model, pieces, segment=segment, chunk_size=chunk_size, num_chunks=num_retrieved // chunk_size
        )
        found.append(heads)
        first = next(iter(heads.values()))
        ranks.append(
            {
                "source": source,
                "distance": first.keys,
                "segment": min(segment, distance),
                "queries": len(pieces) * (first.keys - 1),
                "chance": first.chance,
                "rank": {layer: head.rank.tolist() for layer, head in heads.items()},
                "recall": {layer: head.recall.tolist() for layer, head in heads.items()},
                "score": {layer: head.score for layer, head in heads.items()},
            }
        )
        if 2 * distance <= segment:
            first_loss, second_loss = copy_loss(model, pieces)
            about = {"source": source, "distance": distance}
            copying.append(about | {"first_loss": first_loss, "second_loss": second_loss})
    allowed, scores = allowed_memory_layers(family, stride), layer_scores(found)
    header = RunHeader(
        task="layers",
        command=command,
        config={
            "distances": sorted(set(distances)),
            "segment": segment,
            "chunk_size": chunk_size,
            "num_retrieved": num_retrieved,
            "stride": stride,
        },
        models={"backbone": name, "class": type(model).__name__},
        samples={source: len(tokens) for source, tokens in sources.items()},
        seeds=[seed],
    )
    result: Json = as_json(
        {
            "header": header,
            "num_layers": len(family.layers),
            "memory_layers": family.memory_layers(),
            "allowed": allowed,
            "scores": scores,
            "recommended": best_memory_layer(scores, allowed),
            "default": default_memory_layer(model, stride),
            "ranks": ranks,
            "copying": copying,
        }
    )
    return result


def conclusion(result: Json) -> str:
    """One sentence for a reader in a hurry."""
    if result["recommended"] is None:
        return (
            "no layer stands out from chance: the backbone does not copy from its context yet; train it longer, or "
            f"keep the paper's layer {result['default']}"
        )
    return f"remember layer {result['recommended']} (the paper's rule gives {result['default']})"


def load_backbone(path: str, *, device: str = "cpu", dtype: torch.dtype | None = None) -> tuple[Any, str]:
    """A causal language model, or the backbone that a checkpoint names; and where its tokenizer should be."""
    where, revision = backbone_of(checkpoint_folder(path))
    model: Any = loading.load_backbone(where, revision, dtype)
    return model.to(device).eval(), where


def text_rows(documents: Sequence[str], tokenizer: Any, rows: int, length: int) -> Tensor:
    """(rows, length) token ids, from the middle of as many documents as there are long enough ones.

    Raises:
        DataError: there is not enough text for one row.
    """
    encoded = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in documents]
    stock = sorted((ids for ids in encoded if len(ids) >= length), key=len, reverse=True)
    stock = stock or [[token for ids in encoded for token in ids]]
    if len(stock[0]) < length:
        raise DataError(
            f"--data has {len(stock[0]):,} tokens, {length:,} are needed; give more text, or smaller --distances"
        )
    stock = stock[:rows]
    chosen = []
    for row in range(rows):
        ids, turn, turns = stock[row % len(stock)], row // len(stock), -(-rows // len(stock))
        # rows of one document are spread over it, and its first lines are left out where there is room
        start = (len(ids) - length) * (2 * turn + 1) // (2 * turns)
        chosen.append(ids[start : start + length])
    return torch.tensor(chosen)


def standard_text() -> list[str]:
    """Sources of this Python's own standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [(folder / name).read_text(encoding="utf-8") for name in STANDARD_TEXT if (folder / name).is_file()]


# the effect of reading


@dataclass(frozen=True)
class Effect:
    """One way of reading.

    ``layers`` that read memory (none is the backbone alone); ``facts``: mean log probability of the tokens of the
    values asked for, nats, None without a tokenizer; ``text``: mean nats per token of the windows of text, None without
    text.
    """

    layers: tuple[int, ...]
    facts: float | None
    text: float | None


@dataclass
class EffectReport:
    """What ``measure_effect`` found.

    Attributes:
        alone: the backbone without memory.
        context: with everything that was told in its window.
        single: every layer by itself.
        sets: the best set of each size, each one layer larger than the one before.
        best: the set of these that is worth most.
    """

    alone: Effect
    context: Effect
    single: list[Effect] = field(default_factory=list)
    sets: list[Effect] = field(default_factory=list)
    best: tuple[int, ...] = ()

    def worth(self, effect: Effect) -> float:
        """Nats gained against the backbone alone: of the facts where there are any, else of text."""
        if effect.facts is not None and self.alone.facts is not None:
            return effect.facts - self.alone.facts
        assert effect.text is not None and self.alone.text is not None
        return self.alone.text - effect.text

    def recovered(self, effect: Effect) -> float:
        """The share of what the context in the window is worth."""
        whole = self.worth(self.context)
        return self.worth(effect) / whole if whole > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the worth of every effect."""
        return asdict(self) | {"recovered": {str(e.layers): self.recovered(e) for e in [*self.single, *self.sets]}}


class _Case(NamedTuple):
    """Ids with scored places (the next token counts), behind what was read before."""

    ids: Tensor
    scored: Tensor
    before: Tensor
    kv: AttentionKV  # of every candidate layer, (1, n*Hkv, T, D)
    fact: bool


def measure_effect(
    model: PreTrainedModel,
    texts: Sequence[Tensor] = (),
    tokenizer: Any = None,
    *,
    layers: Sequence[int] | None = None,
    most: int = MOST_LAYERS,
    sessions: int = 4,
    window: int = 512,
    num_retrieved: int = 64,
    chunk_size: int = 4,
    seed: int = 0,
    quiet: bool = False,
) -> EffectReport:
    """Measure layers one by one, then sets: the best layer, and the one that adds most to it, and so on.

    Args:
        texts: token ids (n,) of documents; the last ``window`` tokens are predicted, the rest is in memory.
        tokenizer: for the facts; None measures text alone.
        layers: candidates; None is every layer that can be remembered.
        most: layers in a set.
        sessions: conversations that tell eight facts each.

    Raises:
        ConfigError: there is neither text nor a tokenizer.
        BackboneError: a layer cannot be remembered, or the family does not give its local scores.
    """
    if not texts and tokenizer is None:
        raise ConfigError("there is nothing to measure with; give texts, or a tokenizer for facts")
    candidates = tuple(Family.of(model).memory_layers() if layers is None else sorted(layers))
    work = _Work(model, candidates, {"num_retrieved": num_retrieved, "chunk_size": chunk_size})
    cases = [work.case(ids[-window - 1 :], range(window // 2, window), ids[: -window - 1]) for ids in texts]
    if tokenizer is not None:
        cases += _fact_cases(work, tokenizer, sessions, seed)
    report = EffectReport(work.effect(cases, ()), work.effect(cases, (), in_context=True))
    total = len(candidates) * most - most * (most - 1) // 2
    with Progress("measuring layers", total, "sets", quiet=quiet) as progress:
        best: tuple[int, ...] = ()
        for size in range(1, min(most, len(candidates)) + 1):
            tried = []
            for layer in candidates:
                if layer not in best:
                    tried.append(work.effect(cases, tuple(sorted((*best, layer)))))
                    progress.advance(note=f"layers {', '.join(map(str, tried[-1].layers))}")
            if size == 1:
                report.single = tried
            report.sets.append(max(tried, key=report.worth))
            best = report.sets[-1].layers
    report.best = max(report.sets, key=report.worth).layers
    return report


def _fact_cases(work: _Work, tokenizer: Any, sessions: int, seed: int) -> list[_Case]:
    draw, cases = random.Random(seed), []
    for _ in range(sessions):
        session = told_session(draw, 8)
        before = torch.tensor(told_ids(session, tokenizer))
        for fact in session.facts:
            asked = asked_ids([fact], tokenizer)
            first, end = asked.values[0]
            cases.append(work.case(torch.tensor(asked.ids), range(first - 1, end - 1), before, fact=True))
    return cases


class _Work:
    """The backbone, read at any set of the candidate layers."""

    def __init__(self, model: PreTrainedModel, candidates: tuple[int, ...], settings: dict[str, Any]) -> None:
        self.model, self.candidates, self.settings = model, candidates, settings
        self.all = self._reader(candidates)
        self.heads = self.all.memory_heads
        self._encoded: tuple[Tensor, AttentionKV] | None = None

    def case(self, ids: Tensor, scored: range, before: Tensor, *, fact: bool = False) -> _Case:
        if self._encoded is None or self._encoded[0] is not before:  # facts of one conversation follow each other
            self._encoded = (before, self.all.encode(before[None].to(self.all.device)))
        return _Case(ids, torch.tensor(list(scored)), before, self._encoded[1], fact)

    @torch.no_grad()
    def effect(self, cases: Sequence[_Case], layers: tuple[int, ...], in_context: bool = False) -> Effect:
        """Of reading at these layers; ``in_context``: of everything in the window, what memory could be worth at
        most."""
        reader = self._reader(layers) if layers else None
        losses: dict[bool, list[float]] = {True: [], False: []}
        for case in cases:
            ids = (torch.cat([case.before, case.ids]) if in_context else case.ids).to(self.all.device)
            scored = case.scored.to(ids.device) + (len(case.before) if in_context else 0)
            logits = self._logits(ids[None, :-1], scored, reader, case, layers)
            losses[case.fact].append(float(functional.cross_entropy(logits.float(), ids[scored + 1])))
        facts, text = (sum(some) / len(some) if some else None for some in (losses[True], losses[False]))
        return Effect(layers, None if facts is None else -facts, text)

    def _logits(self, ids: Tensor, scored: Tensor, reader: TrainingFree | None, case: _Case, layers: Any) -> Tensor:
        bank = None
        if reader is not None:
            size = reader.config.chunk_size
            bank = MemoryBank.for_model(reader, rows=1, capacity_tokens=-(-case.kv.keys.shape[2] // size) * size)
            places = [self.candidates.index(layer) for layer in layers]
            heads = [head for place in places for head in range(place * self.heads, (place + 1) * self.heads)]
            bank.add(AttentionKV(case.kv.keys[:, heads], case.kv.values[:, heads]))
        logits: Tensor = (reader or self.all)(ids, memory=bank, logits_to_keep=scored, use_cache=False).logits[0]
        return logits

    def _reader(self, layers: tuple[int, ...]) -> TrainingFree:
        config = TrainingFreeConfig(memory_layers=layers, fusion="softmax", gate=0.5, **self.settings)
        known = None if layers == self.candidates else self.all.fingerprint  # hashing all weights takes seconds
        return TrainingFree(config, self.model, fingerprint=known)
