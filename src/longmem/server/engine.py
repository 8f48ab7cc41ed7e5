"""What the requests share: one model worker, and the memories that it reads and writes.

All work that runs the model, generating and encoding alike, goes through one thread: a bounded queue, small batches of
rows with a memory each, and streams that never block.

A memory is the namespace ``OWNER/MEMORY`` of one store. ``namespace`` is that; ``Memories.own`` makes it of an owner
and the name that they call the memory by.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import TopPLogitsWarper

from longmem.chat import Recall
from longmem.files import write_whole
from longmem.server.requests import NAME, Refused
from longmem.store import DocumentInfo, MemoryStore, Receipt
from longmem.types import Memory

T = TypeVar("T")
J = TypeVar("J", bound="Job")
COLDEST = 1e-3
"""Temperature below which the likeliest token is taken: dividing by less overflows."""
GATHER = 0.003
"""Seconds in which one more request may come before a batch begins: requests that come together run together."""
SLICE = 256
"""Tokens after which a batch is put together anew, also where nobody waits: bounds what a long answer may reserve."""
REGISTRY = "memories.json"
"""Beside the store: when memories were made, also those that are empty."""
RESPONSES = "~responses"
"""Where a user's stored responses are kept that name no memory; no user's memory can be called so."""
OPEN_BYTES = 2 << 30
"""Of banks that are kept open; those used longest ago are closed beyond it."""
OPEN_RECALLS = 64
"""Text searches that are kept, likewise."""


class Token(NamedTuple):
    """A chosen token, its log probability in nats before temperature, and the likeliest tokens with theirs."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False, kw_only=True)
class Job:
    """A row to generate.

    Attributes:
        ids: the prompt.
        memory: opens what it reads, in the worker, each time that the row begins or goes on; None reads nothing.
        seed: of this row's own draws; None draws anew each time.
        top: how many likeliest tokens are told beside each chosen one.
        explain: takes what each step read, one ``Explanation`` a step, if given; such a job runs alone.
        made: new tokens so far.
        ended: no more tokens come.
        left: the reader wants no more of them.
        results: where the reader takes them.
    """

    ids: list[int]
    memory: Callable[[], Memory | None] | None = None
    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    top: int = 0
    stop_ids: frozenset[int] = frozenset()
    explain: list[Any] | None = None
    made: list[int] = field(default_factory=list)
    ended: bool = False
    left: bool = False
    results: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)

    def __post_init__(self) -> None:
        self.random = torch.Generator()
        self.random.seed() if self.seed is None else self.random.manual_seed(self.seed % 2**63)

    @property
    def over(self) -> bool:
        """It needs no more steps."""
        return self.ended or self.left

    def draw(self, logprobs: Tensor) -> int:
        """The next token from log probabilities (V,)."""
        if self.temperature < COLDEST:
            return int(logprobs.argmax())
        scores = logprobs / self.temperature
        if self.top_p < 1:
            scores = TopPLogitsWarper(self.top_p)(torch.empty(0), scores[None])[0]  # it looks at no text
        return int(torch.multinomial(scores.softmax(-1).cpu(), 1, generator=self.random))


