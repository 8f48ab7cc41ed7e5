"""What memory did to every token of a text, and what each token read: as records, and as one page of HTML.

B rows · T tokens · n remembered layers · H heads of a layer · R chunks per token and head
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.resources import files
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longmem.errors import StoreError
from longmem.generation.window import WindowPolicy
from longmem.types import ChunkOrigin

AROUND = 12
"""Tokens of context shown on either side of a chunk."""
MOST_CHUNKS = 6
"""Chunks shown for a token."""


class TokenReading(NamedTuple):
    """What one position read."""

    share: float
    """Part of the attention output that came from memory, the mean over layers and heads."""
    layers: dict[int, float]
    """The same for each remembered layer."""
    chunks: list[Any]
    """``ChunkReading`` of the chunks with the largest shares."""


def reading_at(explanation: Any, position: int) -> TokenReading:
    """What a position of the first row read, from the ``Explanation`` of a forward pass."""
    shares = explanation.share[0, :, position]  # (n*H,)
    layers = shares.view(len(explanation.layers), -1).mean(1).tolist()
    chunks = [each for each in explanation.token(position, top=MOST_CHUNKS) if each.share > 0]
    return TokenReading(float(shares.mean()), dict(zip(explanation.layers, layers, strict=True)), chunks)


class Readings(list[Any]):
    """Given to ``generate(..., explain=)``: keeps of every call only what chose the new token."""

    def append(self, explanation: Any) -> None:
        super().append(reading_at(explanation, -1))


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
