"""lm-evaluation-harness with memory: what its models would cut off is read into a memory, one for each request.

Needs the extra ``eval`` (lm-eval). The same tasks are run on every system of a ``Comparison``, so that a number always
stands beside the backbone alone and beside the same model with memory switched off.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from lm_eval import simple_evaluate, utils
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor

from longmem.errors import ConfigError, DataError
from longmem.evaluation.asking import Asker, Prompt, Tokens, padded
from longmem.evaluation.results import Json, RunHeader
from longmem.evaluation.systems import last_logits
from longmem.progress import track


class MemoryLM(HFLM):  # type: ignore[misc]  # it is not there where types are checked
    """A model of lm-evaluation-harness whose contexts have no end.

    In the window is what the stock class would keep; what it would cut off in front of that is read, in segments of a
    window each, into a memory that belongs to this request alone. A system without memory loses it.
    """

    def __init__(self, asker: Asker) -> None:
        logger = logging.getLogger("lm_eval")
        level = logger.level
        logger.setLevel(logging.ERROR)  # it warns of a model that was built before, which ours always is
        super().__init__(
            pretrained=asker.model,
            backend="causal",
            tokenizer=asker.tokenizer,
            max_length=asker.window,
            batch_size=asker.rows,
        )
        logger.setLevel(level)
        self.asker = asker
        self._cut_off: list[Tokens] = []

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task does not say how many: at most half of the window."""
        return min(256, int(self.max_length) // 2)

    def get_model_info(self) -> dict[str, Any]:
        """Nothing of the hub: the model is no hub id."""
        return {}

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        prompts = [Prompt((tuple(context),), (tuple(continuation),)) for _, context, continuation in requests]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for number, answer in self.asker.ask(prompts):
            found[number] = (answer.scored[0].logprobs[0], answer.scored[0].greedy[0])
            if requests[number][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[number][0], found[number])
        return found

    @torch.no_grad()
    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, window by window; each window has all that came before it in memory."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        order = sorted((number for number, text in enumerate(texts) if text), key=lambda number: -len(texts[number]))
        totals = [0.0] * len(texts)
        for at in range(0, len(order), self.asker.rows):
            numbers = order[at : at + self.asker.rows]
            for number, total in zip(numbers, self._roll([texts[number] for number in numbers]), strict=True):
                totals[number] = total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _roll(self, texts: Sequence[list[int]]) -> list[float]:
        """Texts in one batch, the longest first, by the harness's own windows."""
        cut = {"prefix_token": self.prefix_token_id, "max_seq_len": self.max_length, "context_len": 1}
        windows = [
            [utils.make_disjoint_window(window) for window in utils.get_rolling_token_windows(token_list=text, **cut)]
            for text in texts
        ]
        bank = self.asker.bank(len(texts), len(texts[0]))
        totals, read, scored = [0.0] * len(texts), [0] * len(texts), [0] * len(texts)
        for step in range(len(windows[0])):
            some = {row: of_text[step] for row, of_text in enumerate(windows) if step < len(of_text)}
            if bank is not None:
                # the first context is the prefix token, which is no part of the text
                ends = {row: max(0, scored[row] - len(context)) for row, (context, _) in some.items()}
                self.asker.add(bank, {row: texts[row][read[row] : end] for row, end in ends.items()})
                for row, end in ends.items():
                    read[row] = end
                    if end and step == len(windows[row]) - 1:  # close the tail short of a chunk: nothing follows it
                        bank.end_document(torch.tensor([row]))
            reads = {} if bank is None else {"memory": bank, "memory_rows": torch.tensor(list(some))}
            ids, _ = padded([[*context, *after[:-1]] for context, after in some.values()], self.device)
            logits = last_logits(self.model, ids, ids.shape[1], **reads)
            for (row, (context, after)), of_row in zip(some.items(), logits, strict=True):
                logprobs = of_row[len(context) - 1 :][: len(after)].float().log_softmax(-1)
                targets = torch.tensor(after, device=of_row.device)
                totals[row] += logprobs.gather(1, targets[:, None]).sum().item()
                scored[row] += len(after)
        return totals

    # generation

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """As the stock class, and keeps what is cut off for ``_model_generate``."""
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        cut = max(0, ids.shape[1] - (left_truncate_len or ids.shape[1]))
        rows = zip(ids[:, :cut], mask[:, :cut].bool(), strict=True)
        self._cut_off = [tuple(row[real].tolist()) for row, real in rows]
        return ids[:, cut:], mask[:, cut:]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        cut_off, self._cut_off = self._cut_off, []
        bank = self.asker.read(cut_off) if cut_off else None
        if bank is not None:
            settings |= {"memory": bank, "memory_rows": torch.arange(len(context))}
        generated: Tensor = super()._model_generate(context, max_length, stop, **settings)
        return generated


def harness(
    askers: Sequence[Asker],
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    include: Sequence[str] = (),
    resamples: int = 1000,
    seed: int = 0,
    command: str = "",
    config: Json | None = None,
) -> Json:
    """Run tasks of lm-evaluation-harness on every system.

    Args:
        num_fewshot: examples before each question; None is the task's own. With memory they need not fit the window.
        limit: take the first so many documents of each task.
        include: folders with further tasks (YAML).
        resamples: of the bootstrap behind some standard errors.
        command: as typed, kept in the result.
        config: what else the result should say about its making.

    Returns:
        the JSON of the result file: ``header``, ``systems`` (name -> label), ``tasks`` (task -> metric -> system ->
        ``value`` and ``stderr``, None where the harness gives none), ``versions`` of the tasks.

    Raises:
        ConfigError: a task is not known.
        DataError: its data cannot be read.
    """
    began = time.monotonic()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager, found, results = _manager(tasks, include), Json(), Json()
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    settings = {"tasks": list(tasks), "num_fewshot": num_fewshot, "limit": limit}
    for asker in track(askers, "lm-evaluation-harness", len(askers), "systems"):
        try:
            more: Any = {"bootstrap_iters": resamples, "task_manager": manager, "log_samples": False, **seeds}
            results = simple_evaluate(model=MemoryLM(asker), **settings, **more)
        except OSError as problem:
            reason = (str(problem).splitlines() or [type(problem).__name__])[0]
            raise DataError(
                f"the data of {', '.join(tasks)} cannot be read ({reason}); connect to the hub, or name files of your "
                "own in a task of --include"
            ) from problem
        for task, metrics in results["results"].items():
            for metric, value in metrics.items():
                name, _, which = metric.partition(",")
                if which and not name.endswith("_stderr") and isinstance(value, int | float):
                    error = metrics.get(f"{name}_stderr,{which}")
                    shown = name if which == "none" else f"{name} ({which})"
                    score = {"value": float(value), "stderr": error if isinstance(error, int | float) else None}
                    found.setdefault(task, {}).setdefault(shown, {})[asker.name] = score
    about = {"window": askers[0].window, "rows": askers[0].rows, "include": list(include), "resamples": resamples}
    header = RunHeader(
        task="harness",
        command=command,
        config=settings | about | (config or {}),
        models={asker.name: asker.identity for asker in askers},
        samples={name: int(of_task["effective"]) for name, of_task in results["n-samples"].items()},
        seeds=[seed],
        seconds=round(time.monotonic() - began, 1),
    )
    systems = {asker.name: asker.label for asker in askers}
    return {"header": asdict(header), "systems": systems, "tasks": found, "versions": dict(results["versions"])}


def _manager(tasks: Sequence[str], include: Sequence[str]) -> TaskManager:
    """Knows the tasks asked for; the harness's thousands are only listed where they are needed."""
    for defaults in (False, True):
        if defaults or include:
            manager = TaskManager(include_path=list(include) or None, include_defaults=defaults)
            unknown = [name for name in tasks if name not in manager.all_tasks]
            if not unknown:
                return manager
    place = "lm-evaluation-harness" + (f" nor in {', '.join(include)}" if include else "")
    raise ConfigError([f"tasks ({name}) is not known to {place}; `lm-eval ls tasks` lists them" for name in unknown])