class Engine:
    """The worker thread and its two queues, of jobs and of calls.

    Rows run together in batches. A batch gives way when others wait and it has decoded for some multiple of the time
    that its prompts took; what it has not finished goes on behind those, from its own text, with the same draws. So
    nobody waits for another's long answer, and the prompts that are read again cost a bounded share of the time.
    Calls (writes, explanations) run between two steps, one at a time.

    Args:
        model: that generates; in eval mode.
        most_waiting: jobs and calls that may wait; a request that comes then is refused.
        rows: that run together at most.
    """

    def __init__(self, model: Any, *, most_waiting: int = 256, rows: int = 16) -> None:
        self.model, self.rows, self.most_waiting = model, rows, most_waiting
        self._jobs: deque[Job] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._news: list[tuple[Job, Token | BaseException | None]] = []  # what readers have not been given yet
        self._loop: asyncio.AbstractEventLoop | None = None
        self._change = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="longmem-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs and calls that have not begun, or have given way."""
        return len(self._jobs) + len(self._calls)

    async def generate(self, jobs: Sequence[J]) -> AsyncGenerator[tuple[J, Token | None], None]:
        """The tokens of jobs as they come, None at the end of each; leaving the iteration gives them up.

        A job whose ``left`` is set meanwhile counts as ended. The first that fails ends all of them. They are refused
        when the queue is full or the engine is closing.
        """
        self._loop, results = asyncio.get_running_loop(), asyncio.Queue[Any]()
        for job in jobs:
            job.results = results
        try:
            self._put(self._jobs, jobs)
            while not all(job.left for job in jobs):
                job, result = await results.get()
                if isinstance(result, BaseException):
                    raise result
                if not job.left:
                    job.left = result is None
                    yield job, result
        finally:
            for job in jobs:
                job.left = True

    async def call(self, work: Callable[[], T], *, follows: bool = False) -> T:
        """Run something in the worker thread, between two steps. Once accepted it is done, also if the caller leaves.

        ``follows``: it ends a request that was accepted, and is not refused for a full queue.
        """
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as problem:
                done.set_exception(problem)

        self._put(self._calls, [run], follows)
        return await asyncio.shield(asyncio.wrap_future(done))

    def close(self) -> None:
        """Finish what was accepted, then stop."""
        with self._change:
            self._closing = True
            self._change.notify()
        self._thread.join()

    def _put(self, where: deque[Any], what: Sequence[Any], follows: bool = False) -> None:
        with self._change:  # what is put before closing is seen by the worker, what comes later is refused
            if self._closing or (self.waiting >= self.most_waiting and not follows):
                raise Refused(429, "the server is busy; try again in a moment")
            where.extend(what)
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
            self._between()
            self._run(self._batch())

    def _between(self) -> None:
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
                if not job.left:
                    batch.append(job)
        return batch

    def _run(self, batch: list[Job]) -> None:
        memories: dict[Job, Memory | None] = {}
        for job in batch:
            try:
                memories[job] = None if job.memory is None else job.memory()
            except BaseException as problem:
                self._end(job, problem)
        try:
            if memories:
                self._generate(list(memories), list(memories.values()))
        except BaseException as problem:
            for job in memories:
                self._end(job, problem)
        self._hand_over()
        with self._change:
            self._jobs.extend(job for job in memories if not job.over)

    def _generate(self, jobs: list[Job], memories: list[Memory | None]) -> None:
        device = self.model.device
        texts = [torch.tensor([*job.ids, *job.made], device=device) for job in jobs]
        ids, mask = (
            pad_sequence(each, batch_first=True, padding_side="left")
            for each in (texts, list(map(torch.ones_like, texts)))
        )
        began, read = time.monotonic(), 0.0

        def choose(_: Tensor, scores: Tensor) -> Tensor:
            """Each row's token by its own settings; greedy search then takes just these."""
            nonlocal read
            read = read or time.monotonic()
            logprobs = scores.float().log_softmax(-1)
            chosen = torch.full_like(scores, -torch.inf)
            for row, job in enumerate(jobs):
                chosen[row, 0 if job.over else self._step(job, logprobs[row])] = 0.0
            self._hand_over()
            return chosen

        def ends(*_: Any, **__: Any) -> Tensor:
            """Rows that have ended or were left; all of them when others wait."""
            self._between()
            ended = [job.over for job in jobs]
            if self.gives_way(read - began, time.monotonic() - read, ended.count(False)):
                ended = [True] * len(ended)
            return torch.tensor(ended, device=device)

        self.model.generate(
            ids,
            attention_mask=mask,
            memory=memories if any(memory is not None for memory in memories) else None,
            max_new_tokens=min(SLICE, max(job.max_tokens - len(job.made) for job in jobs)),
            do_sample=False,
            num_beams=1,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=[choose],
            stopping_criteria=[ends],
            **({} if jobs[0].explain is None else {"explain": jobs[0].explain}),
        )

    def gives_way(self, reading: float, decoding: float, active: int) -> bool:
        """Whether a batch has run long enough for those that wait: seconds of its prompts, and seconds since.

        Where there is room beside the rows that are ``active``, those that wait may come earlier.
        """
        return bool(self._jobs) and decoding >= reading * (1 if active < self.rows else 3)

    def _step(self, job: Job, logprobs: Tensor) -> int:
        """A row's next token; the row may end with it."""
        token = job.draw(logprobs)
        job.made.append(token)
        if token not in job.stop_ids:
            top = logprobs.topk(job.top)
            likely = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            self._news.append((job, Token(token, float(logprobs[token]), likely)))
        if token in job.stop_ids or len(job.made) >= job.max_tokens:
            self._end(job)
        return token

    def _end(self, job: Job, problem: BaseException | None = None) -> None:
        if not job.ended:
            job.ended = True
            self._news.append((job, problem))

    def _hand_over(self) -> None:
        """Give readers what is new of all rows at once: waking the event loop for each token costs more than it."""
        news, self._news = self._news, []

        def put() -> None:
            for job, result in news:
                job.results.put_nowait((job, result))

        if news and self._loop is not None:
            with suppress(RuntimeError):  # the loop has closed meanwhile, and wants none
                self._loop.call_soon_threadsafe(put)


