"""Worker processes on this machine, each a Python of its own that loads the backbone itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any

import torch

from longmem.errors import StoreError
from longmem.store.encode import Encoder
from longmem.store.handover import Handover, Recipe
from longmem.store.pieces import Ids
from longmem.store.precision import StoredChunks
from longmem.store.serving import Dialogue, message_of, parts_of, serve
from longmem.store.workers import GO_ON, Shared

_MAIN = "import sys; from longmem.store.processes import main; main(int(sys.argv[1]))"


@dataclass(frozen=True)
class Processes:
    """``number`` processes encode: this one, and as many new ones as it takes.

    On a CPU each has its share of this one's threads; GPUs are given out in turn. A worker needs memory for the
    backbone of its own. It ends with this process, however that ends.
    """

    number: int

    def team(self, encoder: Encoder) -> Shared:
        """See ``Workers``."""
        before = torch.get_num_threads()
        threads = max(1, before // self.number)
        handover = Handover(encoder, threads=threads)
        torch.set_num_threads(threads)
        links = [_Child(each, handover) for each in range(1, self.number)]
        return Shared(links, encoder, at_close=lambda: torch.set_num_threads(before))


class PipeChannel:
    """Messages over a pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def send(self, message: object) -> None:
        """See ``Channel``."""
        parts = parts_of(message)
        self._connection.send(len(parts))
        for part in parts:
            self._connection.send_bytes(part)

    def receive(self) -> Any:
        """See ``Channel``."""
        return message_of([self._connection.recv_bytes() for _ in range(self._connection.recv())])

    def close(self) -> None:
        """Let the other side know that nothing comes any more."""
        self._connection.close()


class _Child:
    """A worker process behind a pipe."""

    def __init__(self, number: int, handover: Handover) -> None:
        self._number = number
        self._handover = handover
        self._guard = threading.Lock()
        self._stopped = False
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: PipeChannel | None = None

    def open(self) -> None:
        """See ``Link``."""
        with self._guard:
            if self._stopped:
                raise StoreError("the worker was stopped before it began")
            ours, theirs = Pipe()
            with theirs:
                self._channel = PipeChannel(ours)
                self._dialogue = Dialogue(self._channel)
                threads = str(next(self._recipes()).threads)
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _MAIN, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,  # the writer's is for its own data
                    start_new_session=True,  # Ctrl-C is for the writer, who then ends the workers
                    env={
                        **os.environ,
                        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                        "OMP_NUM_THREADS": threads,
                        "MKL_NUM_THREADS": threads,
                    },
                )
        with self._death():
            self._dialogue.load(self._recipes())

    def _recipes(self) -> Iterator[Recipe]:
        device = self._handover.device
        if device.type == "cuda":
            number = ((device.index or 0) + self._number) % torch.cuda.device_count()
            device = torch.device("cuda", number)
        return self._handover.recipes(str(device))

    def send(self, pieces: list[Ids]) -> None:
        """See ``Link``."""
        with self._death():
            self._dialogue.encode(pieces)

    def receive(self) -> tuple[int, StoredChunks] | None:
        """See ``Link``."""
        with self._death():
            return self._dialogue.piece()

    def stop(self) -> None:
        """See ``Link``; a worker owns nothing that would have to be put away."""
        with self._guard:
            self._stopped = True
            if self._process is not None:
                self._process.kill()

    def close(self) -> None:
        """See ``Link``."""
        self.stop()
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            self._process.wait()

    @contextmanager
    def _death(self) -> Iterator[None]:
        """Say how the worker ended, where that is why the pipe broke."""
        try:
            yield
        except (EOFError, OSError) as error:
            assert self._process is not None
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=10)
            status = self._process.returncode
            how = f"ended with status {status}"
            if status is not None and status < 0:
                how = f"was killed by signal {-status}"
                how += " (out of memory? fewer workers need less)" if -status == signal.SIGKILL else ""
            raise StoreError(f"worker {self._number} (process {self._process.pid}) {how}; {GO_ON}") from error


def main(handle: int) -> None:
    """What a worker process runs.

    Args:
        handle: descriptor of its end of the pipe.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # the writer has said it already
    serve(PipeChannel(Connection(handle)), gone=lambda: os._exit(1))
