"""Answers in the shapes of the OpenAI API, whole and as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from itertools import accumulate
from typing import Any

from longmem.server.answering import Answer
from longmem.server.engine import Sampling, Token
from longmem.server.schemas import ChatRequest, CompletionRequest, ResponsesRequest

Piece = tuple[int, str, list[Token], Answer]
"""Number of the answer, the text and tokens that are new, the answer so far."""


class Rendering:
    """Collects pieces; subclasses give them their shape.

    Attributes:
        written: tokens that this exchange wrote to memory.
    """

    kind = ""

    def __init__(self, body: Any, model: str, sources: Sequence[dict[str, Any]] = ()) -> None:
        self.body, self.model, self.sources = body, model, list(sources)
        self.id = f"{self.kind}{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.answers: dict[int, Answer] = {}
        self.tokens: dict[int, list[Token]] = {}
        self.written = 0

    def take(self, index: int, piece: str, tokens: list[Token], answer: Answer) -> None:
        """One more piece."""
        self.answers[index] = answer
        self.tokens.setdefault(index, []).extend(tokens)

    def text(self, index: int = 0) -> str:
        """Of an answer so far."""
        return self.answers[index].text if index in self.answers else ""

    def usage(self) -> dict[str, Any]:
        """Counts of all answers together."""
        n = getattr(self.body, "n", 1)  # answers to one prompt, which is read once
        prompt = sum(answer.prompt_tokens for index, answer in self.answers.items() if index % n == 0)
        made = sum(len(answer.tokens) for answer in self.answers.values())
        read = max((answer.memory_tokens for answer in self.answers.values()), default=0)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "memory_tokens_read": read,
            "memory_tokens_written": self.written,
        }

    def read(self) -> dict[str, Any]:
        """What was read, on request."""
        if not self.body.explain:
            return {}
        tokens = [answer.read for _, answer in sorted(self.answers.items())]
        return {"memory": {"passages": self.sources, "tokens": tokens}}

    def whole(self) -> dict[str, Any]:
        """The answer at once."""
        raise NotImplementedError

    def events(self, pieces: AsyncIterator[Piece]) -> AsyncGenerator[str, None]:
        """The answer piece by piece."""
        raise NotImplementedError

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


class Chat(Rendering):
    """``chat.completion``."""

    kind = "chatcmpl-"

    def __init__(self, body: ChatRequest, model: str, tokenizer: Any, sources: Sequence[dict[str, Any]]) -> None:
        super().__init__(body, model, sources)
        self.tokenizer = tokenizer

    def whole(self) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": self._logprobs(self.tokens[index]),
                "finish_reason": answer.finish,
            }
            for index, answer in sorted(self.answers.items())
        ]
        return {**self.head("chat.completion"), "choices": choices, "usage": self.usage(), **self.read()}

    async def events(self, pieces: AsyncIterator[Piece]) -> AsyncGenerator[str, None]:
        head, begun = self.head("chat.completion.chunk"), set[int]()
        async for index, piece, tokens, answer in pieces:
            self.take(index, piece, tokens, answer)
            delta = {"content": piece} if index in begun else {"role": "assistant", "content": piece}
            begun.add(index)
            choice = {"index": index, "delta": delta, "logprobs": self._logprobs(tokens), "finish_reason": None}
            yield event({**head, "choices": [choice]})
            if answer.finish is not None:
                choice = {"index": index, "delta": {}, "logprobs": None, "finish_reason": answer.finish}
                yield event({**head, "choices": [choice]})
        options = self.body.stream_options
        if self.body.explain or (options is not None and options.include_usage):
            yield event({**head, "choices": [], "usage": self.usage(), **self.read()})
        yield DONE

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        return {"content": [self._token(token) for token in tokens], "refusal": None}

    def _token(self, token: Token) -> dict[str, Any]:
        def shown(number: int, logprob: float) -> dict[str, Any]:
            text = self.tokenizer.decode([number])
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        top = token.top[: self.body.top_logprobs or 0]
        return {**shown(token.id, token.logprob), "top_logprobs": [shown(*each) for each in top]}


class Completion(Rendering):
    """``text_completion``."""

    kind = "cmpl-"

    def __init__(self, body: CompletionRequest, model: str, tokenizer: Any, prompts: list[str]) -> None:
        super().__init__(body, model)
        self.tokenizer, self.prompts = tokenizer, prompts

    def whole(self) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "text": self._echo(index) + answer.text,
                "logprobs": self._logprobs(self.tokens[index]),
                "finish_reason": answer.finish,
            }
            for index, answer in sorted(self.answers.items())
        ]
        return {**self.head("text_completion"), "choices": choices, "usage": self.usage(), **self.read()}

    async def events(self, pieces: AsyncIterator[Piece]) -> AsyncGenerator[str, None]:
        head, begun = self.head("text_completion"), set[int]()
        async for index, piece, tokens, answer in pieces:
            self.take(index, piece, tokens, answer)
            text = piece if index in begun else self._echo(index) + piece
            begun.add(index)
            choice = {"index": index, "text": text, "logprobs": self._logprobs(tokens), "finish_reason": answer.finish}
            yield event({**head, "choices": [choice]})
        options = self.body.stream_options
        if self.body.explain or (options is not None and options.include_usage):
            yield event({**head, "choices": [], "usage": self.usage(), **self.read()})
        yield DONE

    def _echo(self, index: int) -> str:
        return self.prompts[index // self.body.n] if self.body.echo else ""

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        texts = [self.tokenizer.decode([token.id]) for token in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self.tokenizer.decode([n]): value for n, value in token.top} for token in tokens],
            "text_offset": list(accumulate(map(len, texts), initial=0))[:-1],
        }


class Response(Rendering):
    """``response`` of the Responses API."""

    kind = "resp_"

    def __init__(self, body: ResponsesRequest, model: str, sources: Sequence[dict[str, Any]]) -> None:
        super().__init__(body, model, sources)
        self.item = f"msg_{uuid.uuid4().hex}"

    def whole(self) -> dict[str, Any]:
        return self._shape("completed" if self._finish() == "stop" else "incomplete", self._message("completed"))

    async def events(self, pieces: AsyncIterator[Piece]) -> AsyncGenerator[str, None]:
        count = 0

        def told(kind: str, **fields: Any) -> str:
            nonlocal count
            count += 1
            return event({"type": kind, "sequence_number": count - 1, **fields}, kind)

        place = {"item_id": self.item, "output_index": 0, "content_index": 0}
        part = {"type": "output_text", "text": "", "annotations": []}
        yield told("response.created", response=self._shape("in_progress"))
        yield told("response.in_progress", response=self._shape("in_progress"))
        yield told("response.output_item.added", output_index=0, item=self._message("in_progress", empty=True))
        yield told("response.content_part.added", **place, part=part)
        async for index, piece, tokens, answer in pieces:
            self.take(index, piece, tokens, answer)
            if piece:
                yield told("response.output_text.delta", **place, delta=piece, logprobs=[])
        text = self.text()
        yield told("response.output_text.done", **place, text=text, logprobs=[])
        yield told("response.content_part.done", **place, part={**part, "text": text})
        yield told("response.output_item.done", output_index=0, item=self._message("completed"))
        final = self.whole()
        yield told(f"response.{final['status']}", response=final)

    def usage(self) -> dict[str, Any]:
        found = super().usage()
        return {
            "input_tokens": found["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": found["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": found["total_tokens"],
            "memory_tokens_read": found["memory_tokens_read"],
            "memory_tokens_written": self.written,
        }

    def _finish(self) -> str | None:
        return self.answers[0].finish if self.answers else None

    def _message(self, status: str, empty: bool = False) -> dict[str, Any]:
        content = [] if empty else [{"type": "output_text", "text": self.text(), "annotations": []}]
        return {"id": self.item, "type": "message", "role": "assistant", "status": status, "content": content}

    def _shape(self, status: str, *output: dict[str, Any]) -> dict[str, Any]:
        body = self.body
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": self.model,
            "output": list(output),
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "previous_response_id": body.previous_response_id,
            "store": body.store,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "max_output_tokens": body.max_output_tokens,
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "metadata": {},
            "usage": self.usage() if output else None,
            **(self.read() if output else {}),
        }


KEPT = ("messages", "response")
"""Metadata of stored responses, which no list of documents shows."""
DONE = "data: [DONE]\n\n"


def event(data: dict[str, Any], kind: str | None = None) -> str:
    """A server-sent event."""
    return (f"event: {kind}\n" if kind else "") + f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def line(data: dict[str, Any]) -> str:
    """A line of JSON lines."""
    return json.dumps(data, ensure_ascii=False) + "\n"


def sampling(body: Any, most: int, index: int) -> Sampling:
    """The settings of the index-th answer to a request: each has draws of its own."""
    asked = getattr(body, "logprobs", None)
    likely = asked if isinstance(asked, int) and not isinstance(asked, bool) else getattr(body, "top_logprobs", None)
    seed = None if body.seed is None else body.seed + index
    return Sampling(most, body.temperature, body.top_p, seed, likely)


def stops(stop: str | list[str] | None) -> list[str]:
    """Stop words as a list, four at most as in the OpenAI API."""
    return [stop] if isinstance(stop, str) else list(stop or [])[:4]


def model_card(name: str) -> dict[str, Any]:
    """A model in a list of models."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "longmem"}


def document_card(info: Any) -> dict[str, Any]:
    """A document without its text."""
    return {
        "object": "document",
        "name": info.name,
        "tokens": info.tokens,
        "chunks": info.chunks,
        "added": info.added,
        "revision": info.revision,
        "metadata": {key: value for key, value in info.metadata.items() if key not in KEPT},
    }
