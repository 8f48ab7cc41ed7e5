"""What memory did to every token of a text, and what each token read: as records, and as one page of HTML.

B rows · T tokens · n remembered layers · H heads of a layer · R chunks per token and head
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.resources import files
from itertools import groupby, pairwise
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from longmem.errors import StoreError
from longmem.generation.window import WindowPolicy
from longmem.types import ChunkOrigin, Memory

AROUND = 12
"""Tokens of context shown on either side of a chunk."""
MOST_CHUNKS = 6
"""Chunks shown for a token."""


# what a forward pass read


@dataclass(frozen=True)
class ChunkReading:
    """One chunk, as one token or several read it.

    Attributes:
        chunk: its number in its row, as ``Memory.provenance`` counts; a bank that is written may number anew.
        origin: its document, offset and time, looked up when it was read.
        share: part of the heads' output that came from it, the mean over tokens, heads and layers. Over all chunks
            these sum to the mean share that was given to memory.
        score: largest inner product of a query with its mean key.
        layers: for every remembered layer whose heads found it, their mean part.
    """

    chunk: int
    origin: ChunkOrigin
    share: float
    score: float
    layers: dict[int, float]


@dataclass(frozen=True)
class Explanation:
    """What every token and head of one forward pass read: ``LongMem.forward(..., explain=True).explanation``.

    Attributes:
        rows: (B,) long, the memory row each batch row read.
        chunks: (B, n*H, T, R) long, the number of each chunk found, best first; -1 where fewer were there.
        scores: (B, n*H, T, R) float32, inner products of query and mean key; 0 where nothing was found.
        shares: (B, n*H, T, R) float32, the share of the head's output that came from this chunk: the share given to
            memory times the chunk's part of the attention over memory.
        origins: by memory row and chunk number, where each chunk came from.
        layers: the remembered layers, in the order of their heads.
    """

    rows: Tensor
    chunks: Tensor
    scores: Tensor
    shares: Tensor
    origins: dict[tuple[int, int], ChunkOrigin]
    layers: tuple[int, ...] = (0,)

    @classmethod
    def of(cls, memory: Memory, reads: Sequence[Any]) -> Self:
        """Look up what the layers (``modeling.reading.LayerRead``) found, now: the memory may soon be written."""
        first = reads[0].retrieved
        rows = first.rows if first.memory_rows is None else first.memory_rows
        chunks = torch.cat([read.retrieved.chunks for read in reads], dim=1)
        scores = torch.cat([read.retrieved.scores.float() for read in reads], dim=1)
        shares = torch.cat([read.shares.float() for read in reads], dim=1)
        # row and chunk in one integer; chunks stay below 1 << 40, a session's too (``memory.session.OVERLAY``)
        found = ((rows.view(-1, 1, 1, 1) << 40) + chunks)[chunks >= 0]
        pairs = [divmod(pair, 1 << 40) for pair in torch.unique(found).tolist()]
        origins = {(row, chunk): memory.provenance(row, chunk) for row, chunk in pairs}
        layers = tuple(read.layer for read in reads)
        return cls(rows.cpu(), chunks.cpu(), scores.cpu(), shares.cpu(), origins, layers)

    @property
    def share(self) -> Tensor:
        """(B, n*H, T), the share that each token and head gave to memory."""
        return self.shares.sum(-1)

    def token(self, position: int, row: int = 0, *, top: int | None = None) -> list[ChunkReading]:
        """What one token read, all its heads together, largest share first.

        ``position`` is of the token in the input; in ``generate`` the last one of a call chose the next token.
        """
        return self.over([position], row, top=top)

    def over(
        self, positions: Iterable[int] | None = None, row: int = 0, *, top: int | None = None
    ) -> list[ChunkReading]:
        """What several tokens of a batch row read together, at most ``top`` chunks; None: every token of the row."""
        at = torch.arange(self.chunks.shape[2]) if positions is None else torch.tensor([*positions], dtype=torch.long)
        chunks, shares, scores = (each[row][:, at].flatten(1) for each in (self.chunks, self.shares, self.scores))
        numbers, inverse = torch.unique(chunks, return_inverse=True)
        heads = (len(chunks), len(numbers))  # the slot of "nothing found" is dropped below
        shape = (len(self.layers), len(chunks) // len(self.layers), len(numbers))  # n, H, chunks
        parts = torch.zeros(heads).scatter_add_(1, inverse, shares).view(shape) / max(1, len(at))
        found = torch.zeros(heads, dtype=torch.bool).scatter_(1, inverse, True).view(shape)
        best = torch.full((len(numbers),), -torch.inf).scatter_reduce_(0, inverse.flatten(), scores.flatten(), "amax")
        share, by_layer, finders = parts.mean((0, 1)), parts.mean(1), found.any(1)
        order = [slot for slot in share.argsort(descending=True, stable=True).tolist() if int(numbers[slot]) >= 0]
        return [
            ChunkReading(
                chunk=int(numbers[slot]),
                origin=self.origins[int(self.rows[row]), int(numbers[slot])],
                share=float(share[slot]),
                score=float(best[slot]),
                layers={
                    layer: float(by_layer[place, slot])
                    for place, layer in enumerate(self.layers)
                    if finders[place, slot]
                },
            )
            for slot in order[:top]
        ]


# what memory did to every new token


class TokenReading(NamedTuple):
    """What one position read."""

    share: float
    """Part of the attention output that came from memory, the mean over layers and heads."""
    layers: dict[int, float]
    """The same for each remembered layer."""
    chunks: list[ChunkReading]
    """Those with the largest shares."""


class Readings(list[TokenReading]):
    """Given to ``generate(..., explain=)``: keeps of every call only what chose the new token."""

    def append(self, explanation: Any) -> None:  # an ``Explanation``
        shares = explanation.share[0, :, -1]  # (n*H,)
        layers = shares.view(len(explanation.layers), -1).mean(1).tolist()
        chunks = [each for each in explanation.token(-1, top=MOST_CHUNKS) if each.share > 0]
        by_layer = dict(zip(explanation.layers, layers, strict=True))
        super().append(TokenReading(float(shares.mean()), by_layer, chunks))


def generate_explained(model: Any, ids: Tensor, memory: Any, **settings: Any) -> tuple[Tensor, list[float], list[Any]]:
    """``model.generate`` for one prompt ``ids`` (1, T), with what memory (a session) did to every new token.

    Returns:
        the whole text (T,), the gain in nats of every new token, and its ``TokenReading``. The gain is the log
        probability of the token, less its log probability with memory off and the same window: one more pass.
    """
    readings = Readings()
    out = model.generate(
        ids, memory=memory, explain=readings, output_logits=True, return_dict_in_generate=True, **settings
    )
    whole, first = out.sequences[0], ids.shape[1]
    scores = torch.cat(out.logits)  # (new tokens, V)
    with_memory = log_probabilities(scores, whole[first:].to(scores.device))
    without = without_memory(model, whole, first, memory, **settings)
    return whole, (with_memory - without).tolist(), list(readings)


def log_probabilities(scores: Tensor, tokens: Tensor) -> Tensor:
    """(T,) log probabilities in nats of tokens (T,) under scores (T, V), on the CPU."""
    return scores.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0].cpu()


@torch.no_grad()
def without_memory(model: Any, ids: Tensor, first: int, memory: Any, **settings: Any) -> Tensor:
    """Log probabilities of ``ids[first:]`` with memory off, each behind the window that it was generated behind.

    ``memory`` and ``settings`` are those of the ``generate`` that made them.
    """
    config = copy.deepcopy(model.generation_config)
    config.update(**settings)
    policy = WindowPolicy.of(config, model, memory)
    found = [torch.zeros(0)]
    starts = (0 if policy is None else policy.pieces_over(place) * policy.move for place in range(first, len(ids)))
    for start, places in groupby(starts):
        end = first + len(list(places))
        scores = model(ids[start : end - 1][None].to(model.device), logits_to_keep=end - first).logits[0]
        found.append(log_probabilities(scores, ids[first:end].to(scores.device)))
        first = end
    return torch.cat(found)


@dataclass(frozen=True)
class FoundChunk:
    """A chunk that a token read: its place, its shares as in ``TokenReading``, its text and the text around it."""

    document: str | None
    start_token: int
    share: float
    layers: dict[int, float]
    before: str
    text: str
    after: str


@dataclass(frozen=True)
class ReadToken:
    """A token, what it adds to the text, and what was read to choose it (see ``TokenReading``)."""

    token: int
    text: str
    gain: float
    """Nats by which memory made it likelier; below 0, less likely."""
    share: float
    layers: dict[int, float]
    found: list[FoundChunk]


class Pieces:
    """Spells tokens one at a time: what all pieces say together is what decoding at once says.

    A character whose bytes are spread over several tokens comes with the last of them.

    Args:
        tokenizer: of transformers.
        before: token ids of the text so far, which is not spelled again.
        settings: of its ``decode``.
    """

    CONTEXT = 6  # tokens before, because some tokenizers spell a token by what stands before it

    def __init__(self, tokenizer: Any, before: Sequence[int] = (), **settings: bool) -> None:
        settings = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False, **settings}
        self._decode = partial(tokenizer.decode, **settings)
        self._said, self._waiting = list(before)[-self.CONTEXT :], list[int]()

    def push(self, token: int) -> str:
        """What this token adds; empty while a character is not whole."""
        self._waiting.append(token)
        return self._added(whole=len(self._waiting) < self.CONTEXT)

    def end(self) -> str:
        """What still waits, whole or not."""
        return self._added(whole=False)

    def _added(self, *, whole: bool) -> str:
        text = str(self._decode([*self._said, *self._waiting]))[len(self._decode(self._said)) :]
        if whole and text.endswith("\ufffd"):
            return ""
        self._said, self._waiting = [*self._said, *self._waiting][-self.CONTEXT :], []
        return text


def read_tokens(
    ids: Sequence[int],
    before: Sequence[int],
    gains: Sequence[float],
    readings: Sequence[TokenReading],
    tokenizer: Any,
    ids_of: Callable[[str | None, str], Any],
) -> list[ReadToken]:
    """Records of the tokens ``ids`` that follow the text ``before``; memory may have been empty for all of them.

    ``ids_of`` gives the token ids (t,) of a document of a namespace (None: the memory is no store), None where they are
    not known; it may raise StoreError.
    """
    decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @cache
    def whole(namespace: str | None, document: str) -> Any:
        with suppress(StoreError):  # forgotten since it was read
            return ids_of(namespace, document)

    @cache
    def spelled(origin: ChunkOrigin) -> list[str]:
        """The text before a chunk, its own, and that after it."""
        known, first = whole(origin.namespace, origin.document or ""), origin.start_token
        spans = pairwise((max(0, first - AROUND), first, first + origin.length, first + origin.length + AROUND))
        return ["" if known is None else decode(known[begin:end]) for begin, end in spans]

    pieces = Pieces(tokenizer, before, skip_special_tokens=False)
    tokens, nothing = [], [TokenReading(0.0, {}, [])] * (len(ids) - len(readings))
    for token, gain, each in zip(ids, gains, [*readings, *nothing], strict=True):
        found = [
            FoundChunk(
                chunk.origin.document, chunk.origin.start_token, chunk.share, chunk.layers, *spelled(chunk.origin)
            )
            for chunk in each.chunks
        ]
        tokens.append(ReadToken(token, pieces.push(token), gain, each.share, each.layers, found))
    return tokens


def page(model: str, memory: str, prompt: str, tokens: Sequence[ReadToken], notes: Sequence[str] = ()) -> str:
    """One HTML file without outside parts; every text is put in as text.

    Names of model and memory and ``notes`` stand above the text, which is the prompt and the shaded tokens.
    """
    data: dict[str, Any] = {"model": model, "memory": memory, "prompt": prompt, "notes": list(notes)}
    data["tokens"] = [asdict(token) for token in tokens]
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":  # no text may end the element that holds it
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return (files("longmem.generation") / "page.html").read_text(encoding="utf-8").replace("__DATA__", text)
