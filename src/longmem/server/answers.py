"""From a request to its answers in the shapes of the OpenAI API, whole and as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from longmem.chat import Prompt, RecalledPassage, chat_prompt, conversation_name, stop_words, transcript
from longmem.config import TrainingFreeConfig, positions
from longmem.data.tokens import Message
from longmem.errors import DataError
from longmem.generation.page import Pieces, Readings, read_tokens, without_memory
from longmem.server.engine import Engine, Job, Memories, Token
from longmem.server.requests import ChatRequest, Refused
from longmem.store import Receipt

ANSWER_TOKENS = (256, 1024)
"""What is left of the window, but at least and at most these: of an answer that asks for no number."""
MOST_WINDOWS = 32
"""Of a prompt: the window moves what is too long to memory, but one without end would keep the model for itself."""
ASKED = {"instructions", "previous_response_id", "store", "temperature", "top_p", "max_output_tokens"}
"""Fields of a request that its response repeats."""


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
        self.heads_read = not (isinstance(model.config, TrainingFreeConfig) and model.config.closed)
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
        try:
            return chat_prompt(self.tokenizer, messages, recall=recall, passages=passages)
        except DataError as problem:
            raise Refused(400, str(problem)) from problem

    def answers(
        self, ids: list[int], body: Any, most: int | None, namespace: str | None, *, first: int = 0, chat: bool = True
    ) -> list[Answer]:
        """As many answers to a prompt as its request asks for, none of them begun; refused if it is too long.

        Args:
            most: tokens of each; None is what is left of the window, within ``ANSWER_TOKENS``.
            first: number of the first of them.
            chat: the next speaker's name ends an answer.
        """
        window = positions(self.model.config.backbone_config)
        longest = MOST_WINDOWS * (window or 4096)
        if len(ids) > longest:
            said = f"the prompt has {len(ids):,} tokens, {longest:,} are the most; add the text to a memory"
            raise Refused(400, said)
        if most is None:
            most = max(ANSWER_TOKENS[0], min(ANSWER_TOKENS[1], (window or 0) - len(ids)))
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

    async def add(self, namespace: str, document: dict[str, Any], *, follows: bool = False) -> Receipt:
        """Add a document, as ``Memories.add`` takes it, in a call of the engine; see ``Engine.call``."""
        receipt = await self.engine.call(partial(self.memories.add, namespace, **document), follows=follows)
        self.written.inc(receipt.tokens)
        return receipt

    def read(self, answer: Answer, readings: list[Any]) -> list[dict[str, Any]]:
        """What each new token read, and what that did to it: one more pass, with memory off and the same window."""
        ids = torch.tensor([*answer.ids, *(token.id for token in answer.tokens)])
        without = without_memory(self.model, ids, len(answer.ids), answer.bank).tolist()
        gains = [token.logprob - alone for token, alone in zip(answer.tokens, without, strict=True)]

        def ids_of(namespace: str | None, document: str) -> Any:  # what has left the window is in no namespace
            return None if namespace is None else self.memories.store.token_ids(namespace, document)

        new, readings = ids[len(answer.ids) :].tolist(), readings[: len(gains)]
        return [
            {"token": each.text, "gain": each.gain, "chunks": [asdict(chunk) for chunk in each.found[:3]]}
            for each in read_tokens(new, answer.ids, gains, readings, self.tokenizer, ids_of)
        ]


def event(data: dict[str, Any], kind: str | None = None) -> str:
    """A server-sent event."""
    return (f"event: {kind}\n" if kind else "") + f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


@dataclass
class Exchange:
    """A request and its answers. Subclasses give them their shape: ``whole``, and piece by piece as ``events``.

    Attributes:
        place: namespace of the memory; what is said becomes a document there if the request asks for it.
        recalled: passages that were put into the window.
        written: tokens that were written to memory.
    """

    service: Service
    body: Any
    answers: list[Answer]
    place: str | None
    messages: list[Message]
    recalled: Sequence[RecalledPassage] = ()
    written: int = 0
    kind: ClassVar = ""

    def __post_init__(self) -> None:
        self.id, self.created = f"{self.kind}{uuid.uuid4().hex}", int(time.time())

    async def pieces(self) -> AsyncGenerator[tuple[Answer, str, list[Token]], None]:
        """Generate: new text of the answers with the tokens that bring it, as they come.

        The last piece of each has its ``finish``. When all have ended, what was said is kept, if the request asks so.
        """
        service, began, fresh = self.service, time.monotonic(), {answer: list[Token]() for answer in self.answers}
        async with aclosing(service.engine.generate(self.answers)) as tokens:
            async for answer, token in tokens:
                if began:
                    service.first.observe(time.monotonic() - began)
                    began = 0.0
                piece = answer.take(token)
                if token is not None:
                    service.produced.inc()
                    fresh[answer].append(token)
                if answer.finish is not None and answer.explain is not None:
                    work = partial(service.read, answer, answer.explain)
                    answer.read = await service.engine.call(work, follows=True)
                if piece or answer.finish is not None:
                    yield answer, piece, fresh[answer]
                    fresh[answer] = []
        if getattr(self.body, "store", self.body.remember):  # a response is kept unless it asks for none
            receipt = await service.add(str(self.place), self.document(), follows=True)
            self.written = receipt.tokens

    def document(self) -> dict[str, Any]:
        """What is kept: the last message and the first answer."""
        return {"name": conversation_name(), "text": transcript([self.messages[-1], self.answers[0].said])}

    def usage(self) -> dict[str, Any]:
        """Counts of all answers together."""
        n = getattr(self.body, "n", 1)  # answers to one prompt, which is read once
        prompt = sum(len(answer.ids) for answer in self.answers[::n])
        made = sum(len(answer.tokens) for answer in self.answers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "memory_tokens_read": max(0 if each.bank is None else int(each.bank.tokens.sum()) for each in self.answers),
            "memory_tokens_written": self.written,
        }

    def read(self) -> dict[str, Any]:
        """What was read, on request."""
        passages = [vars(passage) for passage in self.recalled]
        tokens = [answer.read for answer in self.answers]
        return {"memory": {"passages": passages, "tokens": tokens}} if self.body.explain else {}


class Chat(Exchange):
    """``chat.completion``."""

    kind, whole_object, part_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def whole(self) -> dict[str, Any]:
        choices = [self._choice(answer, self.text(answer), answer.tokens) for answer in self.answers]
        return self._shape(self.whole_object, choices, self.usage())

    async def events(self) -> AsyncGenerator[str, None]:
        begun = set[Answer]()
        async for answer, piece, tokens in self.pieces():
            text = self.part(answer, piece, first=answer not in begun)
            begun.add(answer)
            yield event(self._shape(self.part_object, [self._choice(answer, text, tokens)]))
        options = self.body.stream_options
        if self.body.explain or (options is not None and options.include_usage):
            yield event(self._shape(self.part_object, [], self.usage()))
        yield "data: [DONE]\n\n"

    def text(self, answer: Answer) -> dict[str, Any]:
        """The field with a whole text."""
        return {"message": {**answer.said, "refusal": None}}

    def part(self, answer: Answer, piece: str, *, first: bool) -> dict[str, Any]:
        """The field with a piece of it."""
        return {"delta": {"role": "assistant", "content": piece} if first else {"content": piece}}

    def logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        """Of some tokens; None if they were not asked for."""
        if not self.body.logprobs:
            return None

        def shown(number: int, logprob: float) -> dict[str, Any]:
            text = self.service.tokenizer.decode([number])
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        content = [
            {**shown(token.id, token.logprob), "top_logprobs": [shown(*each) for each in token.top]} for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _choice(self, answer: Answer, text: dict[str, Any], tokens: list[Token]) -> dict[str, Any]:
        return {"index": answer.number, **text, "logprobs": self.logprobs(tokens), "finish_reason": answer.finish}

    def _shape(self, kind: str, choices: list[Any], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.service.name, "choices": choices}
        return head if usage is None else {**head, "usage": usage, **self.read()}


class Completion(Chat):
    """``text_completion``: the same with other fields."""

    kind, whole_object, part_object = "cmpl-", "text_completion", "text_completion"

    def text(self, answer: Answer) -> dict[str, Any]:
        return self.part(answer, answer.text, first=True)

    def part(self, answer: Answer, piece: str, *, first: bool) -> dict[str, Any]:
        echo = self.body.prompt[answer.number // self.body.n] if first and self.body.echo else ""
        return {"text": echo + piece}

    def logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        return {
            "tokens": [self.service.tokenizer.decode([token.id]) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self.service.tokenizer.decode([n]): value for n, value in token.top} for token in tokens],
        }


class ModelResponse(Exchange):
    """``response`` of the Responses API."""

    kind = "resp_"

    def document(self) -> dict[str, Any]:
        """The new messages and the answer, and what a next response needs to go on from it."""
        said = [*(message.plain for message in self.body.messages), self.answers[0].said]
        about = {"messages": [*self.messages, said[-1]], "response": self.whole()}
        return {"name": self.id, "text": transcript(said), "metadata": about}

    def whole(self) -> dict[str, Any]:
        status = "completed" if self.answers[0].finish == "stop" else "incomplete"
        return self._shape(status, self._message("completed", self._part()))

    async def events(self) -> AsyncGenerator[str, None]:
        count = 0

        def told(kind: str, **fields: Any) -> str:
            nonlocal count
            count += 1
            return event({"type": kind, "sequence_number": count - 1, **fields}, kind)

        place = {"item_id": self.item, "output_index": 0, "content_index": 0}
        async for _, piece, _ in self.pieces():
            if not count:
                yield told("response.created", response=self._shape("in_progress"))
                yield told("response.in_progress", response=self._shape("in_progress"))
                yield told("response.output_item.added", output_index=0, item=self._message("in_progress"))
                yield told("response.content_part.added", **place, part={**self._part(), "text": ""})
            if piece:
                yield told("response.output_text.delta", **place, delta=piece, logprobs=[])
        yield told("response.output_text.done", **place, text=self.answers[0].text, logprobs=[])
        yield told("response.content_part.done", **place, part=self._part())
        yield told("response.output_item.done", output_index=0, item=self._message("completed", self._part()))
        final = self.whole()
        yield told(f"response.{final['status']}", response=final)

    def usage(self) -> dict[str, Any]:
        found = super().usage()
        return {
            "input_tokens": found.pop("prompt_tokens"),
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": found.pop("completion_tokens"),
            "output_tokens_details": {"reasoning_tokens": 0},
            **found,
        }

    @property
    def item(self) -> str:
        """The id of the message."""
        return self.id.replace(self.kind, "msg_")

    def _part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.answers[0].text, "annotations": []}

    def _message(self, status: str, *content: dict[str, Any]) -> dict[str, Any]:
        return {"id": self.item, "type": "message", "role": "assistant", "status": status, "content": list(content)}

    def _shape(self, status: str, *output: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": self.service.name,
            "output": list(output),
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            **self.body.model_dump(include=ASKED),
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "metadata": {},
            "usage": self.usage() if output else None,
            **(self.read() if output else {}),
        }
