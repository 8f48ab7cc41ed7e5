"""Who encodes: this process, several on this machine (``ProcessPoolExecutor``), or actors of a Ray cluster.

A worker is given the backbone as ``save_pretrained`` writes it, so that it has the writer's weights wherever they came
from; the fingerprint is compared. Batches come back in order: the store does not depend on who encoded what.
"""

from __future__ import annotations

import multiprocessing
import re
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from longmem.errors import LongMemError, StoreError
from longmem.store.disk import StoredChunks
from longmem.store.encode import Encoder, Ids, accepts
from longmem.store.records import Layout

Batch = TypeVar("Batch")
Submit = Callable[[list[Ids]], "Future[list[StoredChunks]]"]


class Team:
    """Encodes batches of pieces in order; starts when there is something to encode.

    Args:
        workers: processes on this machine, ``ray``, or ``ray:N`` for so many actors of a Ray cluster.
        encoder: gives that of this process.
        guard: held while this process encodes.

    Raises:
        StoreError: it means nothing; when started, a model that other processes cannot have, or Ray is not installed.
    """

    def __init__(self, workers: int | str, encoder: Callable[[], Encoder], guard: threading.Lock) -> None:
        self._workers, self._encoder, self._guard = workers, encoder, guard
        if not ((isinstance(workers, int) and workers > 0) or re.fullmatch(r"ray(:[1-9]\d*)?", str(workers))):
            raise StoreError(f"workers ({workers!r}) must be a number from 1 on, 'ray' or 'ray:N'")
        self._submit: Submit | None = None
        self._ahead = 0
        self._open = ExitStack()

    def encode(
        self, batches: Iterator[Batch], pieces: Callable[[Batch], list[Ids]]
    ) -> Iterator[tuple[Batch, list[StoredChunks]]]:
        """Every batch with the chunks of its pieces.

        Raises:
            StoreError: a worker failed, or was killed.
        """
        under_way: deque[tuple[Batch, Future[list[StoredChunks]] | None]] = deque()
        for batch in batches:
            ids = pieces(batch)
            under_way.append((batch, self._begin(ids) if ids else None))
            while len(under_way) > self._ahead:
                yield _awaited(*under_way.popleft())
        while under_way:
            yield _awaited(*under_way.popleft())

    def close(self) -> None:
        """End the workers."""
        self._open.close()

    def _begin(self, ids: list[Ids]) -> Future[list[StoredChunks]]:
        if self._submit is None:
            several = self._ray if isinstance(self._workers, str) else self._processes
            self._submit = (self._here if self._workers == 1 else several)(self._encoder())
        try:
            return self._submit(ids)
        except BrokenExecutor as error:
            raise StoreError(_lost(error)) from error

    def _here(self, encoder: Encoder) -> Submit:
        def submit(ids: list[Ids]) -> Future[list[StoredChunks]]:
            done: Future[list[StoredChunks]] = Future()
            with self._guard:
                done.set_result(encoder.encode(ids))
            return done

        return submit

    def _processes(self, encoder: Encoder) -> Submit:
        workers = int(self._workers)
        folder = self._open.enter_context(tempfile.TemporaryDirectory(prefix="longmem-"))
        recipe = _Recipe.of(encoder, folder, max(1, torch.get_num_threads() // workers))
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _be_worker, (recipe,))
        self._open.callback(pool.shutdown, cancel_futures=True)
        self._ahead = 2 * workers
        return lambda ids: pool.submit(_encode, ids)

    def _ray(self, encoder: Encoder) -> Submit:
        try:
            import ray
        except ImportError as error:
            raise StoreError("workers='ray' needs the ray extra: pip install 'longmem-lm[ray]'") from error
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
            self._open.callback(ray.shutdown)
        count = int(str(self._workers)[4:] or ray.cluster_resources().get("CPU", 1))
        with tempfile.TemporaryDirectory(prefix="longmem-") as folder:
            recipe = _Recipe.of(encoder, folder, 1)
            files = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
        kept = ray.put(replace(recipe, files=files))
        gpus = 1 if recipe.device == "cuda" else 0  # Ray shows each actor its own GPU as number 0
        kind = ray.remote(_Worker).options(num_cpus=1, num_gpus=gpus, max_restarts=3, max_task_retries=3)
        actors = deque(kind.remote(kept, 0) for _ in range(count))
        self._open.callback(lambda: [ray.kill(actor) for actor in actors])
        self._ahead = 2 * count

        def submit(ids: list[Ids]) -> Future[list[StoredChunks]]:
            actors.rotate(-1)
            found: Future[list[StoredChunks]] = actors[0].encode.remote(ids).future()
            return found

        return submit


def _awaited(batch: Batch, future: Future[list[StoredChunks]] | None) -> tuple[Batch, list[StoredChunks]]:
    try:
        return batch, [] if future is None else future.result()
    except LongMemError:
        raise
    except Exception as error:
        raise StoreError(_lost(error)) from error


def _lost(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[-1]
    go_on = "what has a receipt is stored; add again to go on from there"
    return f"a worker failed or was killed ({type(error).__name__}: {line:.200}); {go_on}"


@dataclass(frozen=True)
class _Recipe:
    """What a worker needs to make an encoder like the writer's; the backbone is in ``files``, else in ``folder``."""

    layout: Layout
    batch_tokens: int
    dtype: torch.dtype
    attention: str | None
    device: str
    threads: int
    folder: str
    files: dict[str, bytes] | None = None

    @classmethod
    def of(cls, encoder: Encoder, folder: str, threads: int) -> _Recipe:
        model: Any = encoder.model
        backbone: Any = getattr(getattr(model, "backbone", None), "model", None)
        if not hasattr(backbone, "save_pretrained"):
            raise StoreError(f"a {type(model).__name__} cannot be given to other processes; use workers=1")
        backbone.save_pretrained(folder)
        attention = getattr(backbone.config, "_attn_implementation", None)
        layout, device = encoder.layout, str(model.device.type)
        return cls(layout, encoder.batch_tokens, backbone.dtype, attention, device, threads, folder)

    def encoder(self, number: int) -> Encoder:
        from longmem.modeling.baselines import TrainingFree
        from longmem.modeling.loading import load_backbone

        if self.files is not None:
            with tempfile.TemporaryDirectory(prefix="longmem-") as folder:
                for name, data in self.files.items():
                    (Path(folder) / name).write_bytes(data)
                return replace(self, folder=folder, files=None).encoder(number)
        torch.set_num_threads(self.threads)
        settings = {} if self.attention is None else {"attn_implementation": self.attention}
        loaded = load_backbone(self.folder, None, self.dtype, **settings)
        model: Any = TrainingFree.from_backbone(loaded, memory_layers=self.layout.memory_layers)
        model.train(False)
        if self.device == "cuda":
            model.to(torch.device("cuda", number % torch.cuda.device_count()))
        if not accepts(model, self.layout.fingerprint):
            raise StoreError(
                f"in a worker the backbone has another fingerprint ({model.fingerprint}) than the store's "
                f"({self.layout.fingerprint}); use workers=1"
            )
        return Encoder(model, self.layout, self.batch_tokens)


class _Worker:
    """In the other process: loads at the first batch, so that an error of loading reaches the writer."""

    def __init__(self, recipe: _Recipe, number: int) -> None:
        self._recipe, self._number = recipe, number
        self._encoder: Encoder | None = None

    def encode(self, pieces: list[Ids]) -> list[StoredChunks]:
        self._encoder = self._encoder or self._recipe.encoder(self._number)
        return self._encoder.encode(pieces)


_worker: _Worker | None = None


def _be_worker(recipe: _Recipe) -> None:
    global _worker
    _worker = _Worker(recipe, multiprocessing.current_process()._identity[0])


def _encode(pieces: list[Ids]) -> list[StoredChunks]:
    assert _worker is not None
    return _worker.encode(pieces)
