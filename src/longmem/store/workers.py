"""Who encodes: this process, several on this machine (``ProcessPoolExecutor``), or actors of a Ray cluster.

A worker is given the backbone as ``save_pretrained`` writes it, so that it has the writer's weights wherever they came
from; that they are the same is checked by the fingerprint. Batches come back in order: the store does not depend on
who encoded what.
"""

from __future__ import annotations

import multiprocessing
import re
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from longmem.errors import LongMemError, StoreError
from longmem.store.arrays import StoredChunks
from longmem.store.encode import Encoder, accepts
from longmem.store.records import Layout
from longmem.store.tokens import Ids

Batch = TypeVar("Batch")
GO_ON = "what has a receipt is stored; add again to go on from there"


class Started(NamedTuple):
    """Workers that are ready: ``submit`` begins a batch and returns what waits for its chunks."""

    submit: Callable[[list[Ids]], Callable[[], list[StoredChunks]]]
    ahead: int  # batches that may be under way while one is awaited
    close: Callable[[], None]


class Team:
    """Encodes batches of pieces in order; starts when there is something to encode."""

    def __init__(self, start: Callable[[], Started]) -> None:
        self._start = start
        self._started: Started | None = None

    def encode(
        self, batches: Iterator[Batch], pieces: Callable[[Batch], list[Ids]]
    ) -> Iterator[tuple[Batch, list[StoredChunks]]]:
        """Every batch with the chunks of its pieces."""
        under_way: deque[tuple[Batch, Callable[[], list[StoredChunks]]]] = deque()
        for batch in batches:
            ids = pieces(batch)
            if ids and self._started is None:
                self._started = self._start()
            under_way.append((batch, self._started.submit(ids) if self._started and ids else list))
            while len(under_way) > (self._started.ahead if self._started else 0):
                first, wait = under_way.popleft()
                yield first, wait()
        for batch, wait in under_way:
            yield batch, wait()

    def close(self) -> None:
        """End the workers."""
        if self._started is not None:
            self._started.close()


@dataclass(frozen=True)
class _Recipe:
    """What a worker needs to make an encoder like the writer's; ``files`` holds the backbone, or ``folder`` does."""

    layout: Layout
    batch_tokens: int
    dtype: str
    attention: str | None
    device: str
    threads: int
    folder: str = ""
    files: dict[str, bytes] | None = None

    def encoder(self, number: int) -> Encoder:
        """Load the backbone; GPUs are taken in turn."""
        from longmem.modeling.loading import load_backbone
        from longmem.modeling.training_free import TrainingFree

        if self.files is not None:
            with tempfile.TemporaryDirectory(prefix="longmem-") as folder:
                for name, data in self.files.items():
                    (Path(folder) / name).write_bytes(data)
                return _Recipe(**{**vars(self), "folder": folder, "files": None}).encoder(number)
        torch.set_num_threads(self.threads)
        settings = {} if self.attention is None else {"attn_implementation": self.attention}
        loaded = load_backbone(self.folder, None, getattr(torch, self.dtype), **settings)
        layers = self.layout.memory_layers
        which: dict[str, Any] = {"memory_layer": layers[0]} if len(layers) == 1 else {"memory_layers": layers}
        model: Any = TrainingFree.from_backbone(loaded, **which)
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
        try:
            self._encoder = self._encoder or self._recipe.encoder(self._number)
            return self._encoder.encode(pieces)
        except LongMemError:
            raise
        except Exception as error:
            line = (str(error).splitlines() or [""])[0]
            raise StoreError(f"a worker failed ({type(error).__name__}: {line}); {GO_ON}") from None


_worker: _Worker | None = None


def _begin(recipe: _Recipe, counter: Any) -> None:
    global _worker
    with counter.get_lock():
        counter.value += 1
        _worker = _Worker(recipe, counter.value - 1)


def _encode(pieces: list[Ids]) -> list[StoredChunks]:
    assert _worker is not None
    return _worker.encode(pieces)


