"""Workers of a Ray cluster: actors that load the backbone once and encode what they are sent.

An actor that is lost Ray starts anew, and gives it what it had in hand again. Needs the extra ``ray``, and this package
on every machine of the cluster. An address comes from ``RAY_ADDRESS`` or ``ray.init`` before; without either Ray is
started on this machine, for as long as it is needed.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from longmem.errors import StoreError
from longmem.store.encode import Encoder
from longmem.store.handover import Handover, Recipe
from longmem.store.pieces import Ids
from longmem.store.precision import StoredChunks
from longmem.store.serving import error_of, said
from longmem.store.workers import GO_ON, Shared

_RESTARTS = 3


@dataclass(frozen=True)
class RayActors:
    """``number`` actors encode; None is one for every GPU, or for as many CPUs as this process has threads.

    This process only reads and writes; its own backbone serves to know that theirs is the same one.
    """

    number: int | None = None

    def team(self, encoder: Encoder) -> Shared:
        """See ``Workers``."""
        try:
            import ray as installed
        except ImportError as error:
            raise StoreError("Ray is not installed; pip install 'longmem-lm[ray]'") from error
        ray: Any = installed
        started = not ray.is_initialized()
        if started:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            try:
                ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            except Exception as error:
                line = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise StoreError(f"Ray can be neither reached nor started ({line}); see `ray status`") from error
        try:
            number, threads = self._sizes(ray.cluster_resources(), encoder.model.device)
            handover = Handover(encoder, threads=threads)
        except BaseException:
            _shut_down(ray, started)
            raise
        links = [_Actor(ray, each, handover, threads) for each in range(1, number + 1)]
        return Shared(links, None, at_close=lambda: _shut_down(ray, started))

    def _sizes(self, there: dict[str, float], device: torch.device) -> tuple[int, int]:
        """How many actors, and the threads of each."""
        gpu = device.type == "cuda"
        kind, room = ("GPUs", int(there.get("GPU", 0))) if gpu else ("CPUs", int(there.get("CPU", 0)))
        threads = torch.get_num_threads()
        number = self.number if self.number is not None else max(1, room if gpu else room // threads)
        if number > room:
            raise StoreError(
                f"{number} Ray actors need as many {kind}, the cluster has {room}; use 'ray:{max(1, room)}'"
            )
        return number, threads if gpu else min(threads, room // number)


def _shut_down(ray: Any, started: bool) -> None:
    if started:
        ray.shutdown()


class Encoding:
    """What an actor is; never raises, so that what it says comes back in one line.

    Args:
        recipe: of the backbone; Ray makes the actor again from it, should it be lost.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._encoder: Encoder | None = None
        self._problem: tuple[str, str] | None = None
        try:
            self._encoder = recipe.encoder()
        except Exception as error:
            self._problem = said(error)

    def problem(self) -> tuple[str, str] | None:
        """Why the backbone could not be loaded."""
        return self._problem

    def encode(self, pieces: list[Ids]) -> list[tuple[int, StoredChunks]] | tuple[str, str]:
        """A batch, or an error's class and line."""
        if self._encoder is None:
            assert self._problem is not None
            return self._problem
        try:
            return list(self._encoder.encode(pieces))
        except Exception as error:
            return said(error)


class _Actor:
    """A Ray actor."""

    def __init__(self, ray: Any, number: int, handover: Handover, threads: int) -> None:
        self._ray = ray
        self._number = number
        self._handover = handover
        self._threads = threads
        self._actor: Any = None
        self._recipe: Any = None
        self._futures: deque[Any] = deque()
        self._pieces: Iterator[tuple[int, StoredChunks]] | None = None

    def open(self) -> None:
        """See ``Link``."""
        gpu = self._handover.device.type == "cuda"
        needs = {"num_gpus": 1} if gpu else {"num_cpus": self._threads}
        settings = {**needs, "max_restarts": _RESTARTS, "max_task_retries": _RESTARTS}
        problem: tuple[str, str] | None = None
        for recipe in self._handover.recipes("cuda" if gpu else "cpu"):
            # files go by the object store, once a machine; held here, as an actor that is made again needs them again
            self._recipe = recipe if recipe.files is None else self._ray.put(recipe)
            self._actor = self._ray.remote(Encoding).options(**settings).remote(self._recipe)
            found = self._get(self._actor.problem.remote())
            if found is None:
                return
            problem = problem or found
            self.stop()
        assert problem is not None
        raise error_of(*problem)

    def send(self, pieces: list[Ids]) -> None:
        """See ``Link``."""
        self._futures.append(self._actor.encode.remote(pieces))

    def receive(self) -> tuple[int, StoredChunks] | None:
        """See ``Link``."""
        if self._pieces is None:
            made = self._get(self._futures.popleft())
            if isinstance(made, tuple):
                raise error_of(*made)
            self._pieces = iter(made)
        piece = next(self._pieces, None)
        if piece is None:
            self._pieces = None
        return piece

    def stop(self) -> None:
        """See ``Link``."""
        if self._actor is not None:
            with suppress(Exception):  # it may be gone
                self._ray.kill(self._actor)

    def close(self) -> None:
        """See ``Link``."""
        self.stop()

    def _get(self, future: Any) -> Any:
        try:
            return self._ray.get(future)
        except self._ray.exceptions.RayError as error:
            line = (str(error).strip().splitlines() or [""])[0]
            raise StoreError(f"Ray worker {self._number} is lost ({line}); {GO_ON}") from error
