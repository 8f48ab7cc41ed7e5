"""What every token of a passage found in memory, and how much of it was used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from longmem.data.python_source import file_at
from longmem.errors import DataError
from longmem.memory.bank import MemoryBank
from longmem.modeling.explain import Explanation
from longmem.modeling.longmem import LongMem
from longmem.modeling.memory_lm import LongMemOutput
from longmem.types import ChunkOrigin

AROUND = 12
"""Tokens of context shown on either side of a chunk."""
MOST_CHUNKS = 6
"""Chunks shown per token."""
FIRST_TOKENS = 1024
"""No passage is taken from so near the beginning, where there is little to remember."""


@dataclass(frozen=True)
class Chunk:
    """A chunk that was found, with the text around it."""

    document: str
    file: str
    start_token: int
    tokens_back: int
    before: str
    text: str
    after: str


@dataclass(frozen=True)
class TokenReading:
    """One token of the passage.

    Attributes:
        text: as it stands in the document.
        share: mean over heads of the share given to memory while reading it.
        next_with: probability of the token that follows, with memory.
        next_without: the same with memory switched off.
        found: index into ``Passage.chunks`` and the part of ``share`` that went to it, largest first.
    """

    text: str
    share: float
    next_with: float
    next_without: float
    found: list[tuple[int, float]]


@dataclass(frozen=True)
class Passage:
    """A window of a held-out document, read with what came before it in memory.

    Attributes:
        windows: how many windows of the document it was chosen from: memory helps most in this one.
        gain: mean fall of the loss over the passage, in nats per token.
        mean_gain: the same over all those windows.
    """

    document: str
    file: str
    start_token: int
    memory_tokens: int
    windows: int
    gain: float
    mean_gain: float
    tokens: list[TokenReading]
    chunks: list[Chunk]


def fewest_tokens(window: int) -> int:
    """Of a document that has a passage: one whole window, and the token after it, behind its ``FIRST_TOKENS``."""
    return -(-FIRST_TOKENS // window) * window + window + 1


@torch.no_grad()
def most_helped_passage(
    model: LongMem,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    text: str,
    *,
    window: int,
    memory_tokens: int,
    max_tokens: int,
) -> Passage:
    """Stream a document segment by segment, and read the window that memory helps most.

    Raises:
        DataError: the document is too short to have a passage.
    """
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, spans = torch.tensor(encoded["input_ids"][:max_tokens]), encoded["offset_mapping"]
    model.train(False)
    bank = MemoryBank.for_model(model, rows=1, capacity_tokens=memory_tokens)
    gains: list[float] = []
    best: Passage | None = None
    for start in range(0, len(ids) - window, window):
        segment, targets = ids[start : start + window], ids[start + 1 : start + window + 1]
        out = model(segment[None], memory=bank, explain=start >= FIRST_TOKENS)
        if start >= FIRST_TOKENS:
            with_memory = _probabilities(out, targets)
            without = _probabilities(model(segment[None]), targets)
            gains.append(float((with_memory.log() - without.log()).mean()))
            if gains[-1] == max(gains):
                assert out.explanation is not None
                found, chunks = _found(out.explanation, text, spans, start)
                share = out.explanation.share[0].mean(0)
                tokens = [
                    TokenReading(text[slice(*spans[start + t])], float(share[t]), float(p), float(q), found[t])
                    for t, (p, q) in enumerate(zip(with_memory, without, strict=True))
                ]
                remembered = int(bank.tokens[0])
                file = file_at(text, spans[start][0]) or name
                best = Passage(name, file, start, remembered, 0, gains[-1], 0.0, tokens, chunks)
        bank.add(out.kv, documents=[name], offsets=[start])
    if best is None:
        needed = fewest_tokens(window)
        raise DataError(f"{name}: {len(ids)} tokens are too few to show a passage; it needs {needed} or more")
    return Passage(**{**vars(best), "windows": len(gains), "mean_gain": sum(gains) / len(gains)})


def _found(
    explanation: Explanation, text: str, spans: list[tuple[int, int]], start: int
) -> tuple[list[list[tuple[int, float]]], list[Chunk]]:
    """For every token its chunks, all heads together, and the chunks themselves."""
    chunks: dict[int, Chunk] = {}
    index: dict[int, int] = {}
    found = []
    for token in range(explanation.chunks.shape[2]):
        largest = [reading for reading in explanation.token(token, top=MOST_CHUNKS) if reading.share > 0]
        found.append([(index.setdefault(each.chunk, len(index)), each.share) for each in largest])
        chunks.update((each.chunk, _chunk(each.origin, text, spans, start)) for each in largest)
    return found, [chunks[number] for number in index]


def _chunk(origin: ChunkOrigin, text: str, spans: list[tuple[int, int]], start: int) -> Chunk:
    first, last = origin.start_token, origin.start_token + origin.length
    begin, end = spans[first][0], spans[last - 1][1]
    return Chunk(
        document=origin.document or "",
        file=file_at(text, begin) or origin.document or "",
        start_token=first,
        tokens_back=start - first,
        before=text[spans[max(0, first - AROUND)][0] : begin],
        text=text[begin:end],
        after=text[end : spans[min(len(spans), last + AROUND) - 1][1]],
    )


def _probabilities(out: LongMemOutput, targets: Tensor) -> Tensor:
    """(T,): what each next token was given."""
    assert out.logits is not None
    return out.logits[0].float().softmax(dim=-1).gather(1, targets[:, None])[:, 0]
