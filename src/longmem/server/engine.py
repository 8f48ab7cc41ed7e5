"""One model worker: a bounded queue, small batches of rows with a memory each, and streams that never block.

All work that runs the model, generating and encoding alike, goes through one thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from longmem.types import Memory

T = TypeVar("T")
COLDEST = 1e-3
"""Temperature below which the likeliest token is taken: dividing by less overflows."""
GATHER = 0.003
"""Seconds in which one more request may come before a batch begins: requests that come together run together."""
SLICE = 256
"""Tokens after which a batch is put together anew, also where nobody waits: bounds what a long answer may reserve."""


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
        memory: opens what it reads, in the worker; None reads nothing.
        sampling: how tokens are chosen.
        stop_ids: tokens that end it.
        explain: takes what each step read, one ``Explanation`` a step, if given; such a job runs alone.
        made: new tokens so far.
        fresh: what the event loop has not been given yet.
    """

    ids: list[int]
    memory: Callable[[], Memory | None] | None
    sampling: Sampling
    stop_ids: frozenset[int]
    explain: list[Any] | None = None
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    results: asyncio.Queue[Token | BaseException | None] = field(default_factory=asyncio.Queue)
    made: list[int] = field(default_factory=list)
    fresh: list[Token | BaseException | None] = field(default_factory=list)
    cancelled: bool = False
    ended: bool = False

    def __post_init__(self) -> None:
        self._random = _generator(self.sampling.seed)

    def end(self, problem: BaseException | None = None) -> None:
        """No more tokens come."""
        if not self.ended:
            self.ended = True
            self.fresh.append(problem)

    def draw(self, logprobs: Tensor) -> int:
        """Take the next token from log probabilities (V,), and hand it over; the row may end with it."""
        token = _draw(logprobs, self.sampling, self._random)
        self.made.append(token)
        if token in self.stop_ids:
            self.end()
            return token
        top = logprobs.topk(self.sampling.logprobs) if self.sampling.logprobs else None
        likely = () if top is None else tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        self.fresh.append(Token(token, float(logprobs[token]), likely))
        if len(self.made) >= self.sampling.max_tokens:
            self.end()
        return token


def hand_over(jobs: list[Job]) -> None:
    """Give the event loop what is new of all rows at once: waking it for each token costs more than the token."""
    told = [(job.results, result) for job in jobs for result in job.fresh]
    for job in jobs:
        job.fresh = []

    def put() -> None:
        for results, result in told:
            results.put_nowait(result)

    try:
        if told:
            jobs[0].loop.call_soon_threadsafe(put)
    except RuntimeError:  # the loop has closed meanwhile and wants none
        for job in jobs:
            job.cancelled = True


