"""What every request meets first: the size of its body, the host it asks for; and what every answer carries."""

from __future__ import annotations

import asyncio
from typing import Any

from prometheus_client import Counter
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longmem.server.refusals import error

SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'self'; img-src data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'",
}
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "")


class Limits:
    """Around the application; streams pass through it piece by piece, and a client that leaves is noticed inside.

    Args:
        app: what is protected.
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

        headers: Any = Headers(scope=scope)
        length = headers.get("content-length", "0")
        if (
            not (length.isascii() and length.isdigit())
            or int(length) > self.most_bytes
            or "transfer-encoding" in headers
        ):
            refusal = error(413, f"the body must say its length, and be of at most {self.most_bytes:,} bytes")
        elif self.anybody and _name(headers.get("host", "")) not in LOOPBACK:
            refusal = error(403, "without keys this server answers to localhost alone; make keys to serve other names")
        else:
            try:
                await self.app(scope, receive, answer)
                return
            except asyncio.CancelledError:  # the server ends, and has waited long enough for this
                if begun:
                    raise
            refusal = error(503, "the server is stopping; try again in a moment")
        await refusal(scope, receive, answer)


def _name(host: str) -> str:
    """A host without its port."""
    return host[: host.index("]") + 1] if "]" in host else host.partition(":")[0].lower()
