"""lm-evaluation-harness with memory: what its models would cut off is read into a memory, one for each request.

Needs the extra ``eval`` (lm-eval). The same tasks are run on every system of a ``Comparison``, so that a number always
stands beside the backbone alone and beside the same model with memory switched off.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval import simple_evaluate, utils
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor

from longmem.errors import ConfigError, DataError
from longmem.evaluation.requests import Question, Reader
from longmem.evaluation.results import RunHeader
from longmem.evaluation.systems import Comparison, System

log = logging.getLogger(__name__)


class MemoryLM(HFLM):  # type: ignore[misc]  # it is not there where types are checked
    """A model of lm-evaluation-harness whose contexts have no end.

    In the window is what the stock class would keep; what it would cut off in front of that is read, in segments of a
    window each, into a memory that belongs to this request alone. With ``memory_size=None``, or a model that has no
    memory, it is cut off.

    Args:
        model: a ``LongMem``, another model with memory, or any causal language model.
        tokenizer: its tokenizer.
        window: tokens that the model sees at once.
        memory_size: tokens that each request remembers; None is no memory.
        batch_size: requests side by side.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, window: int, memory_size: int | None, batch_size: int = 8
    ) -> None:
        with _quiet():
            super().__init__(
                pretrained=model, backend="causal", tokenizer=tokenizer, max_length=window, batch_size=batch_size
            )
        self.reader = Reader(model, window, batch_size, memory_size, self.device)
        self._cut_off: list[list[int]] = []

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task does not say how many: at most half of the window."""
        return min(256, int(self.max_length) // 2)

    def get_model_info(self) -> dict[str, Any]:
        """The model is no hub id."""
        return {"model_num_parameters": sum(p.numel() for p in self.model.parameters())}

    # log-likelihoods

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        texts: dict[Any, list[Question]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise ConfigError(
                    f"a continuation of {len(continuation)} tokens does not fit the window ({self.max_length}); "
                    "pass a larger --window"
                )
            question = Question.of(number, [*context, *continuation], len(continuation), self.max_length)
            # choices of one context share its memory; without memory, each is a text of its own
            shared = tuple(question.before) if self.reader.memory_size is not None else ()
            texts.setdefault(shared or number, []).append(question)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for answer in self.reader.answer(list(texts.values())):
            found[answer.number] = (answer.logprob, answer.greedy)
            if requests[answer.number][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[answer.number][0], found[answer.number])
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, window by window; each window has all that lay before it in memory."""
        totals = [0.0] * len(requests)
        texts = [self._rolling(number, self.tok_encode(request.args[0])) for number, request in enumerate(requests)]
        for answer in self.reader.answer([text for text in texts if text]):
            totals[answer.number] += answer.logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _rolling(self, number: int, tokens: list[int]) -> list[Question]:
        """The harness's own windows over a text, which begin one after the other."""
        windows = utils.get_rolling_token_windows(
            token_list=tokens, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
        )
        questions, scored = [], 0
        for context, continuation in map(utils.make_disjoint_window, windows):
            # the first context is the prefix token, which is no part of the text
            before = tokens[: max(0, scored - len(context))]
            questions.append(Question(number, before, [*context, *continuation[:-1]], continuation))
            scored += len(continuation)
        return questions

    # generation

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """As ever, and keeps what is cut off for ``_model_generate``."""
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        cut = max(0, ids.shape[1] - (left_truncate_len or ids.shape[1]))
        rows = zip(ids[:, :cut], mask[:, :cut].bool(), strict=True)
        self._cut_off = [row[real].tolist() for row, real in rows]
        return ids[:, cut:], mask[:, cut:]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        cut_off, self._cut_off = self._cut_off, []
        self.reader.open(max(map(len, cut_off), default=0))
        if self.reader.bank is not None:
            self.reader.read(list(enumerate(cut_off)))
            self.reader.bank.end_document()
            settings |= {"memory": self.reader.bank, "memory_rows": torch.arange(len(context))}
        generated: Tensor = super()._model_generate(context, max_length, stop, **settings)
        return generated


