"""Who is let in and what is refused: API keys, what every request meets first, and failures as answers."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
from pathlib import Path
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import Counter
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longmem.errors import ConfigError, LongMemError, StoreFull, StoreLocked

LOG = logging.getLogger(__name__)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What names of keys and memories may be: no path can be made of them."""
SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'self'; img-src data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'",
}
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "")
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "2"}, 503: {"Retry-After": "2"}}
FAILURES = (  # the first kind that fits
    (TimeoutError, 504, "this took too long and was given up; ask for fewer tokens"),
    (StoreFull, 507, "there is no room left to remember this; nothing of it was kept"),
    (StoreLocked, 503, "the memory is being written by another process; try again in a moment"),
    (LongMemError, 400, "the memory cannot do this: another text has this name already, or the text is empty"),
)


class Refused(HTTPException):
    """An answer that is an error: status, one line for the user, and the field it is about."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message, HEADERS.get(status))
        self.param, self.code = param, code


def error(problem: BaseException) -> JSONResponse:
    """A failure in the shape of the OpenAI API: one line that says nothing of paths, of other users or of the code."""
    if isinstance(problem, RequestValidationError):
        wrong = problem.errors()[0]
        where = ".".join(str(part) for part in wrong["loc"] if part != "body") or None
        problem = Refused(400, f"{where or 'body'}: {wrong['msg']}", param=where, code="invalid_value")
    elif not isinstance(problem, HTTPException):
        known = next((said for kind, *said in FAILURES if isinstance(problem, kind)), None)
        LOG.error("failed", exc_info=problem) if known is None else LOG.warning("refused: %s", problem)
        problem = Refused(*(known or (500, "something went wrong here; the server's log says what")))
    status, param, code = problem.status_code, getattr(problem, "param", None), getattr(problem, "code", None)
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    said = {"message": str(problem.detail), "type": kind, "param": param, "code": code}
    return JSONResponse({"error": said}, status, problem.headers)


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
        match = re.fullmatch(rf"({NAME.pattern})\s+([0-9a-f]{{64}})", line.strip())
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
    if NAME.fullmatch(name) is None:
        raise ConfigError(f"{name!r} is no name for a key; use letters, digits, '.', '_' and '-', at most 64")
    if file.exists() and name in read_keys(file):
        raise ConfigError(f"{file} has a key named {name}; remove its line, or choose another name")
    key = f"lm-{secrets.token_urlsafe(32)}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(mode=0o600)
    with file.open("a", encoding="utf-8") as out:
        out.write(f"{name} {hashlib.sha256(key.encode()).hexdigest()}\n")
    return key


class Limits:
    """Around the application; streams pass through it piece by piece, and a client that leaves is noticed inside.

    Args:
        most_bytes: of a body.
        anybody: no keys are asked for; then only names of this machine are answered, so that no page of another site
            can reach the server through a name of its own (DNS rebinding).
        requests: counts answers by path and status.
    """

    def __init__(self, app: ASGIApp, *, most_bytes: int, anybody: bool, requests: Counter) -> None:
        self.app, self.most_bytes, self.anybody, self.requests = app, most_bytes, anybody, requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = False

        async def answer(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                route = getattr(scope.get("route"), "path", "other")
                self.requests.labels(route, message["status"]).inc()
                if not scope["path"].startswith("/docs"):
                    MutableHeaders(scope=message).update(SECURITY)
            await send(message)

        refused = self._refused(Headers(scope=scope))
        if refused is None:
            try:
                await self.app(scope, receive, answer)
                return
            except asyncio.CancelledError:  # the server ends, and has waited long enough for this
                if begun:
                    raise
            refused = Refused(503, "the server is stopping; try again in a moment")
        await error(refused)(scope, receive, answer)

    def _refused(self, headers: Any) -> Refused | None:
        length, host = headers.get("content-length", "0"), headers.get("host", "")
        known = length.isascii() and length.isdigit() and "transfer-encoding" not in headers
        if not known or int(length) > self.most_bytes:
            return Refused(413, f"the body must say its length, and be of at most {self.most_bytes:,} bytes")
        name = host[: host.index("]") + 1] if "]" in host else host.partition(":")[0].lower()
        if self.anybody and name not in LOOPBACK:
            return Refused(403, "without keys this server answers to localhost alone; make keys to serve other names")
        return None
