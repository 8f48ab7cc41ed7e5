"""One model worker: a bounded queue, small batches of rows with a memory each, and streams that never block.

All work that runs the model, generating and encoding alike, goes through one thread, in the order it came.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from longmem.types import Memory

T = TypeVar("T")
COLDEST = 1e-3
"""Temperature below which the likeliest token is taken: dividing by less overflows."""


class Busy(Exception):
    """The queue is full; try again after some seconds."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_tokens: new ones at most.
        temperature: 0 takes the likeliest.
        top_p: share of the probability from which is drawn.
        seed: of this row's own draws; None draws anew each time.
        logprobs: how many likeliest tokens are told beside each chosen one; None tells none.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None


@dataclass(frozen=True)
class Token:
    """A chosen token.

    Attributes:
        id: of it.
        logprob: its log probability in nats, before temperature.
        top: the likeliest tokens with theirs, if they were asked for.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Job:
    """A row to generate, and the queue through which its tokens come back: ``Token``, an exception, or None at its end.

    Attributes:
        ids: the prompt.
        memory: what it reads, or None.
        sampling: how tokens are chosen.
        stop_ids: tokens that end it.
        explain: takes what each step read, one ``Explanation`` a step, if given; such a job runs alone.
    """

    ids: list[int]
    memory: Memory | None
    sampling: Sampling
    stop_ids: frozenset[int]
    explain: list[Any] | None = None
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    results: asyncio.Queue[Token | BaseException | None] = field(default_factory=asyncio.Queue)
    cancelled: bool = False

    def push(self, result: Token | BaseException | None) -> None:
        """Hand a result to the event loop; one that has closed meanwhile wants none."""
        try:
            self.loop.call_soon_threadsafe(self.results.put_nowait, result)
        except RuntimeError:
            self.cancelled = True


class Engine:
    """The worker thread and its queue.

    Args:
        model: that generates; in eval mode.
        most_waiting: jobs and calls that may wait; one more is refused.
        rows: that run together at most.
    """

    def __init__(self, model: Any, *, most_waiting: int = 256, rows: int = 16) -> None:
        self.model, self.rows, self.most_waiting = model, rows, most_waiting
        self._queue: queue.Queue[Job | Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="longmem-engine", daemon=True)
        self._closing = False
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs and calls in the queue."""
        return self._queue.qsize()

    async def generate(self, job: Job) -> AsyncIterator[Token]:
        """The tokens of a job as they come; leaving the iteration cancels it.

        Raises:
            Busy: the queue is full, or the engine is closing.
        """
        self._admit()
        self._queue.put(job)
        try:
            while (result := await job.results.get()) is not None:
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:
            job.cancelled = True

    async def call(self, work: Callable[[], T]) -> T:
        """Run something in the worker thread, between two batches.

        Raises:
            Busy: the queue is full, or the engine is closing.
        """
        self._admit()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def settle(set_it: Callable[[Any], None], value: Any) -> None:
            if not done.cancelled():
                set_it(value)

        def run() -> None:
            try:
                result = work()
            except BaseException as problem:
                loop.call_soon_threadsafe(settle, done.set_exception, problem)
            else:
                loop.call_soon_threadsafe(settle, done.set_result, result)

        self._queue.put(run)
        # what has been accepted is done even if the client leaves
        return await asyncio.shield(done)

    def close(self) -> None:
        """Finish what was accepted, then stop."""
        self._closing = True
        self._queue.put(None)
        self._thread.join()

    def _admit(self) -> None:
        if self._closing or self.waiting >= self.most_waiting:
            raise Busy

    def _work(self) -> None:
        held: Job | Callable[[], None] | None = None
        while True:
            first = self._queue.get() if held is None else held
            held = None
            if first is None:
                return
            if not isinstance(first, Job):
                first()
                continue
            batch = [first]
            while len(batch) < self.rows and first.explain is None:
                try:
                    following = self._queue.get_nowait()
                except queue.Empty:
                    break
                if not isinstance(following, Job) or following.explain is not None:
                    held = following  # comes next, in its order
                    if following is None:
                        self._closing = True
                    break
                batch.append(following)
            self._run([job for job in batch if not job.cancelled])
            if held is None and self._closing and self._queue.empty():
                return

    @torch.inference_mode()
    def _run(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        try:
            longest = max(len(job.ids) for job in jobs)
            device = self.model.device
            ids = torch.zeros(len(jobs), longest, dtype=torch.long, device=device)
            mask = torch.zeros_like(ids)
            for row, job in enumerate(jobs):
                ids[row, longest - len(job.ids) :] = torch.tensor(job.ids, device=device)
                mask[row, longest - len(job.ids) :] = 1
            memories = [job.memory for job in jobs]
            steps = _Steps(jobs)
            explained = {} if jobs[0].explain is None else {"explain": jobs[0].explain}
            self.model.generate(
                ids,
                attention_mask=mask,
                memory=memories if any(memory is not None for memory in memories) else None,
                max_new_tokens=max(job.sampling.max_tokens for job in jobs),
                do_sample=False,
                num_beams=1,
                eos_token_id=None,
                pad_token_id=0,
                logits_processor=[steps],
                stopping_criteria=[_Ends(steps)],
                **explained,
            )
        except BaseException as problem:
            for job in jobs:
                job.push(problem)
        else:
            for job in jobs:
                job.push(None)


class _Steps(LogitsProcessor):
    """Chooses each row's token by its own settings, and hands it over; greedy search then takes just these."""

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = jobs
        self.given = [0] * len(jobs)
        self.ended = [False] * len(jobs)
        self.random = [_generator(job.sampling.seed) for job in jobs]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logprobs = scores.float().log_softmax(-1)
        chosen = torch.full_like(scores, -torch.inf)
        for row, job in enumerate(self.jobs):
            if self.ended[row] or job.cancelled:
                self.ended[row] = True
                chosen[row, 0] = 0.0
                continue
            token = _draw(logprobs[row], job.sampling, self.random[row])
            chosen[row, token] = 0.0
            self.given[row] += 1
            if token in job.stop_ids:
                self.ended[row] = True
                continue
            top = logprobs[row].topk(job.sampling.logprobs) if job.sampling.logprobs else None
            likely = () if top is None else tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            job.push(Token(token, float(logprobs[row, token]), likely))
            self.ended[row] = self.given[row] >= job.sampling.max_tokens
        return chosen


class _Ends(StoppingCriteria):
    def __init__(self, steps: _Steps) -> None:
        self.steps = steps

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        # a client that has left, or has seen its stop words, ends its row
        ended = [done or job.cancelled for done, job in zip(self.steps.ended, self.steps.jobs, strict=True)]
        return torch.tensor(ended, device=input_ids.device)


def _generator(seed: int | None) -> torch.Generator:
    random = torch.Generator()
    if seed is None:
        random.seed()
    else:
        random.manual_seed(seed % 2**63)
    return random


def _draw(logprobs: Tensor, sampling: Sampling, random: torch.Generator) -> int:
    """The next token of one row from log probabilities (V,)."""
    if sampling.temperature < COLDEST:
        return int(logprobs.argmax())
    probabilities, order = (logprobs / sampling.temperature).softmax(-1).sort(descending=True)
    # the smallest set that holds top_p: the token that crosses it belongs to it, and the likeliest always does
    beyond = probabilities.cumsum(0) - probabilities >= sampling.top_p
    beyond[0] = False
    probabilities[beyond] = 0.0
    return int(order[torch.multinomial(probabilities.cpu(), 1, generator=random)])
