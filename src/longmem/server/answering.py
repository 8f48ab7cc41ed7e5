"""From a request to pieces of text: prompt, memory, tokens, stop words, counts."""

from __future__ import annotations

import copy
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from longmem.chat import Message, Prompt, chat_prompt, stop_words
from longmem.generation.page import Pieces, Readings, read_tokens, without_memory
from longmem.generation.reading import positions
from longmem.generation.window import WindowPolicy
from longmem.server.access import Refused
from longmem.server.engine import Engine, Job, Token
from longmem.server.memories import Memories
from longmem.server.schemas import ChatRequest

ANSWER_TOKENS = (256, 1024)
"""What is left of the window, but at least and at most these: of an answer that asks for no number."""
MOST_WINDOWS = 32
"""Of a prompt: the window moves what is too long to memory, but one without end would keep the model for itself."""


@dataclass(eq=False, kw_only=True)
class Answer(Job):
    """One answer, as it grows.

    Attributes:
        number: among the answers to a request.
        pieces: spell its tokens.
        stop: words that end it, and are not part of it.
        text: so far, without what may yet turn out to be a stop word.
        finish: ``stop`` or ``length``, at the end.
        bank: the memory that is read, as it was opened last.
        read: on request, for each new token: its text, the nats that memory gained or lost it, and the chunks read.
    """

    number: int = 0
    pieces: Pieces
    stop: Sequence[str] = ()
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None
    bank: Any = None
    read: list[dict[str, Any]] = field(default_factory=list)
    _held: str = ""

    @property
    def said(self) -> Message:
        """It as a message."""
        return {"role": "assistant", "content": self.text}

    def take(self, token: Token | None) -> str:
        """The text that is certain after one more token; None: no more comes."""
        if token is None:
            self._held += self.pieces.end()
            self.finish = "length" if len(self.tokens) >= self.max_tokens else "stop"
        else:
            self.tokens.append(token)
            self._held += self.pieces.push(token.id)
        words, end = [word for word in self.stop if word], len(self._held)
        if found := [at for word in words if (at := self._held.find(word)) >= 0]:
            end, self.finish, self.left = min(found), "stop", True
        elif token is not None:  # what may be the beginning of a stop word waits
            sizes = range(1, end + 1)
            end -= max((n for n in sizes for word in words if word.startswith(self._held[-n:])), default=0)
        piece, self._held = self._held[:end], self._held[end:]
        self.text += piece
        return piece


class Service:
    """What all requests share. The arguments are those of ``create_app``."""

    def __init__(
        self, model: Any, tokenizer: Any, store: Any, keys: dict[str, str], name: str, seconds: float, **settings: int
    ) -> None:
        self.model, self.tokenizer, self.keys, self.name, self.seconds = model, tokenizer, keys, name, seconds
        self.memories, self.engine = Memories(store), Engine(model, **settings)
        self.heads_read = not getattr(model.config, "closed", False)
        ends = model.generation_config.eos_token_id
        found = [tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])]
        self.stop_ids = frozenset(int(token) for token in found if token is not None)

        self.registry = own = CollectorRegistry()
        self.requests = Counter("longmem_requests", "Requests by path and status", ["path", "status"], registry=own)
        self.produced = Counter("longmem_tokens", "Tokens generated", registry=own)
        self.written = Counter("longmem_memory_tokens", "Tokens written to memories", registry=own)
        self.first = Histogram("longmem_first_token_seconds", "Time to the first token", registry=own)
        queue = Gauge("longmem_queue", "Requests that wait for the model", registry=own)
        queue.set_function(lambda: self.engine.waiting)

    def prompt(self, messages: Sequence[Message], namespace: str | None, passages: int) -> Prompt:
        """The prompt of a conversation, with passages of its memory."""
        recall = self.memories.recall(namespace) if namespace is not None and passages else None
        return chat_prompt(self.tokenizer, messages, recall=recall, passages=passages)

    def answers(
        self, ids: list[int], body: Any, most: int | None, namespace: str | None, *, first: int = 0, chat: bool = True
    ) -> list[Answer]:
        """As many answers to a prompt as its request asks for, none of them begun; refused if it is too long.

        Args:
            most: tokens of each; None is what is left of the window, within ``ANSWER_TOKENS``.
            first: number of the first of them.
            chat: the next speaker's name ends an answer.
        """
        longest = MOST_WINDOWS * int(getattr(self.model.config, "max_position_embeddings", None) or 4096)
        if len(ids) > longest:
            said = f"the prompt has {len(ids):,} tokens, {longest:,} are the most; add the text to a memory"
            raise Refused(400, said)
        if most is None:
            most = max(ANSWER_TOKENS[0], min(ANSWER_TOKENS[1], (positions(self.model) or 0) - len(ids)))
        top = body.top_logprobs if isinstance(body, ChatRequest) else getattr(body, "logprobs", None)
        words = [*(getattr(body, "stop", None) or [])[:4], *(stop_words(self.tokenizer) if chat else ())]
        made = [
            Answer(
                number=first + index,
                ids=ids,
                max_tokens=most,
                temperature=body.temperature,
                top_p=body.top_p,
                seed=None if body.seed is None else body.seed + first + index,  # each has draws of its own
                top=top or 0,
                stop_ids=self.stop_ids,
                explain=Readings() if body.explain and namespace is not None and self.heads_read else None,
                pieces=Pieces(self.tokenizer),
                stop=words,
            )
            for index in range(getattr(body, "n", 1))
        ]
        if namespace is not None:
            for answer in made:
                answer.memory = partial(self._opened, answer, namespace)
        return made

    def _opened(self, answer: Answer, namespace: str) -> Any:
        answer.bank = self.memories.bank(namespace)
        return answer.bank if self.heads_read else None

    async def pieces(self, answers: Sequence[Answer]) -> AsyncGenerator[tuple[Answer, str, list[Token]], None]:
        """New text of the answers with the tokens that bring it, as they come; the last piece of each ends it."""
        began, fresh = time.monotonic(), {answer: list[Token]() for answer in answers}
        async with aclosing(self.engine.generate(answers)) as tokens:
            async for answer, token in tokens:
                if began:
                    self.first.observe(time.monotonic() - began)
                    began = 0.0
                piece = answer.take(token)
                if token is not None:
                    self.produced.inc()
                    fresh[answer].append(token)
                if answer.finish is not None and answer.explain is not None:
                    answer.read = await self.engine.call(partial(self._read, answer, answer.explain), follows=True)
                if piece or answer.finish is not None:
                    yield answer, piece, fresh[answer]
                    fresh[answer] = []

    def _read(self, answer: Answer, readings: list[Any]) -> list[dict[str, Any]]:
        """What each new token read, and what that did to it: one more pass, with memory off and the same window."""
        ids = torch.tensor([*answer.ids, *(token.id for token in answer.tokens)])
        policy = WindowPolicy.of(copy.copy(self.model.generation_config), self.model, answer.bank)
        without = without_memory(self.model, ids, len(answer.ids), policy).tolist()
        gains = [token.logprob - alone for token, alone in zip(answer.tokens, without, strict=True)]

        def ids_of(namespace: str | None, document: str) -> Any:  # what has left the window is in no namespace
            return None if namespace is None else self.memories.store.token_ids(namespace, document)

        new, readings = ids[len(answer.ids) :].tolist(), readings[: len(gains)]
        return [
            {"token": each.text, "gain": each.gain, "chunks": [asdict(chunk) for chunk in each.found[:3]]}
            for each in read_tokens(new, answer.ids, gains, readings, self.tokenizer, ids_of)
        ]
