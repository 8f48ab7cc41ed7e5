"""Answers that are errors: one line that tells the user what to do, and nothing of paths, other users or the code."""

from __future__ import annotations

import logging

from fastapi.responses import JSONResponse

from longmem.errors import LongMemError, StoreFull, StoreLocked
from longmem.server.engine import Busy

LOG = logging.getLogger(__name__)


class Refused(Exception):
    """An answer that is an error: status, one line for the user, and the field it is about."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def error(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    """The error in the shape of the OpenAI API."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    headers = {"Retry-After": "2"} if status in (429, 503) else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    said = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(said, status, headers)


def said_of(problem: BaseException) -> tuple[int, str]:
    """Status and line of a failure; nothing of paths, of other users or of the code."""
    if isinstance(problem, Busy):
        return 429, "the server is busy; try again in a moment"
    if isinstance(problem, TimeoutError):
        return 504, "this took too long and was given up; ask for fewer tokens"
    if isinstance(problem, StoreFull):
        return 507, "there is no room left to remember this; nothing of it was kept"
    if isinstance(problem, StoreLocked):
        return 503, "the memory is being written by another process; try again in a moment"
    if isinstance(problem, LongMemError):
        LOG.warning("refused: %s", problem)
        return 400, "the memory cannot do this: a document of this name with another text exists, or the text is empty"
    LOG.exception("failed", exc_info=problem)
    return 500, "something went wrong here; the server's log says what"
