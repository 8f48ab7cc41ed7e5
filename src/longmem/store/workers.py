"""Encoding with more than one process: who encodes pieces, and how they go there and come back.

``Processes`` starts workers on this machine, ``Ranks`` uses those that torchrun started (on any number of machines),
``RayActors`` those of a Ray cluster. What a piece leaves in memory depends on the piece alone (see ``encode``), so
whoever encodes it, and in whatever order, the store is the same. This process alone writes to the store.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from longmem.errors import LongMemError, StoreError
from longmem.store.encode import Encoder
from longmem.store.pieces import Ids
from longmem.store.precision import StoredChunks

AHEAD = 2
"""Batches that a worker has at most: the one that it encodes, and the next one, so that it need not wait for it."""
_KEPT = 1
"""Further batches for each worker, on their way: not taken yet, or come back and not looked at."""


class Team(Protocol):
    """Encodes batches of pieces for one writer, who names each piece by a key."""

    def submit(self, pieces: Sequence[tuple[bytes, Ids]]) -> None:
        """Hand over a batch."""
        ...

    def finished(self, *, everything: bool) -> Iterator[tuple[bytes, StoredChunks]]:
        """Pieces as they come back, in any order, until more is wanted; with ``everything`` all that were submitted.

        Raises:
            StoreError: a piece cannot be encoded, or a worker is lost.
        """
        ...

    def close(self) -> None:
        """Drop what is under way and let the workers go."""
        ...


class Workers(Protocol):
    """A way to have pieces encoded by other processes."""

    def team(self, encoder: Encoder) -> Team:
        """Workers with the backbone of this encoder."""
        ...


class Link(Protocol):
    """One worker, as a thread of the writing process sees it; each method may be called by that thread alone."""

    def open(self) -> None:
        """Wait until the worker has loaded the backbone.

        Raises:
            StoreError: it cannot.
        """
        ...

    def send(self, pieces: list[Ids]) -> None:
        """Hand a batch over; never waits for the encoding."""
        ...

    def receive(self) -> tuple[int, StoredChunks] | None:
        """The next piece of the oldest batch and its number in it; None: that was the last one.

        Raises:
            StoreError: it cannot be encoded, or the worker is lost.
        """
        ...

    def stop(self) -> None:
        """Have the worker drop what it was given; called by another thread, and never waits long."""
        ...

    def close(self) -> None:
        """Let the worker go, after whatever happened."""
        ...


class Alone:
    """The writing process by itself."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._batches: list[list[tuple[bytes, Ids]]] = []

    def submit(self, pieces: Sequence[tuple[bytes, Ids]]) -> None:
        """See ``Team``."""
        self._batches.append(list(pieces))

    def finished(self, *, everything: bool) -> Iterator[tuple[bytes, StoredChunks]]:
        """See ``Team``."""
        while self._batches:
            batch = self._batches.pop(0)
            for number, chunks in self._encoder.encode([ids for _, ids in batch]):
                yield batch[number][0], chunks

    def close(self) -> None:
        """See ``Team``."""


@dataclass
class _Batch:
    keys: list[bytes]
    pieces: list[Ids]


