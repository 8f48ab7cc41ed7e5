"""lm-evaluation-harness with memory: what its models would cut off is read into a memory, one for each request.

Needs the extra ``eval`` (lm-eval).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor

from longmem.errors import ConfigError, DataError, first_line
from longmem.evaluation.asking import Asker, Prompt, Tokens
from longmem.evaluation.results import Json, header
from longmem.progress import track


class MemoryLM(HFLM):  # type: ignore[misc]  # it is not there where types are checked
    """A model of lm-evaluation-harness whose contexts have no end.

    In the window is what the stock class would keep; what it would cut off in front of that is read, in segments of a
    window each, into a memory that belongs to this request alone. A system without memory loses it.
    """

    def __init__(self, asker: Asker) -> None:
        how = {"tokenizer": asker.tokenizer, "max_length": asker.window, "batch_size": asker.rows}
        super().__init__(pretrained=asker.model, backend="causal", **how)
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
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, by the harness's own windows; each window has all that came before it in memory."""
        prompts, texts = [], []
        for number, request in enumerate(requests):
            text = tuple(self.tok_encode(request.args[0]))
            for at in range(0, len(text), self.max_length):
                before = text[:at] or (self.prefix_token_id,)
                prompts.append(Prompt((before,), (text[at : at + self.max_length],)))
                texts.append(number)
        totals = [0.0] * len(requests)
        for at, answer in self.asker.ask(prompts):
            totals[texts[at]] += answer.scored[0].logprobs[0]
        return totals

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
    config: Json | None = None,
) -> Json:
    """Run tasks of lm-evaluation-harness on every system.

    Args:
        num_fewshot: examples before each question; None is the task's own. With memory they need not fit the window.
        limit: documents of each task, the first ones.
        include: folders with further tasks (YAML).
        resamples: of the bootstrap behind some standard errors.
        config: what else the result should say about its making.

    Returns:
        the JSON of the result file: ``header``, ``systems`` (name -> label), ``tasks`` (task -> metric -> system ->
        ``value`` and ``stderr``, None where the harness gives none), ``versions`` of the tasks.

    Raises:
        ConfigError: a task is not known.
        DataError: its data cannot be read.
    """
    began = time.monotonic()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of a model that was built before, which ours is
    manager, found, results = _manager(tasks, include), Json(), Json()
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    settings = {"tasks": list(tasks), "num_fewshot": num_fewshot, "limit": limit}
    for asker in track(askers, "lm-evaluation-harness", len(askers), "systems"):
        try:
            more: Any = {"bootstrap_iters": resamples, "task_manager": manager, "log_samples": False, **seeds}
            results = simple_evaluate(model=MemoryLM(asker), **settings, **more)
        except OSError as problem:
            raise DataError(
                f"the data of {', '.join(tasks)} cannot be read ({first_line(problem)}); connect to the hub, or name "
                "files of your own in a task of --include"
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
    return {
        "header": header(
            "harness",
            config=settings | about | (config or {}),
            models={asker.name: asker.identity for asker in askers},
            samples={name: int(of_task["effective"]) for name, of_task in results["n-samples"].items()},
            seeds=[seed],
            seconds=time.monotonic() - began,
        ),
        "systems": {asker.name: asker.label for asker in askers},
        "tasks": found,
        "versions": dict(results["versions"]),
    }


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