@dataclass(frozen=True)
class HarnessResult:
    """What ``longmem eval harness`` writes as JSON.

    Attributes:
        systems: name -> label.
        tasks: task -> metric -> system -> ``value`` and ``stderr`` (None where the harness gives none).
        versions: of the tasks.
    """

    header: RunHeader
    systems: dict[str, str]
    tasks: dict[str, dict[str, dict[str, dict[str, float | None]]]]
    versions: dict[str, Any]


def harness(
    comparison: Comparison,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    window: int,
    rows: int = 8,
    num_fewshot: int | None = None,
    limit: int | None = None,
    include: Sequence[str] = (),
    resamples: int = 1000,
    seed: int = 0,
    command: str = "",
    config: dict[str, Any] | None = None,
) -> HarnessResult:
    """Run tasks of lm-evaluation-harness on every system.

    Args:
        comparison: see ``load_comparison``.
        tokenizer: of all systems.
        tasks: names as the harness knows them, or of ``include``.
        window: tokens that a model sees at once.
        rows: requests side by side.
        num_fewshot: examples before each question; None is the task's own. With memory they need not fit the window.
        limit: take the first so many documents of each task.
        include: folders with further tasks (YAML).
        resamples: of the bootstrap behind some standard errors.
        seed: of the choice of examples.
        command: as typed, kept in the result.
        config: what else the result should say about its making.

    Raises:
        ConfigError: a task is not known.
        DataError: its data cannot be read.
    """
    began = time.monotonic()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager(tasks, include)
    found: dict[str, dict[str, dict[str, dict[str, float | None]]]] = {}
    versions: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for system in comparison.systems:
        log.info("%s: %s", system.name, ", ".join(tasks))
        try:
            results: Any = simple_evaluate(
                model=_model(system, comparison, tokenizer, window, rows),
                tasks=list(tasks),
                num_fewshot=num_fewshot,
                limit=limit,
                bootstrap_iters=resamples,
                task_manager=manager,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except OSError as problem:
            reason = (str(problem).splitlines() or [type(problem).__name__])[0]
            raise DataError(
                f"the data of {', '.join(tasks)} cannot be read ({reason}); connect to the hub, or name files of your "
                "own in a task of --include"
            ) from problem
        versions = dict(results["versions"])
        counts = {name: int(of_task["effective"]) for name, of_task in results["n-samples"].items()}
        for task, metrics in results["results"].items():
            for metric, value in metrics.items():
                name, _, which = metric.partition(",")
                if not which or name.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                error = metrics.get(f"{name}_stderr,{which}")
                shown = name if which == "none" else f"{name} ({which})"
                score = {"value": float(value), "stderr": error if isinstance(error, int | float) else None}
                found.setdefault(task, {}).setdefault(shown, {})[system.name] = score
    settings = {"tasks": list(tasks), "window": window, "rows": rows, "num_fewshot": num_fewshot, "limit": limit}
    return HarnessResult(
        header=RunHeader(
            task="harness",
            command=command,
            config=settings | {"include": list(include), "resamples": resamples} | (config or {}),
            models={system.name: system.identity for system in comparison.systems},
            samples=counts,
            seeds=[seed],
            seconds=round(time.monotonic() - began, 1),
        ),
        systems={system.name: system.label for system in comparison.systems},
        tasks=found,
        versions=versions,
    )


def _model(system: System, comparison: Comparison, tokenizer: Any, window: int, rows: int) -> MemoryLM:
    model: Any = comparison.model if system.reader is None else system.reader
    return MemoryLM(model, tokenizer, window=window, memory_size=system.memory_size, batch_size=rows)


def _manager(tasks: Sequence[str], include: Sequence[str]) -> TaskManager:
    """Knows the tasks asked for; the harness's thousands are only listed where they are needed."""
    for defaults in (False, True):
        if defaults or include:
            manager = TaskManager(include_path=list(include) or None, include_defaults=defaults)
            unknown = [name for name in tasks if name not in manager.all_tasks]
            if not unknown:
                return manager
    where = f" nor in {', '.join(include)}" if include else ""
    raise ConfigError(
        [
            f"tasks ({name}) is not known to lm-evaluation-harness{where}; `lm-eval ls tasks` lists them"
            for name in unknown
        ]
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """While open, the harness does not warn of a model that was built already: ours always is."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