class Shared:
    """A team of workers behind links, with a thread for each.

    Args:
        links: to the workers, not open yet.
        own: encodes here, too, whenever nothing has come back and something waits; None leaves all to the workers.
        at_close: called in the end.
    """

    def __init__(self, links: Sequence[Link], own: Encoder | None, at_close: Callable[[], None] = lambda: None) -> None:
        self._links = links
        self._own = own
        self._at_close = at_close
        self._tasks: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[_Batch, tuple[int, StoredChunks] | None] | BaseException] = (
            queue.SimpleQueue()
        )
        self._under_way = 0
        self._room = len(links) * (AHEAD + _KEPT) + (own is not None)
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(link,), daemon=True) for link in links]
        for thread in self._threads:
            thread.start()

    def submit(self, pieces: Sequence[tuple[bytes, Ids]]) -> None:
        """See ``Team``."""
        self._under_way += 1
        self._tasks.put(_Batch([key for key, _ in pieces], [ids for _, ids in pieces]))

    def finished(self, *, everything: bool) -> Iterator[tuple[bytes, StoredChunks]]:
        """See ``Team``."""
        while self._under_way if everything else self._full():
            try:
                result = self._results.get_nowait()
            except queue.Empty:
                batch = self._take()
                if batch is not None:
                    yield from self._encode_here(batch)
                    continue
                result = self._results.get()
            if isinstance(result, BaseException):
                raise result
            batch, piece = result
            if piece is None:
                self._under_way -= 1
            else:
                yield batch.keys[piece[0]], piece[1]

    def close(self) -> None:
        """See ``Team``."""
        self._closing.set()
        while self._take(always=True) is not None:
            pass
        for link in self._links:
            self._tasks.put(None)
            link.stop()
        for thread in self._threads:
            thread.join()
        self._at_close()

    def _full(self) -> bool:
        """Whether enough was submitted for now; what nobody else has taken is for this process."""
        return self._under_way > self._room or (self._own is not None and not self._tasks.empty())

    def _take(self, *, always: bool = False) -> _Batch | None:
        if self._own is None and not always:
            return None
        try:
            return self._tasks.get_nowait()
        except queue.Empty:
            return None

    def _encode_here(self, batch: _Batch) -> Iterator[tuple[bytes, StoredChunks]]:
        assert self._own is not None
        for number, chunks in self._own.encode(batch.pieces):
            yield batch.keys[number], chunks
        self._under_way -= 1

    def _work(self, link: Link) -> None:
        """What the thread of a link does: keeps its worker busy until nothing comes any more."""
        try:
            link.open()
            given: list[_Batch] = []
            while True:
                while len(given) < AHEAD and (not given or not self._tasks.empty()):
                    batch = self._next(wait=not given)
                    if batch is None:
                        break
                    given.append(batch)
                    link.send(batch.pieces)
                if not given:
                    return
                piece = link.receive()
                self._results.put((given[0], piece))
                if piece is None:
                    given.pop(0)
        except BaseException as error:
            if not self._closing.is_set():
                self._results.put(_in_one_line(error))
        finally:
            link.close()

    def _next(self, *, wait: bool) -> _Batch | None:
        """The next batch; None in the end, or where there is none to be had without waiting."""
        try:
            batch = self._tasks.get(block=wait)
        except queue.Empty:
            return None
        if batch is None and not wait:
            self._tasks.put(None)  # what was given is received first, then this is met again
        return batch


def _in_one_line(error: BaseException) -> BaseException:
    if isinstance(error, LongMemError):
        return error
    said = (str(error).strip().splitlines() or [""])[0]
    return StoreError(f"a worker failed ({type(error).__name__}: {said}); {GO_ON}")


GO_ON = "what has a receipt is stored, the same call again goes on from there"


def team_of(workers: int | str | Workers, encoder: Encoder) -> Team:
    """Whoever encodes.

    Args:
        workers: processes that encode, this one among them; ``ray`` or ``ray:N``; ``Processes``, ``Ranks``,
            ``RayActors``.

    Raises:
        StoreError: it is none of them, or they cannot be started.
    """
    chosen = workers_from(workers)
    return Alone(encoder) if chosen is None else chosen.team(encoder)


def workers_from(workers: int | str | Workers) -> Workers | None:
    """What a setting means; None is this process alone.

    Raises:
        StoreError: it means nothing.
    """
    wanted: Any = workers
    if isinstance(wanted, str) and wanted.strip().isdigit():
        wanted = int(wanted)
    if isinstance(wanted, str):
        kind, colon, number = wanted.partition(":")
        if kind == "ray" and (not colon or (number.isdigit() and int(number) > 0)):
            from longmem.store.ray_actors import RayActors

            return RayActors(int(number) if colon else None)
    elif hasattr(wanted, "team"):
        chosen: Workers = wanted
        return chosen
    elif isinstance(wanted, int) and not isinstance(wanted, bool) and wanted >= 1:
        if wanted == 1:
            return None
        from longmem.store.processes import Processes

        return Processes(wanted)
    raise StoreError(f"workers ({workers!r}) must be a number of processes, at least 1, or 'ray' or 'ray:N'; try 2")