class Memories:
    """The store, opened with the model and its tokenizer, and what is open of it."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self._recalls: OrderedDict[str, Recall] = OrderedDict()
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._file = Path(store.path) / REGISTRY
        self._created: dict[str, float] = json.loads(self._file.read_text()) if self._file.is_file() else {}

    def exists(self, namespace: str) -> bool:
        """Whether it was made, or holds documents."""
        return namespace in self._created or namespace in self.store.namespaces()

    def own(self, owner: str, memory: str) -> str:
        """The namespace of a memory; refused where the owner has none of this name, whether or not another has one."""
        if re.fullmatch(NAME, memory) is None or not self.exists(f"{owner}/{memory}"):
            raise Refused(404, f"you have no memory {memory[:100]!r}; make it with POST /v1/memories", code="not_found")
        return f"{owner}/{memory}"

    def create(self, owner: str, memory: str) -> str:
        """Make an empty memory, unless it is there; returns its namespace."""
        namespace = f"{owner}/{memory}"
        with self._lock:
            if self.exists(namespace):
                raise Refused(409, f"you have a memory {memory!r} already", param="id", code="exists")
            self._created[namespace] = time.time()
            self._write()
        return namespace

    def listed(self, owner: str) -> list[dict[str, Any]]:
        """The owner's memories with their sizes."""
        mine = (name for name in {*self._created, *self.store.namespaces()} if name.partition("/")[0] == owner)
        return [self.shown(namespace) for namespace in sorted(mine) if namespace != f"{owner}/{RESPONSES}"]

    def shown(self, namespace: str) -> dict[str, Any]:
        """A memory with its sizes."""
        documents = self.store.documents(namespace)
        return {
            "id": namespace.partition("/")[2],
            "object": "memory",
            "documents": len(documents),
            "tokens": sum(info.tokens for info in documents),
            "chunks": sum(info.chunks for info in documents),
            "created": int(self._created.get(namespace, min((info.added for info in documents), default=0))),
        }

    def document(self, namespace: str, name: str) -> DocumentInfo:
        """A document of a memory; refused where it has none of this name."""
        found = self.store.catalog.find(namespace, name)  # one look: it may be forgotten after it
        if found is None or found.expired(time.time()):
            said = f"no document and no response {name[:100]!r} is here; "
            way_out = "a response that named a memory is in that memory"
            raise Refused(404, said + way_out, code="not_found")
        return found

    def recall(self, namespace: str) -> Recall:
        """The text search of a memory; of the memories used last it stays open."""
        with self._lock:
            found = self._recalls.pop(namespace, None) or Recall(self.store, namespace)
            self._recalls[namespace] = found
            if len(self._recalls) > OPEN_RECALLS:
                self._recalls.popitem(last=False)
        return found

    # what runs the model or writes: called in the engine's thread only

    def bank(self, namespace: str) -> Any:
        """What the model searches; None where the memory is empty."""
        bank = self._open.pop(namespace, None)
        if namespace not in self.store.namespaces():
            return None
        bank = bank or self.store.bank(namespace)
        bank.refresh()  # what was added since
        self._open[namespace] = bank
        while len(self._open) > 1 and sum(each.nbytes for each in self._open.values()) > OPEN_BYTES:
            self._open.popitem(last=False)
        return bank

    def add(self, namespace: str, name: str, text: str, *, append: bool = False, **settings: Any) -> Receipt:
        """Add a document, or with ``append`` to one that is there; durable when this returns."""
        if append and self.store.has(namespace, name):
            return self.store.append(namespace, text, name=name)
        return self.store.add_document(namespace, text, name=name, **settings)

    def forget(self, namespace: str, document: str | None = None) -> list[DocumentInfo]:
        """Forget a document, refused where there is none, or the whole memory; returns what is gone."""
        which: Any = {"everything": True} if document is None else {"name": self.document(namespace, document).name}
        gone = self.store.forget(namespace, **which)
        with self._lock:
            self._recalls.pop(namespace, None)  # its index holds the text
            if document is None and self._created.pop(namespace, None) is not None:
                self._write()
        self._open.pop(namespace, None)
        return gone

    def _write(self) -> None:
        write_whole(self._file, [json.dumps(self._created, indent=1, sort_keys=True) + "\n"])
