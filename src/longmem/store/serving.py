"""A worker: loads the backbone that it is told, encodes what it is sent, sends back what it made.

Messages are pickled with the numbers of their arrays apart, which are not copied. They go between processes of one
user only: through a pipe to a child, or between the ranks of one torchrun.
"""

from __future__ import annotations

import pickle
import queue
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

import torch

import longmem.errors
from longmem.errors import LongMemError, StoreError
from longmem.store.encode import Encoder
from longmem.store.handover import Recipe
from longmem.store.pieces import Ids
from longmem.store.precision import StoredChunks
from longmem.store.workers import GO_ON

LOAD, READY, FAILED, ENCODE, PIECE, DONE, STOP, STOPPED, LEAVE = range(9)


class Channel(Protocol):
    """Messages to and from one other process; one thread sends, or several with a lock, and one receives."""

    def send(self, message: object) -> None:
        """Raises OSError or EOFError where the other one is gone."""
        ...

    def receive(self) -> Any:
        """Raises OSError or EOFError where the other one is gone."""
        ...


def parts_of(message: object) -> list[Any]:
    """A message as runs of bytes; the first one is its pickle without the numbers of its arrays."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    return [head, *(buffer.raw() for buffer in buffers)]


def message_of(parts: list[Any]) -> Any:
    """The inverse."""
    return pickle.loads(parts[0], buffers=parts[1:])


def serve(channel: Channel, device: str | None = None, gone: Callable[[], None] = lambda: None) -> None:
    """Be a worker until the writer lets it go, or is gone.

    Args:
        device: to encode on where the writer does so on a GPU; None is what the writer says.
        gone: called when the writer is gone, while a batch may be in work.
    """
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stop = threading.Event()

    def read() -> None:
        while True:
            try:
                message = channel.receive()
            except Exception:
                gone()
                message = (LEAVE,)
            if message[0] in (STOP, LEAVE):
                stop.set()
            inbox.put(message)
            if message[0] == LEAVE:
                return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    encoder: Encoder | None = None
    while True:
        kind, *content = inbox.get()
        try:
            if kind == LEAVE:
                break
            elif kind == LOAD:
                encoder = None  # the one before must not stay beside it
                encoder = _placed(content[0], device).encoder()
                channel.send((READY,))
            elif kind == ENCODE:
                assert encoder is not None
                for number, chunks in encoder.encode(content[0]):
                    if stop.is_set():
                        break
                    channel.send((PIECE, number, chunks))
                channel.send((DONE,))
            elif kind == STOP:
                stop.clear()
                channel.send((STOPPED,))
        except (EOFError, ConnectionError):
            break
        except Exception as error:
            with suppress(EOFError, ConnectionError):
                channel.send((FAILED, *said(error)))
    reader.join()


def _placed(recipe: Recipe, device: str | None) -> Recipe:
    on_gpu = torch.device(recipe.device).type != "cpu"
    return replace(recipe, device=device) if device is not None and on_gpu else recipe


def said(error: Exception) -> tuple[str, str]:
    """An error for the writer: the name of its class and its line."""
    line = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, LongMemError):
        return type(error).__name__, str(error)
    return "StoreError", f"a worker failed ({type(error).__name__}: {line}); {GO_ON}"


def error_of(name: str, line: str) -> LongMemError:
    """The inverse of what a worker says of an error."""
    made: LongMemError = getattr(longmem.errors, name, StoreError)(line)
    return made


class Dialogue:
    """The writer's side of ``serve``."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    def load(self, recipes: Iterable[Recipe]) -> None:
        """Have the worker load the backbone, in the first way that works.

        Raises:
            StoreError, BackboneError: none does; what the first one said.
        """
        problem: LongMemError | None = None
        for recipe in recipes:
            self.channel.send((LOAD, recipe))
            kind, *content = self.channel.receive()
            if kind == READY:
                return
            problem = problem or error_of(*content)
        raise problem or StoreError("the backbone has no name and no files that a worker could load")

    def encode(self, pieces: list[Ids]) -> None:
        """Hand a batch over."""
        self.channel.send((ENCODE, pieces))

    def piece(self) -> tuple[int, StoredChunks] | None:
        """See ``Link.receive``."""
        kind, *content = self.channel.receive()
        if kind == FAILED:
            raise error_of(*content)
        return (content[0], content[1]) if kind == PIECE else None
