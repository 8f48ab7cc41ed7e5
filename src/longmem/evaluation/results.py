"""What results have in common: who measured what, with which versions and machine; records; intervals."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longmem import __version__
from longmem.files import write_whole

Json = dict[str, Any]
Floats = NDArray[np.float64]
BATCH = 4_000_000  # counts of units that exist at one time


def header(
    task: str, *, config: Json, models: Json, samples: dict[str, int], seeds: Sequence[int], seconds: float = 0.0
) -> Json:
    """The part of a result that makes it repeatable.

    ``seconds`` is what was measured took; of a task that goes on from records, in all its runs together.
    """
    import torch

    versions = {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers", "numpy")}
    return {
        "task": task,
        "command": command_line(),
        "config": config,
        "models": models,
        "samples": samples,
        "seeds": list(seeds),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "longmem": __version__} | versions,
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "seconds": round(seconds, 1),
    }


def command_line() -> str:
    """The command as it was typed, the program by its name only; empty where another program calls this library."""
    program = Path(sys.argv[0])
    if program.parent.name == "benchmarks":
        words = ["python", "-m", f"benchmarks.{program.stem}"]
    elif program.name in ("longmem", "__main__.py"):
        words = ["longmem"]
    else:
        return ""
    return shlex.join([*words, *sys.argv[1:]])


def as_json(value: Any) -> Any:
    """What JSON can say: keys as strings; NaN and infinity, which JSON lacks, as null; text that UTF-8 can encode."""
    if isinstance(value, dict):
        return {as_json(str(key)): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, str):
        return value.encode(errors="replace").decode()  # a path may hold other bytes
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, record: Any) -> None:
    """A result file, see ``as_json``; complete or absent."""
    write_whole(path, [json.dumps(as_json(record), indent=1, ensure_ascii=False), "\n"])


class Ledger:
    """JSON objects, one a line, found by ``key`` (what numbers depend on besides the text) and ``digest`` (the text).

    They are kept in memory only where ``path`` is None.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.records: dict[tuple[str, str], Json] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    record = json.loads(line)
                    self.records[record["key"], record["digest"]] = record
                except (ValueError, KeyError, TypeError):
                    continue  # empty, cut short, or of another version

    def append(self, key: str, digest: str, **fields: Any) -> None:
        """Replaces what was there."""
        record = self.records[key, digest] = {"key": key, "digest": digest, **fields}
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                # the line break in front keeps a line that an interruption cut short from spoiling this one
                file.write(f"\n{json.dumps(record)}\n")


def perplexity_of(nats: float) -> float:
    """exp of nats per token, or per word; infinite where it overflows (words of text without spaces)."""
    return math.exp(nats) if not nats >= 700 else math.inf


def percent(difference: Any) -> Any:
    """How far a perplexity is from another, in % of the other, by the difference of nats per token."""
    return 100 * np.expm1(difference)


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are drawn; the seed makes them repeatable.

    U units (documents, examples, blocks) are drawn with replacement, the same ones for both systems of a difference.
    Units that are not independent, such as the chapters of one project, form groups: groups are drawn first, then units
    within each drawn group.
    """

    resamples: int = 2000
    level: float = 0.95
    seed: int = 0

    def interval(
        self,
        totals: Floats,
        counts: Floats,
        units: str,
        groups: Sequence[Hashable] | None = None,
        of: Callable[[Floats], Floats] = np.asarray,
    ) -> Json | None:
        """Percentile interval of ``of(sum totals / sum counts)``, both (U,); None with fewer than two units.

        Args:
            units: what a unit is, for the result file.
            groups: (U,), the group of each unit; None is each unit by itself.
            of: ``np.exp`` gives the interval of a perplexity, ``percent`` that of a difference.
        """
        if len(totals) < 2:
            return None
        names = range(len(totals)) if groups is None else groups
        number = {group: at for at, group in enumerate(dict.fromkeys(names))}
        draws, values = self._draws(np.array([number[name] for name in names])), np.stack([totals, counts])
        drawn = np.concatenate([of(total / count) for total, count in (values @ times.T for times in draws)])
        edge = 50 * (1 - self.level)
        low, high = np.percentile(drawn, [edge, 100 - edge]).tolist()
        about = {"level": self.level, "units": units, "count": len(totals), "resamples": self.resamples}
        return {"low": low, "high": high, **about, "seed": self.seed, "groups": len(number)}

    def _draws(self, members: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """How often each resample has each unit, (draws, U) at a time; ``members`` (U,) is each unit's group."""
        generator, sizes = np.random.default_rng(self.seed), np.bincount(members)
        step = max(1, BATCH // len(members))
        for at in range(0, self.resamples, step):
            draws = min(step, self.resamples - at)
            of_groups = generator.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=draws)
            if len(sizes) == len(members):  # every unit is a group
                yield of_groups
                continue
            times = np.empty((draws, len(members)), dtype=np.int64)
            for group, size in enumerate(sizes.tolist()):
                # a group that was drawn twice gives twice as many units
                times[:, members == group] = generator.multinomial(size * of_groups[:, group], np.full(size, 1 / size))
            yield times
