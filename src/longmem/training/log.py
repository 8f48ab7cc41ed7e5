"""What a run tells: a line for people and a JSON record per log step; between them, progress."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, cast

from transformers import TrainerCallback

from longmem.errors import ConfigError
from longmem.progress import Progress
from longmem.progress import clock as shown
from longmem.training.recipe import Recipe
from longmem.training.trainer import Clock


class RunLog(TrainerCallback):
    """Writes ``metrics.jsonl`` and stderr; a process that is not the main one stays silent.

    ``tokens_per_step`` is of all rows and processes; ``resume`` keeps the records of the steps before.
    """

    def __init__(
        self, recipe: Recipe, tokens_per_step: int, *, resume: bool, main: bool, quiet: bool, clock: Clock
    ) -> None:
        self.recipe, self.tokens_per_step, self.clock = recipe, tokens_per_step, clock
        self.path = recipe.out_dir / "metrics.jsonl"
        self.losses: list[float] = []
        self.evaluation: dict[str, Any] = {}
        self._main, self._resume = main, resume
        self._progress = Progress(f"{recipe.task} {recipe.run.name}", unit="steps", quiet=quiet or not main)
        self._since = (0, 0.0)

        self.say = self._progress.say

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)

    def took(self) -> str:
        return shown(self.clock.seconds)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        kept = _kept_lines(self.path, state.global_step) if self._resume else []
        if self._main:
            self.path.write_text("".join(kept), encoding="utf-8")
        if self._resume:
            self.say(f"resumed at step {state.global_step:,}, {state.global_step * self.tokens_per_step:,} tokens")
        # where an evaluation was before, it is the last one still
        for line in kept:
            record = json.loads(line)
            if record["kind"] == "eval":
                self.evaluation = {k: v for k, v in record.items() if k not in ("kind", "step", "tokens")}
        self._progress.total = None if state.max_steps >= 10**9 else state.max_steps
        self._progress.done = self._progress._before = state.global_step
        self._since = (state.global_step, self.clock.seconds)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._progress.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        loss, step = logs["loss"], state.global_step
        if not math.isfinite(loss) and "practice_loss" not in logs:
            optim = self.recipe.optim
            raise ConfigError(
                f"the loss is {loss} at step {step}; lower optim.lr ({optim.lr:g}), lengthen optim.warmup "
                f"({optim.warmup:g}) or set optim.precision = 'fp32'"
            )
        self.losses.append(loss)
        steps, seconds = step - self._since[0], self.clock.seconds - self._since[1]
        self._since = (step, self.clock.seconds)
        record = {
            "kind": "train",
            "step": step,
            "tokens": step * self.tokens_per_step,
            "seconds": round(self.clock.seconds, 2),
            "loss": loss,
            "perplexity": _perplexity(loss),
            "lr": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
            "tokens_per_second": round(steps * self.tokens_per_step / max(seconds, 1e-9), 1),
            **{name: value for name, value in logs.items() if name not in ("loss", "learning_rate", "grad_norm")},
        }
        self._record(record)
        self.say(self._line(record, state.max_steps))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, Any] | None = None, **_: Any) -> None:
        self.evaluation = {name.removeprefix("eval_"): value for name, value in (metrics or {}).items()}
        step = state.global_step
        self._record({"kind": "eval", "step": step, "tokens": step * self.tokens_per_step, **self.evaluation})
        self.say(f"step {step:,} · valid · " + " · ".join(_shown(n, v) for n, v in self.evaluation.items()))

    def _line(self, record: dict[str, Any], steps: int) -> str:
        step, total = record["step"], f"/{steps:,}" if steps < 10**9 else ""
        done = max(step / steps, self.clock.done())
        left = max(0.0, self.clock.seconds / max(done, 1e-9) - self.clock.seconds)
        extra = [f"practice {record['practice_loss']:.3f}"] if "practice_loss" in record else []
        if "memory_fill" in record:
            shares = record["share"]
            extra += [f"memory {record['memory_fill']:.0%}", f"share {min(shares):.2f} to {max(shares):.2f}"]
        parts = (
            f"step {step:,}{total}", f"loss {record['loss']:.3f}", f"ppl {record['perplexity']:.2f}", *extra,
            f"lr {record['lr']:.2e}", f"grad {record['grad_norm']:.2f}", f"{record['tokens_per_second']:,.0f} tok/s",
            f"{shown(left)} left",
        )  # fmt: skip
        return " · ".join(parts)

    def _record(self, record: dict[str, Any]) -> None:
        if self._main:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def _kept_lines(path: Path, step: int) -> list[str]:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
        with suppress(ValueError, KeyError):  # a line that a crash cut in half
            if json.loads(line)["step"] <= step:
                kept.append(line)
    return kept


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0)) if math.isfinite(loss) else loss


def _shown(name: str, value: Any) -> str:
    if name.startswith("loss"):
        return f"{name} {value:.4f} (ppl {_perplexity(cast(float, value)):.3f})"
    return f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"
