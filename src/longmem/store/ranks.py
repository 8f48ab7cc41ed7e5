"""The processes that torchrun started, on one machine or several, as workers of the first one.

``torchrun --nproc-per-node 8 -m longmem memory add ...``: rank 0 reads the texts, encodes, and alone writes to the
store; the others encode and need neither the texts nor the store's folder. Pieces and chunks travel over gloo.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from longmem.errors import StoreError
from longmem.store.encode import Encoder
from longmem.store.handover import Handover
from longmem.store.pieces import Ids
from longmem.store.precision import StoredChunks
from longmem.store.serving import LEAVE, STOP, STOPPED, Dialogue, message_of, parts_of, serve
from longmem.store.workers import GO_ON, Shared

_FOREVER = timedelta(days=365)
"""A worker waits as long as the texts take to come."""


def under_torchrun() -> bool:
    """Whether torchrun started this process beside others."""
    return dist.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", "1")) > 1


class Ranks:
    """All ranks of a torchrun, one of which adds documents while the others encode for it.

    ::

        with Ranks() as ranks:
            if ranks.first:
                with MemoryStore.open("memory", model=model) as store:
                    for receipt in store.add_documents("alice", documents, workers=ranks): ...
            else:
                ranks.serve()
    """

    def __enter__(self) -> Ranks:
        self._ours = not dist.is_initialized()
        if self._ours:
            dist.init_process_group("gloo", timeout=_FOREVER)
            self._group = dist.group.WORLD
        else:
            self._group = dist.new_group(backend="gloo", timeout=_FOREVER)
        self._channels = [RankChannel(rank, self._group) for rank in range(1, dist.get_world_size())]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.first:
            for channel in self._channels:
                with suppress(EOFError):
                    channel.send((LEAVE,))
        if self._ours:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return dist.get_rank() == 0

    def serve(self) -> None:
        """Encode for rank 0 until it leaves; Ctrl-C is for rank 0."""
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            device = None
            if torch.cuda.is_available():
                device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
            serve(RankChannel(0, self._group), device)
        finally:
            signal.signal(signal.SIGINT, before)

    def team(self, encoder: Encoder) -> Shared:
        """See ``Workers``."""
        if not self.first:
            raise StoreError(f"rank {dist.get_rank()} encodes for rank 0; call ranks.serve() in it")
        handover = Handover(encoder, threads=None)
        return Shared([_Rank(channel, handover) for channel in self._channels], encoder)


class RankChannel:
    """Messages to and from one rank."""

    def __init__(self, rank: int, group: Any) -> None:
        self.rank = rank
        self._group = group
        self._sending = threading.Lock()

    def send(self, message: object) -> None:
        """See ``Channel``."""
        parts = [np.frombuffer(part, dtype=np.uint8) for part in parts_of(message)]
        with self._sending, _connection():
            self._put(np.array([len(parts)]))
            self._put(np.array([len(part) for part in parts]))
            for part in parts:
                self._put(part.copy())  # torch wants memory that could be written to

    def receive(self) -> Any:
        """See ``Channel``."""
        with _connection():
            count = self._get(1, np.int64)
            sizes = self._get(int(count[0]), np.int64)
            return message_of([self._get(int(size), np.uint8) for size in sizes])

    def _put(self, numbers: Any) -> None:
        if len(numbers):
            dist.send(torch.from_numpy(numbers), self.rank, group=self._group)

    def _get(self, size: int, kind: Any) -> Any:
        numbers = np.empty(size, dtype=kind)
        if size:
            dist.recv(torch.from_numpy(numbers), self.rank, group=self._group)
        return numbers


@contextmanager
def _connection() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise EOFError(str(error)) from error


class _Rank:
    """A rank that serves."""

    def __init__(self, channel: RankChannel, handover: Handover) -> None:
        self._channel = channel
        self._handover = handover
        self._dialogue = Dialogue(channel)

    def open(self) -> None:
        """See ``Link``."""
        with self._loss():
            self._dialogue.load(self._handover.recipes(str(self._handover.device)))

    def send(self, pieces: list[Ids]) -> None:
        """See ``Link``."""
        with self._loss():
            self._dialogue.encode(pieces)

    def receive(self) -> tuple[int, StoredChunks] | None:
        """See ``Link``."""
        with self._loss():
            return self._dialogue.piece()

    def stop(self) -> None:
        """See ``Link``."""
        with suppress(EOFError):
            self._channel.send((STOP,))

    def close(self) -> None:
        """See ``Link``; waits until the rank has nothing in hand, so that it can be used again."""
        with suppress(EOFError):
            while self._channel.receive()[0] != STOPPED:
                pass

    @contextmanager
    def _loss(self) -> Iterator[None]:
        try:
            yield
        except EOFError as error:
            raise StoreError(f"rank {self._channel.rank} is lost; {GO_ON}") from error
