"""Answers in the shapes of the OpenAI API, whole and as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

from longmem.chat import Message, conversation_name, keep, transcript
from longmem.server.answering import Answer, Service
from longmem.server.engine import Token
from longmem.store.recall import RecalledPassage

Pieces = AsyncIterator[tuple[Answer, str, list[Token]]]
"""Of each piece its answer, and the text and tokens that are new."""
ASKED = {"instructions", "previous_response_id", "store", "temperature", "top_p", "max_output_tokens"}
"""Fields of a request that its response repeats."""


def event(data: dict[str, Any], kind: str | None = None) -> str:
    """A server-sent event."""
    return (f"event: {kind}\n" if kind else "") + f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


@dataclass
class Exchange:
    """A request and its answers. Subclasses give them their shape: ``whole``, and piece by piece as ``events``.

    Attributes:
        place: namespace where it is kept, if it asks for that.
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

    def keep(self) -> int:
        """Remember the last message and the first answer; returns the tokens written."""
        said = [self.messages[-1], self.answers[0].said]
        return keep(self.service.memories.store, str(self.place), conversation_name(), said)

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

    async def events(self, pieces: Pieces) -> AsyncGenerator[str, None]:
        begun = set[Answer]()
        async for answer, piece, tokens in pieces:
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
        texts = [self.service.tokenizer.decode([token.id]) for token in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self.service.tokenizer.decode([n]): value for n, value in token.top} for token in tokens],
            "text_offset": list(accumulate(map(len, texts), initial=0))[:-1],
        }


class Response(Exchange):
    """``response`` of the Responses API."""

    kind = "resp_"

    def keep(self) -> int:
        """Remember the response, and what a next one needs to go on from it."""
        said = [*(message.plain for message in self.body.messages), self.answers[0].said]
        about = {"messages": [*self.messages, said[-1]], "response": self.whole()}
        return int(self.service.memories.add(str(self.place), self.id, transcript(said), metadata=about).tokens)

    def whole(self) -> dict[str, Any]:
        status = "completed" if self.answers[0].finish == "stop" else "incomplete"
        return self._shape(status, self._message("completed", self._part()))

    async def events(self, pieces: Pieces) -> AsyncGenerator[str, None]:
        count = 0

        def told(kind: str, **fields: Any) -> str:
            nonlocal count
            count += 1
            return event({"type": kind, "sequence_number": count - 1, **fields}, kind)

        place = {"item_id": self.item, "output_index": 0, "content_index": 0}
        async for _, piece, _ in pieces:
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
