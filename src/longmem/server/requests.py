"""What requests may hold, whose key they carry, and how they are refused.

Fields that are not known here are passed over, as the OpenAI API does.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import logging
import re
import secrets
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, Field, StringConstraints, field_validator, model_validator
from starlette.exceptions import HTTPException

from longmem.data.text import TEXT_SUFFIXES, read_stream
from longmem.errors import ConfigError, DataError, LongMemError, StoreFull, StoreLocked

LOG = logging.getLogger(__name__)
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""What names of keys and memories may be: no path can be made of them."""
MemoryId = Annotated[str, StringConstraints(pattern=f"^{NAME}$")]
RESPONSE = r"^resp_[0-9a-f]{32}$"
MOST_DEPTH = 24
"""Levels of a body."""
Text = Annotated[str, StringConstraints(max_length=2_000_000)]
NonEmpty = Annotated[Text, StringConstraints(min_length=1)]
MostTokens = Annotated[int | None, Field(ge=1, le=100_000)]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Body(BaseModel):
    """Of every request."""

    @model_validator(mode="before")
    @classmethod
    def _can_be_said_again(cls, body: Any) -> Any:
        """JSON can hold half a character, for Python NaN, and nest without end: no text and no answer can."""
        level = [body]
        for _ in range(MOST_DEPTH):
            nests = [each for each in level if isinstance(each, dict | list)]
            level = [child for each in nests for child in (each.values() if isinstance(each, dict) else each)]
        try:
            if level:
                raise ValueError
            if isinstance(body, dict):  # else it is refused anyway
                json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
        except ValueError:
            said = f"it holds half a character (\\ud800 to \\udfff) or NaN, or nests deeper than {MOST_DEPTH} levels"
            raise ValueError(said) from None
        # many clients send null for what they leave open, as the OpenAI API allows
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body


class GenerationRequest(Body):
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


class ChoicesRequest(GenerationRequest):
    """Of what answers with choices; of ``stop`` the first four are used, as in the OpenAI API."""

    max_tokens: MostTokens = None
    n: int = Field(1, ge=1, le=16)
    stop: Annotated[list[str], BeforeValidator(_listed, json_schema_input_type=str | list[str])] | None = None
    stream_options: StreamOptions | None = None


class ChatRequest(ChoicesRequest):
    """``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=2000)
    max_completion_tokens: MostTokens = None
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


class CompletionRequest(ChoicesRequest):
    """``POST /v1/completions``."""

    prompt: Annotated[list[NonEmpty], BeforeValidator(_listed, json_schema_input_type=NonEmpty | list[NonEmpty])]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False

    @model_validator(mode="after")
    def _not_too_many(self) -> CompletionRequest:
        if not 0 < len(self.prompt) * self.n <= 64:
            raise ValueError("prompt must be a text, or 1 to 64 texts in all")
        return self


class ResponsesRequest(GenerationRequest):
    """``POST /v1/responses``."""

    input: Text | Annotated[list[ChatMessage], Field(min_length=1)]
    instructions: Text | None = None
    max_output_tokens: MostTokens = None
    previous_response_id: Annotated[str, StringConstraints(pattern=RESPONSE)] | None = None
    store: bool = True

    @property
    def messages(self) -> list[ChatMessage]:
        """The input as messages."""
        return [ChatMessage(role="user", content=self.input)] if isinstance(self.input, str) else self.input


class NewMemory(Body):
    """``POST /v1/memories``."""

    id: MemoryId


class NewText(Body):
    """``POST /v1/memories/{id}/documents``."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    text: NonEmpty
    append: bool = False
    replace: bool = False
    metadata: dict[str, Any] | None = None

    @field_validator("name")
    @classmethod
    def _not_a_response(cls, name: str) -> str:
        if re.fullmatch(RESPONSE, name):
            raise ValueError("names of this form are those of stored responses; choose another")
        return name


class SearchRequest(Body):
    """``POST /v1/memories/{id}/search``."""

    query: Annotated[str, StringConstraints(min_length=1, max_length=4000)]
    top: int = Field(10, ge=1, le=100)


def texts_of(filename: str, data: bytes) -> list[tuple[str, str]]:
    """Names and texts of the documents in a file that a user sent; nothing of its name becomes a path."""
    name = PurePosixPath(filename.replace("\\", "/")).name
    suffix, known = PurePosixPath(name).suffix.lower(), (*TEXT_SUFFIXES, ".jsonl")
    if suffix not in known:
        raise Refused(400, f"files of these kinds are read: {', '.join(known)}", param="file")
    name = name[:200]
    try:
        found = list(read_stream(io.BytesIO(data), name, lines=suffix == ".jsonl"))
    except DataError:
        said = "the file holds no text in UTF-8, or a line of it is no JSON object with a field text"
        raise Refused(400, said, param="file") from None
    return [(name if each.line is None else f"{name}:{each.line}", each.text) for each in found]