def team_of(workers: int | str, encoder: Callable[[], Encoder], guard: threading.Lock) -> Team:
    """The team that ``workers`` means.

    Args:
        workers: processes on this machine, ``ray``, or ``ray:N`` for so many actors of a Ray cluster.
        encoder: gives that of this process.
        guard: held while this process encodes.

    Raises:
        StoreError: it means nothing; when started, a model that other processes cannot have, or Ray is not installed.
    """
    if isinstance(workers, int) and workers > 0:
        return Team(lambda: _here(encoder(), guard) if workers == 1 else _processes(workers, encoder()))
    if isinstance(workers, str) and re.fullmatch(r"ray(:[1-9]\d*)?", workers):
        return Team(lambda: _ray(int(workers[4:] or 0), encoder()))
    raise StoreError(f"workers ({workers!r}) must be a number from 1 on, 'ray' or 'ray:N'")


def _here(encoder: Encoder, guard: threading.Lock) -> Started:
    def submit(pieces: list[Ids]) -> Callable[[], list[StoredChunks]]:
        with guard:
            made = encoder.encode(pieces)
        return lambda: made

    return Started(submit, 0, lambda: None)


def _recipe(encoder: Encoder, workers: int, folder: str) -> _Recipe:
    model: Any = encoder.model
    backbone: Any = getattr(getattr(model, "backbone", None), "model", None)
    if not hasattr(backbone, "save_pretrained"):
        raise StoreError(f"a {type(model).__name__} cannot be given to other processes; use workers=1")
    backbone.save_pretrained(folder)
    return _Recipe(
        encoder.layout,
        encoder.batch_tokens,
        str(backbone.dtype).removeprefix("torch."),
        getattr(backbone.config, "_attn_implementation", None),
        str(model.device.type),
        max(1, torch.get_num_threads() // workers),
        folder,
    )


def _processes(workers: int, encoder: Encoder) -> Started:
    folder = tempfile.TemporaryDirectory(prefix="longmem-")
    try:
        recipe = _recipe(encoder, workers, folder.name)
    except BaseException:
        folder.cleanup()
        raise
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _begin, (recipe, context.Value("i", 0)))

    def submit(pieces: list[Ids]) -> Callable[[], list[StoredChunks]]:
        try:
            future = pool.submit(_encode, pieces)
        except BrokenProcessPool as error:
            raise StoreError(f"a worker ended abruptly; {GO_ON}") from error

        def wait() -> list[StoredChunks]:
            try:
                return future.result()
            except BrokenProcessPool as error:
                raise StoreError(f"a worker ended abruptly; {GO_ON}") from error

        return wait

    def close() -> None:
        pool.shutdown(cancel_futures=True)
        folder.cleanup()

    return Started(submit, 2 * workers, close)


def _ray(count: int, encoder: Encoder) -> Started:
    try:
        import ray
    except ImportError as error:
        raise StoreError("workers='ray' needs the ray extra: pip install 'longmem-lm[ray]'") from error
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False)
    count = count or int(ray.cluster_resources().get("CPU", 1))
    with tempfile.TemporaryDirectory(prefix="longmem-") as folder:
        recipe = _recipe(encoder, 1, folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
    kept = ray.put(_Recipe(**{**vars(recipe), "files": files, "threads": 1}))
    needs = {"num_cpus": 1, "num_gpus": 1 if recipe.device == "cuda" else 0, "max_restarts": 3, "max_task_retries": 3}
    # Ray shows each actor its own GPU as number 0
    actors = deque(ray.remote(_Worker).options(**needs).remote(kept, 0) for _ in range(count))

    def submit(pieces: list[Ids]) -> Callable[[], list[StoredChunks]]:
        actors.rotate(-1)
        found = actors[0].encode.remote(pieces)

        def wait() -> list[StoredChunks]:
            try:
                return list(ray.get(found))
            except ray.exceptions.RayTaskError as error:
                raise (
                    error.cause if isinstance(error.cause, LongMemError) else StoreError(f"{error}; {GO_ON}")
                ) from None
            except ray.exceptions.RayError as error:
                raise StoreError(f"a worker of Ray was lost ({type(error).__name__}); {GO_ON}") from error

        return wait

    def close() -> None:
        for actor in actors:
            ray.kill(actor)
        if started:
            ray.shutdown()

    return Started(submit, 2 * count, close)