class Engine:
    """The worker thread and its two queues.

    Rows run together in batches. A batch gives way when others wait and it has decoded for some multiple of the time
    that its prompts took; what it has not finished goes on behind those, from its own text, with the same draws. So
    nobody waits for another's long answer, and the prompts that are read again cost a bounded share of the time.
    Calls (writes, explanations) run between two steps, one at a time.

    Args:
        model: that generates; in eval mode.
        most_waiting: jobs and calls that may wait; one more is refused.
        rows: that run together at most.
    """

    def __init__(self, model: Any, *, most_waiting: int = 256, rows: int = 16) -> None:
        self.model, self.rows, self.most_waiting = model, rows, most_waiting
        self._jobs: deque[Job] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._change = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="longmem-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs and calls that have not begun, or have given way."""
        return len(self._jobs) + len(self._calls)

    async def generate(self, job: Job) -> AsyncGenerator[Token, None]:
        """The tokens of a job as they come; leaving the iteration cancels it.

        Raises:
            Busy: the queue is full, or the engine is closing.
        """
        self._put(self._jobs, job)
        try:
            while (result := await job.results.get()) is not None:
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:
            job.cancelled = True

    async def call(self, work: Callable[[], T], *, follows: bool = False) -> T:
        """Run something in the worker thread, between two steps. Once accepted it is done, also if the caller leaves.

        Args:
            work: what to run.
            follows: it ends a request that was accepted, and is not refused for a full queue.

        Raises:
            Busy: the queue is full, or the engine is closing.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, problem: BaseException | None) -> None:
            if not done.cancelled():
                done.set_result(result) if problem is None else done.set_exception(problem)  # type: ignore[arg-type]

        def run() -> None:
            result, problem = None, None
            try:
                result = work()
            except BaseException as raised:
                problem = raised
            with suppress(RuntimeError):  # the loop has closed meanwhile
                loop.call_soon_threadsafe(settle, result, problem)

        self._put(self._calls, run, follows)
        return await asyncio.shield(done)

    def close(self) -> None:
        """Finish what was accepted, then stop."""
        with self._change:
            self._closing = True
            self._change.notify()
        self._thread.join()

    def _put(self, where: deque[Any], what: Any, follows: bool = False) -> None:
        with self._change:  # what is put before closing is seen by the worker, what comes later is refused
            if self._closing or (self.waiting >= self.most_waiting and not follows):
                raise Busy
            where.append(what)
            self._change.notify()

    @torch.inference_mode()
    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._calls or self._jobs or self._closing)
                if not self._calls and not self._jobs:
                    return
                while not self._calls and 0 < len(self._jobs) < self.rows and self._change.wait(GATHER):
                    pass
            self.between()
            if batch := self._batch():
                self._run(batch)

    def between(self) -> None:
        """Run the call that has waited longest, if there is one."""
        if self._calls:
            self._calls.popleft()()

    def _batch(self) -> list[Job]:
        """The rows that run next, in the order they came; those that were left are passed over."""
        batch: list[Job] = []
        with self._change:
            while self._jobs and len(batch) < self.rows:
                if batch and (batch[0].explain is not None or self._jobs[0].explain is not None):
                    break
                job = self._jobs.popleft()
                if not job.cancelled:
                    batch.append(job)
        return batch

    def _run(self, batch: list[Job]) -> None:
        jobs, memories = list[Job](), list[Memory | None]()
        for job in batch:
            try:
                memories.append(None if job.memory is None else job.memory())
                jobs.append(job)
            except BaseException as problem:
                job.end(problem)
        try:
            if jobs:
                self._generate(jobs, memories)
        except BaseException as problem:
            for job in jobs:
                job.end(problem)
        hand_over(batch)
        with self._change:
            self._jobs.extend(job for job in jobs if not job.ended and not job.cancelled)

    def _generate(self, jobs: list[Job], memories: list[Memory | None]) -> None:
        texts = [[*job.ids, *job.made] for job in jobs]
        longest, device = max(map(len, texts)), self.model.device
        ids = torch.zeros(len(jobs), longest, dtype=torch.long, device=device)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, longest - len(text) :] = torch.tensor(text, device=device)
            mask[row, longest - len(text) :] = 1
        steps = _Steps(self, jobs)
        explained = {} if jobs[0].explain is None else {"explain": jobs[0].explain}
        self.model.generate(
            ids,
            attention_mask=mask,
            memory=memories if any(memory is not None for memory in memories) else None,
            max_new_tokens=min(SLICE, max(job.sampling.max_tokens - len(job.made) for job in jobs)),
            do_sample=False,
            num_beams=1,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=[steps],
            stopping_criteria=[_Ends(steps)],
            **explained,
        )

    def gives_way(self, reading: float, decoding: float, active: int) -> bool:
        """Whether a batch has run long enough for those that wait.

        Args:
            reading: seconds that its prompts took.
            decoding: seconds since.
            active: rows that go on; where there is room beside them, those that wait may come earlier.
        """
        return bool(self._jobs) and decoding >= reading * (1 if active < self.rows else 3)


class _Steps(LogitsProcessor):
    """Chooses each row's token by its own settings, and hands it over; greedy search then takes just these."""

    def __init__(self, engine: Engine, jobs: list[Job]) -> None:
        self.engine, self.jobs = engine, jobs
        self.began, self.read = time.monotonic(), 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.read = self.read or time.monotonic()
        logprobs = scores.float().log_softmax(-1)
        chosen = torch.full_like(scores, -torch.inf)
        for row, job in enumerate(self.jobs):
            chosen[row, 0 if job.ended or job.cancelled else job.draw(logprobs[row])] = 0.0
        hand_over(self.jobs)
        return chosen


class _Ends(StoppingCriteria):
    """Ends rows that have ended or were left, and all of them when others wait."""

    def __init__(self, steps: _Steps) -> None:
        self.steps = steps

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        steps = self.steps
        steps.engine.between()
        ended = [job.ended or job.cancelled for job in steps.jobs]
        if steps.engine.gives_way(steps.read - steps.began, time.monotonic() - steps.read, ended.count(False)):
            ended = [True] * len(ended)
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
    probabilities = (logprobs / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        likeliest, order = probabilities.sort(descending=True)
        # the smallest set that holds top_p: the token that crosses it belongs to it, and the likeliest always does
        beyond = likeliest.cumsum(0) - likeliest >= sampling.top_p
        beyond[0] = False
        probabilities[order[beyond]] = 0.0
    return int(torch.multinomial(probabilities.cpu(), 1, generator=random))
