"""What requests may hold. Fields that are not known here are passed over, as the OpenAI API does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from longmem.server.keys import NAME

MemoryId = Annotated[str, StringConstraints(pattern=f"^{NAME.pattern}$")]
RESPONSE = r"^resp_[0-9a-f]{32}$"
MOST_DEPTH = 20
"""Levels of a document's metadata."""
Text = Annotated[str, StringConstraints(max_length=2_000_000)]


class Body(BaseModel):
    """Of every request."""

    model_config = ConfigDict(extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _can_be_said_again(cls, body: Any) -> Any:
        """JSON can hold half a character and, for Python, NaN: no text and no answer can."""
        try:
            if isinstance(body, dict):
                json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError):
            raise ValueError("it holds half a character (\\ud800 to \\udfff) or NaN, or nests too deep") from None
        return body


class Request(Body):
    """Of all that generates: how tokens are chosen, and which memory is read."""

    model: str | None = None
    stream: bool = False
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    memory_id: MemoryId | None = None
    remember: bool = False
    recall: int = Field(5, ge=0, le=50)
    explain: bool = False
    user: str | None = None


class StreamOptions(BaseModel):
    """``include_usage`` adds a last piece with the counts."""

    include_usage: bool = False


class Part(BaseModel):
    """A part of a message's content; only text is read."""

    type: Literal["text", "input_text", "output_text"]
    text: Text


class ChatMessage(BaseModel):
    """A message; ``developer`` is another word for ``system``."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part] | None = None

    @property
    def plain(self) -> dict[str, str]:
        """The message as ``longmem.chat`` has it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(Request):
    """``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=2000)
    max_tokens: int | None = Field(None, ge=1, le=100_000)
    max_completion_tokens: int | None = Field(None, ge=1, le=100_000)
    n: int = Field(1, ge=1, le=16)
    stop: str | list[str] | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


class CompletionRequest(Request):
    """``POST /v1/completions``."""

    prompt: Text | list[Text]
    max_tokens: int | None = Field(None, ge=1, le=100_000)
    n: int = Field(1, ge=1, le=16)
    stop: str | list[str] | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    stream_options: StreamOptions | None = None


class ResponsesRequest(Request):
    """``POST /v1/responses``."""

    input: Text | list[ChatMessage]
    instructions: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=100_000)
    previous_response_id: Annotated[str, StringConstraints(pattern=RESPONSE)] | None = None
    store: bool = True


class NewMemory(Body):
    """``POST /v1/memories``."""

    id: MemoryId


class NewText(Body):
    """``POST /v1/memories/{id}/documents``."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    text: Annotated[str, StringConstraints(min_length=1, max_length=2_000_000)]
    append: bool = False
    replace: bool = False
    metadata: dict[str, Any] | None = None

    @field_validator("name")
    @classmethod
    def _not_a_response(cls, name: str) -> str:
        if re.fullmatch(RESPONSE, name):
            raise ValueError("names of this form are those of stored responses; choose another")
        return name

    @field_validator("metadata")
    @classmethod
    def _shallow(cls, metadata: dict[str, Any] | None) -> dict[str, Any] | None:
        level: list[Any] = [metadata]
        for _ in range(MOST_DEPTH):
            level = [child for each in level for child in _children(each)]
        if level:
            raise ValueError(f"it nests deeper than {MOST_DEPTH} levels")
        return metadata


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


class SearchRequest(Body):
    """``POST /v1/memories/{id}/search``."""

    query: Annotated[str, StringConstraints(min_length=1, max_length=4000)]
    top: int = Field(10, ge=1, le=100)
