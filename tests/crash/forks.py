"""Processes to be killed, cheaply: a template imports everything once, and forks a child for every trial.

``Forks`` (here) talks to the template (``python -m tests.crash.forks``) in lines of JSON. A child calls one function of
a test module, ``function(say, **arguments)``; what it says comes back, and how it ended.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIMIT = 300.0
"""Seconds of silence after which a child is taken for hung; many words may take long on a busy machine."""
Say = Callable[[Any], None]


@dataclass(frozen=True)
class Ending:
    """How a child ended.

    Attributes:
        said: in order, up to the moment of its death.
        error: name and line of the LongMemError that it ended with.
        crash: traceback of any other exception.
        signal: that killed it.
        hung: it was killed because it said nothing for too long.
        seconds: that it lived.
    """

    said: list[Any] = field(default_factory=list)
    error: tuple[str, str] | None = None
    crash: str | None = None
    signal: int | None = None
    hung: bool = False
    seconds: float = 0.0

    @property
    def fine(self) -> bool:
        """It came to its end."""
        return self.error is None and self.crash is None and self.signal is None and not self.hung

    def __str__(self) -> str:
        what = self.crash or self.error or (f"signal {self.signal}" if self.signal else "fine")
        return f"{'hung, ' if self.hung else ''}{what}; said {self.said[-5:]}"


class Forks:
    """The template, as a context manager; ``run`` forks a child of it and waits for its end."""

    def __enter__(self) -> Forks:
        self._template = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.forks"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._template.stdin is not None and self._template.stdout is not None
        self._template.kill()  # it holds nothing
        self._template.stdin.close()
        self._template.stdout.close()
        self._template.wait(timeout=LIMIT)

    def run(self, work: str, *, kill_after: float | None = None, **arguments: Any) -> Ending:
        """Call a function in a child of its own.

        Args:
            work: ``module:function``.
            kill_after: seconds from the child's first word to its SIGKILL.
            **arguments: of the function; JSON, and paths.
        """
        assert self._template.stdin is not None and self._template.stdout is not None
        request = {"work": work, "kill_after": kill_after, "arguments": arguments}
        self._template.stdin.write(json.dumps(request, default=str) + "\n")
        self._template.stdin.flush()
        answer = self._template.stdout.readline()
        assert answer, "the template process died"
        fields = json.loads(answer)
        return Ending(**{**fields, "error": tuple(fields["error"]) if fields["error"] else None})


def _serve() -> None:
    # what children write to stdout must not get between the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import tests.store.small  # noqa: F401  what every child needs
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        module, _, function = request["work"].partition(":")
        work = getattr(importlib.import_module(module), function)  # once, here: children find it imported
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            _child(work, request["arguments"], write)
        os.close(write)
        answers.write(json.dumps(_watch(child, read, request["kill_after"])) + "\n")
        answers.flush()


def _child(work: Callable[..., None], arguments: dict[str, Any], pipe: int) -> None:
    from longmem.errors import LongMemError

    def say(what: Any) -> None:
        os.write(pipe, (json.dumps(["said", what]) + "\n").encode())

    code = 1
    try:
        work(say, **arguments)
        code = 0
    except LongMemError as error:
        os.write(pipe, (json.dumps(["error", [type(error).__name__, str(error)]]) + "\n").encode())
    except BaseException:
        os.write(pipe, (json.dumps(["crash", traceback.format_exc()]) + "\n").encode())
    finally:
        os._exit(code)


def _watch(child: int, pipe: int, kill_after: float | None) -> dict[str, Any]:
    """Read what a child says until it ends, and kill it at its time."""
    begun, deadline, heard, data, hung = time.monotonic(), None, False, b"", False
    last_word = begun
    while True:
        ends = last_word + LIMIT if deadline is None else deadline
        ready, _, _ = select.select([pipe], [], [], max(0.0, ends - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            hung = deadline is None
            deadline, kill_after = time.monotonic() + LIMIT, None
            continue
        part = os.read(pipe, 1 << 16)
        if not part:
            break
        data += part
        last_word = time.monotonic()
        if kill_after is not None and not heard:
            heard, deadline = True, time.monotonic() + kill_after
    os.close(pipe)
    _, status = os.waitpid(child, 0)
    found: dict[str, Any] = {"said": [], "error": None, "crash": None}
    for line in data.decode().splitlines():
        kind, what = json.loads(line)
        if kind == "said":
            found["said"].append(what)
        else:
            found[kind] = what
    died = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    if died is None and os.WEXITSTATUS(status) and not found["error"] and not found["crash"]:
        found["crash"] = f"exit status {os.WEXITSTATUS(status)}"
    return {**found, "signal": died, "hung": hung, "seconds": time.monotonic() - begun}


if __name__ == "__main__":
    _serve()