# keys


def read_keys(file: Path) -> dict[str, str]:
    """SHA-256 hashes of keys in hexadecimal, by their names, from a file of lines ``name hash``.

    Raises:
        ConfigError: no file, no key, or a line that is none.
    """
    if not file.is_file():
        raise ConfigError(f"{file}: there is no such file; make it with longmem serve --keys {file} --new-key NAME")
    found: dict[str, str] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(rf"({NAME})\s+([0-9a-f]{{64}})", line.strip())
        if match is None:
            raise ConfigError(f"{file}:{number}: a line is a name and a hash, as longmem serve --new-key writes it")
        found[match[1]] = match[2]
    if not found:
        raise ConfigError(f"{file}: no key in it; make one with longmem serve --keys {file} --new-key NAME")
    return found


def owner_of(keys: dict[str, str], authorization: str | None) -> str:
    """Whose key an ``Authorization: Bearer KEY`` carries; memories belong to the name of the key that made them.

    Without ``keys`` (see ``read_keys``) everybody is let in, as one owner.
    """
    if not keys:
        return "local"
    scheme, _, key = (authorization or "").partition(" ")
    given = hashlib.sha256(key.strip().encode()).hexdigest() if scheme.lower() == "bearer" else ""
    # all of them are compared, so that the time tells nothing
    found = [name for name, digest in keys.items() if hmac.compare_digest(given, digest)]
    if not found:
        raise Refused(401, "no valid API key; send Authorization: Bearer KEY", code="invalid_api_key")
    return found[0]


def new_key(file: Path, name: str) -> str:
    """Make a key, append its hash to the file, and return the key: nothing else ever shows it."""
    if re.fullmatch(NAME, name) is None:
        raise ConfigError(f"{name!r} is no name for a key; use letters, digits, '.', '_' and '-', at most 64")
    if file.exists() and name in read_keys(file):
        raise ConfigError(f"{file} has a key named {name}; remove its line, or choose another name")
    key = f"lm-{secrets.token_urlsafe(32)}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(mode=0o600)
    with file.open("a", encoding="utf-8") as out:
        out.write(f"{name} {hashlib.sha256(key.encode()).hexdigest()}\n")
    return key


# refusals

HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "2"}, 503: {"Retry-After": "2"}}
FAILURES = (  # the first kind that fits
    (TimeoutError, 504, "this took too long and was given up; ask for fewer tokens"),
    (StoreFull, 507, "there is no room left to remember this; nothing of it was kept"),
    (StoreLocked, 503, "the memory is being written by another process; try again in a moment"),
    (
        LongMemError,
        400,
        "the memory cannot do this: the text is empty, or another has its name; replace: true takes its place",
    ),
)


class Refused(HTTPException):
    """An answer that is an error: status, one line for the user, and the field it is about."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message, HEADERS.get(status))
        self.param, self.code = param, code


def error(problem: BaseException) -> JSONResponse:
    """A failure in the shape of the OpenAI API: one line that says nothing of paths, of other users or of the code."""
    if isinstance(problem, RequestValidationError):
        # of types that a value may have, the one that it went furthest with; their names are no part of the place
        wrong = max(problem.errors(), key=lambda each: len(each["loc"]))
        parts = [str(part) for part in wrong["loc"] if not re.search(r"body|constrained|\[", str(part))]
        where, said = ".".join(parts) or None, wrong["msg"]
        if wrong["type"] in ("json_invalid", "model_attributes_type"):
            where, said = None, "it must be a JSON object, sent with Content-Type: application/json"
        problem = Refused(400, f"{where or 'body'}: {said}", param=where, code="invalid_value")
    elif not isinstance(problem, HTTPException):
        known = next((said for kind, *said in FAILURES if isinstance(problem, kind)), None)
        LOG.error("failed", exc_info=problem) if known is None else LOG.warning("refused: %s", problem)
        problem = Refused(*(known or (500, "something went wrong here; the server's log says what")))
    status, param, code = problem.status_code, getattr(problem, "param", None), getattr(problem, "code", None)
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    said = {"message": str(problem.detail), "type": kind, "param": param, "code": code}
    return JSONResponse({"error": said}, status, problem.headers)
