"""From a request to pieces of text: prompt, memory, tokens, stop words, counts."""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from longmem.chat import Message, chat_prompt, stop_words
from longmem.errors import StoreError
from longmem.generation.page import Readings, without_memory
from longmem.generation.window import WindowPolicy
from longmem.server.engine import Engine, Job, Sampling, Token
from longmem.server.memories import Memories


@dataclass
class Answer:
    """One answer, as it grows.

    Attributes:
        prompt_tokens: that were read.
        text: so far, without what may yet turn out to be a stop word.
        tokens: so far.
        finish: ``stop`` or ``length``, at the end.
        read: on request, for each new token: its text, the nats that memory gained or lost it, and the chunks read.
        memory_tokens: in the memory that could be searched.
    """

    prompt_tokens: int = 0
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None
    read: list[dict[str, Any]] = field(default_factory=list)
    memory_tokens: int = 0


class Answering:
    """Makes answers with one engine, tokenizer and store."""

    def __init__(self, engine: Engine, tokenizer: Any, memories: Memories) -> None:
        self.engine, self.tokenizer, self.memories = engine, tokenizer, memories
        self.heads_read = not getattr(engine.model.config, "closed", False)
        ends = engine.model.generation_config.eos_token_id
        found = [tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])]
        self.stop_ids = frozenset(int(token) for token in found if token is not None)

    def chat_ids(self, messages: Sequence[Message], owner: str, memory: str | None, passages: int) -> tuple[Any, ...]:
        """The prompt of a conversation, and the passages of its memory that were put into it."""
        recall = None if memory is None or not passages else self.memories.recall(owner, memory)
        prompt = chat_prompt(self.tokenizer, messages, recall=recall, passages=passages)
        return prompt.ids, [
            {"document": each.document, "start": each.start, "text": each.text, "score": each.score}
            for each in prompt.recalled
        ]

    async def stream(
        self,
        ids: list[int],
        sampling: Sampling,
        *,
        owner: str,
        memory: str | None,
        stop: Sequence[str] = (),
        explain: bool = False,
        chat: bool = True,
    ) -> AsyncGenerator[tuple[str, list[Token], Answer], None]:
        """Pieces of the answer with their tokens, and the answer so far; the last piece ends it."""
        answer = Answer(prompt_tokens=len(ids))
        banks: list[Any] = []  # the newest last: a row that gave way comes back to what is remembered then

        def opened() -> Any:
            bank = self.memories.bank(owner, str(memory))
            answer.memory_tokens = 0 if bank is None else int(bank.tokens.sum())
            banks[:] = [bank]
            return bank if self.heads_read else None

        readings = Readings() if explain and memory is not None and self.heads_read else None
        job = Job(ids, None if memory is None else opened, sampling, self.stop_ids, explain=readings)
        words = [*stop, *(stop_words(self.tokenizer) if chat else ())]
        text, fresh = _Text(self.tokenizer, words), list[Token]()
        async with aclosing(self.engine.generate(job)) as tokens:
            async for token in tokens:
                answer.tokens.append(token)
                fresh.append(token)
                piece = text.take(token.id)
                if piece:
                    answer.text += piece
                    yield piece, fresh, answer
                    fresh = []
                if text.stopped:
                    break
        answer.finish = "length" if len(answer.tokens) >= sampling.max_tokens and not text.stopped else "stop"
        if readings:
            read = partial(self._read, ids, answer.tokens, readings, banks[-1])
            answer.read = await self.engine.call(read, follows=True)
        piece = text.rest()
        answer.text += piece
        yield piece, fresh, answer

    def _read(self, ids: list[int], tokens: list[Token], readings: list[Any], bank: Any) -> list[dict[str, Any]]:
        """What each new token read, and what that did to it: one more pass, with memory off and the same window."""
        model = self.engine.model
        whole = torch.tensor([*ids, *(token.id for token in tokens)])
        policy = WindowPolicy.of(copy.copy(model.generation_config), model, bank)
        without = without_memory(model, whole, len(ids), policy).tolist()
        return [
            {
                "token": self.tokenizer.decode([token.id]),
                "gain": token.logprob - alone,
                "chunks": [_chunk(chunk, bank) for chunk in reading.chunks[:3]],
            }
            for token, alone, reading in zip(tokens, without, readings, strict=False)
        ]


class _Text:
    """Text of tokens that come one by one; what may be half a character or half a stop word waits."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, [word for word in stop if word]
        self._ids: list[int] = []
        self._known = self._read = 0  # tokens from which is decoded, and up to which the text is known
        self._text, self._given = "", 0
        self.stopped = False

    def take(self, token: int) -> str:
        """What can be told after one more token."""
        self._ids.append(token)
        self._decode(final=False)
        for word in self._stop:
            at = self._text.find(word, max(0, self._given - len(word)))
            if at >= 0:
                self.stopped, self._text = True, self._text[:at]
        end = len(self._text)
        if not self.stopped:
            half = (size for word in self._stop for size in range(1, len(word)) if self._text.endswith(word[:size]))
            end -= max(half, default=0)
        return self._give(end)

    def rest(self) -> str:
        """What was waiting, at the end."""
        if not self.stopped:
            self._decode(final=True)
        return self._give(len(self._text))

    def _give(self, end: int) -> str:
        piece = self._text[self._given : end]
        self._given = max(self._given, end)
        return piece

    def _decode(self, final: bool) -> None:
        """Add whole characters to the text; decoding from some tokens back keeps the spaces between words."""
        before, now = self._decoded(self._known, self._read), self._decoded(self._known, len(self._ids))
        if final or not now.endswith("\ufffd"):
            self._text += now[len(before) :]
            self._known, self._read = self._read, len(self._ids)

    def _decoded(self, begin: int, end: int) -> str:
        return str(self._tokenizer.decode(self._ids[begin:end], skip_special_tokens=True))


def _chunk(reading: Any, bank: Any) -> dict[str, Any]:
    """A chunk that was read: where it is, how much of the output it made, and the passage around it."""
    origin = reading.origin
    found = {
        "document": origin.document,
        "start_token": origin.start_token,
        "length": origin.length,
        "share": reading.share,
        "score": reading.score,
        "layers": {str(layer): share for layer, share in reading.layers.items()},
    }
    if origin.namespace is not None:  # else it is of this conversation, what has left the window
        with suppress(StoreError):  # forgotten since
            passage = bank.passage(origin)
            found.update(before=passage.before, text=passage.text, after=passage.after)
    return found
