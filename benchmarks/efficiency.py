"""Time and memory against the length of the context: LongMem, full attention of its backbone, and the window alone.

Usage: python -m benchmarks.efficiency --random hidden=512,layers=12,heads=8,vocab=8192 --contexts 1024,4096,16384
       python -m benchmarks.efficiency --model runs/sidenet --device cuda --dtype bfloat16 --out results/efficiency-gpu

All systems read the same tokens in one process and in turn, the order reversed from round to round, so that a busy
machine slows all alike; all go through transformers' ``generate``. Full attention is given what serves it best: fused
kernels (SDPA), a key/value cache that is made once, logits of the last position. The paper compares with attention that
is not fused. Peak memory is that of a process of its own for each point on the CPU, of the allocator on a GPU.
Writes ``efficiency.json``. What the backbone's positions do not reach, and what would take longer than ``--budget``, is
left out, and the result says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from longmem import LongMem
from longmem.evaluation.results import as_json, header, write_json
from longmem.evaluation.tables import plain, tables_of
from longmem.modeling.checkpoints import checked_device, checkpoint_folder
from longmem.modeling.loading import named_dtype
from longmem.progress import track

LONGMEM, FULL, WINDOWED = "longmem", "full", "windowed"
LABELS = {
    LONGMEM: "LongMem, context beyond the window in memory",
    FULL: "full attention (SDPA, key/value cache)",
    WINDOWED: "backbone alone, the window only",
}
SHAPE = {"hidden": 512, "layers": 12, "heads": 8, "kv_heads": 0, "vocab": 8192,
         "chunk_size": 4, "num_retrieved": 64, "memory_size": 65536}  # fmt: skip
LONGEST_DEFAULT_WINDOW = 1024  # the paper's

Spread = dict[str, float]


@dataclass(frozen=True)
class Settings:
    """What is measured; also the job of a child process.

    Attributes:
        model: a checkpoint; empty for a backbone of random weights: how long a step takes does not depend on them.
        shape: of that backbone, a part of ``SHAPE``.
        contexts: lengths in tokens; those beyond the window are rounded to whole moves of it.
        window: tokens that LongMem attends to; 0 is the backbone's positions, at most 1,024.
        new_tokens: generated after each context.
        repeats: rounds, fewer where the budget ends.
        budget: seconds for the rounds of one context.
        memory: measure peak memory too.
    """

    model: str = ""
    shape: dict[str, int] | None = None
    contexts: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    window: int = 0
    memory_size: int = 0
    new_tokens: int = 32
    repeats: int = 3
    budget: float = 600.0
    systems: Sequence[str] = (LONGMEM, FULL, WINDOWED)
    memory: bool = True
    device: str = "cpu"
    dtype: str = "auto"
    seed: int = 0


def load(settings: Settings) -> LongMem:
    """The model, on its device, in eval mode."""
    device = checked_device(settings.device)
    dtype = named_dtype(settings.dtype)
    if settings.model:
        said = "no LongMem checkpoint; LongMem is compared with its own backbone"
        main = LongMem.from_pretrained(checkpoint_folder(settings.model, "longmem", said))
        return main.to(device=device, dtype=dtype).eval()
    shape = SHAPE | (settings.shape or {})
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=64 * round(shape["hidden"] * 8 / 3 / 64) or 64,
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"] or shape["heads"],
        max_position_embeddings=1 << 21,
        pad_token_id=0,
        eos_token_id=None,
    )
    backbone: Any = LlamaForCausalLM(config)
    backbone.to(dtype or torch.float32)
    memory: dict[str, Any] = {name: shape[name] for name in ("chunk_size", "num_retrieved", "memory_size")}
    model: Any = LongMem.from_backbone(backbone, **memory)
    placed: LongMem = model.to(device).eval()
    return placed


def sizes(model: LongMem, settings: Settings) -> tuple[int, int, int]:
    """Window, tokens that move to memory when it is full, most tokens in memory."""
    positions = getattr(model.backbone.model.config.get_text_config(), "max_position_embeddings", None)
    window = settings.window or min(positions or LONGEST_DEFAULT_WINDOW, LONGEST_DEFAULT_WINDOW)
    chunk = model.config.chunk_size
    return window, max(chunk, window // 2 // chunk * chunk), settings.memory_size or model.config.memory_size


@dataclass(frozen=True)
class Timeline:
    """Seconds until the first new token, and between each and the next; in which of the gaps text moved to memory."""

    first: float
    gaps: tuple[float, ...]
    moved: tuple[bool, ...]

    @property
    def plain(self) -> float:
        """Seconds of a token while nothing moves: the median."""
        still = [gap for gap, moved in zip(self.gaps, self.moved, strict=True) if not moved]
        return statistics.median(still or self.gaps)

    @property
    def moving(self) -> float | None:
        """What a move adds to the token it falls on; None where none fell into the run."""
        found = [gap for gap, moved in zip(self.gaps, self.moved, strict=True) if moved]
        return max(0.0, sum(found) / len(found) - self.plain) if found else None

    def each(self, move: int) -> float:
        """Seconds of a token with its share of the moves, one of which falls on every ``move`` tokens."""
        return self.plain + (self.moving or 0.0) / move


@torch.no_grad()
def run(model: LongMem, system: str, context: int, settings: Settings) -> Timeline:
    """Read a context of made-up tokens and generate after it, greedily."""
    window, move, memory_size = sizes(model, settings)
    inner: Any = model.backbone.model
    vocabulary, draw = int(inner.config.get_text_config().vocab_size), torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(min(8, vocabulary - 1), vocabulary, (1, context), generator=draw).to(model.device)
    longest, speaker, given = context + settings.new_tokens, inner, dict[str, Any]()
    if system == LONGMEM:
        chunk, speaker = model.config.chunk_size, model
        most = min(memory_size, -(-longest // chunk) * chunk)
        given = {"window": window, "window_move": move, "session_tokens": most}
    elif system == FULL:
        given = {"past_key_values": roomy_cache(inner.config, longest)}
    else:
        ids = ids[:, -max(1, window - settings.new_tokens) :]
    clock = _Clock(model.device)
    speaker.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=settings.new_tokens,
        min_new_tokens=settings.new_tokens,
        do_sample=False,
        use_cache=True,
        stopping_criteria=StoppingCriteriaList([clock]),
        **given,
    )
    # the window is full before the first new token of a long context, and again after every ``move`` tokens
    moved = (system == LONGMEM and at >= 0 and at % move == 0 for at in range(context - window, longest - window - 1))
    return Timeline(clock.times[1] - clock.times[0], tuple(b - a for a, b in pairwise(clock.times[1:])), tuple(moved))


class _Clock(StoppingCriteria):
    """Asked after every token; stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.times = list[float]()
        self(None, None)

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.times.append(time.perf_counter())
        return None if input_ids is None else torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class RoomyLayer(DynamicLayer):
    """Keys and values of a layer in a buffer made once: no copy for each new token, and no slots to be masked."""

    def __init__(self, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._room, self._length = room, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._buffers = [s.new_empty(*s.shape[:2], self._room, s.shape[3]) for s in (key_states, value_states)]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, T, D) after those that are there; all of them, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self._length = self._length, self._length + key_states.shape[2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start : self._length] = states
        self.keys, self.values = (buffer[:, :, : self._length] for buffer in self._buffers)
        return self.keys, self.values


def roomy_cache(config: Any, room: int) -> Cache:
    """A cache for ``room`` tokens; layers that attend to a sliding window keep theirs, which does not grow."""
    layers = DynamicCache(config=config).layers
    return Cache(layers=[RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in layers])


def peak(model: LongMem, system: str, context: int, settings: Settings) -> dict[str, int] | str:
    """Most bytes at a time, in ``total`` and ``beyond`` what was there with the weights; or why that is not known."""
    if model.device.type == "cuda":
        before = torch.cuda.memory_allocated(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
        run(model, system, context, settings)
        total = torch.cuda.max_memory_allocated(model.device)
        return {"total": total, "beyond": total - before}
    job = {"settings": asdict(settings), "system": system, "context": context, "threads": torch.get_num_threads()}
    command = [sys.executable, "-m", "benchmarks.efficiency", "--child"]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return f"its process ended with status {done.returncode}: {last}"
    found: dict[str, int] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def child() -> None:
    """Job in, peak out, as JSON: a fresh process, whose high-water mark is that of one run (Linux)."""
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    settings = Settings(**job["settings"])
    model = load(settings)
    # libraries load what they need
    run(model, job["system"], min(job["context"], 2 * model.config.chunk_size), settings)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the mark begins anew: loading takes more than having
    before = _resident("VmRSS")
    run(model, job["system"], job["context"], settings)
    most = max(_resident("VmRSS"), _resident("VmHWM"))
    print(json.dumps({"total": most, "beyond": most - before}))


def _resident(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines[name].split()[0]) * 1024


def efficiency(settings: Settings) -> dict[str, Any]:
    """Measure every system at every context: the JSON of ``efficiency.json``."""
    began, model = time.monotonic(), load(settings)
    window, move, memory_size = sizes(model, settings)
    backbone = model.backbone.model
    text = backbone.config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    contexts = sorted({c if c <= window else window + round((c - window) / move) * move for c in settings.contexts})
    points, ratios, left_out = list[Any](), list[Any](), list[Any]()
    before: dict[str, tuple[int, float]] = {}  # the longest context so far, and seconds of a round of it
    for number, context in enumerate(track(contexts, "measuring", len(contexts), "contexts")):
        asked = []
        for system in settings.systems:
            last, seconds = before.get(system, (context, 0.0))
            # attention over all grows with the square of the context, the others with it
            expected = seconds * (context / last) ** (2 if system == FULL else 1)
            if system == FULL and limit is not None and context + settings.new_tokens > limit:
                reason = f"the backbone's positions end at {limit:,}"
            elif expected > settings.budget:
                reason = f"one run would take about {expected:,.0f} s, more than --budget allows"
            else:
                asked.append(system)
                continue
            left_out.append({"system": system, "context": context, "reason": reason})
        rounds = _rounds(model, asked, context, settings, warm=number == 0)
        peaks: dict[str, Any] = {}
        for system, lines in rounds.items():
            before[system] = (context, statistics.median(line.first + sum(line.gaps) for line in lines))
            peaks[system] = peak(model, system, context, settings) if settings.memory else None
            points.append(_point(system, context, lines, move, peaks[system]))
        mine = rounds.get(LONGMEM, [])
        for system in [system for system in rounds if system != LONGMEM and mine]:
            pairs = list(zip(rounds[system], mine, strict=True))
            known = [peaks[name] for name in (system, LONGMEM) if isinstance(peaks[name], dict)]
            ratios.append({
                "system": system,
                "context": context,
                "first_token": spread([one.first / other.first for one, other in pairs]),
                "per_token": spread([one.each(move) / other.each(move) for one, other in pairs]),
                "peak": known[0]["beyond"] / known[1]["beyond"] if len(known) == 2 and known[1]["beyond"] > 0 else None,
            })  # fmt: skip
    described = {
        "class": type(backbone).__name__,
        "parameters": backbone.num_parameters(),
        "hidden_size": text.hidden_size,
        "layers": text.num_hidden_layers,
        "dtype": str(model.dtype).removeprefix("torch."),
        "positions": limit,
    }
    own = {"parameters": model.num_parameters(), "memory_layers": list(model.memory_layers)}
    own |= {name: getattr(model.config, name) for name in ("chunk_size", "num_retrieved")}
    return {
        "header": header(
            "efficiency",
            config=asdict(settings),
            models={"backbone": described, "longmem": own},
            samples={"contexts": len(contexts), "rounds": settings.repeats, "new_tokens": settings.new_tokens},
            seeds=[settings.seed],
            seconds=time.monotonic() - began,
        ),
        "systems": {name: LABELS[name] for name in settings.systems},
        "window": window,
        "move": move,
        "memory_size": memory_size,
        "attention": str(backbone.config._attn_implementation),
        "weights_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "points": points,
        "ratios": ratios,
        "left_out": left_out,
    }


def _rounds(
    model: LongMem, systems: Sequence[str], context: int, settings: Settings, *, warm: bool
) -> dict[str, list[Timeline]]:
    """All systems in turn, then in reverse, until there are enough rounds or the time is over."""
    for system in systems if warm else ():
        run(model, system, context, settings)
    found: dict[str, list[Timeline]] = {system: [] for system in systems}
    began = time.monotonic()
    for turn in range(settings.repeats if systems else 0):
        for system in systems[:: 1 if turn % 2 == 0 else -1]:
            found[system].append(run(model, system, context, settings))
        spent = time.monotonic() - began
        if spent + spent / (turn + 1) > settings.budget:
            break
    return found


def _point(system: str, context: int, lines: Sequence[Timeline], move: int, found: Any) -> dict[str, Any]:
    moving = [line.moving for line in lines if line.moving is not None]
    return {
        "system": system,
        "context": context,
        "first_token": spread([line.first for line in lines]),
        "read": spread([context / line.first for line in lines]),
        "per_token": spread([line.each(move) for line in lines]),
        "plain": spread([line.plain for line in lines]),
        "moving": spread(moving) if moving else None,
        "generated": spread([1 / line.each(move) for line in lines]),
        "peak": found if isinstance(found, dict) else None,
        "note": f"no peak memory: {found}" if isinstance(found, str) else None,
    }


def spread(values: Sequence[float]) -> Spread:
    """Of the rounds: median, least and most."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "rounds": len(values)}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, keep the JSON and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = Settings()
    one = parser.add_mutually_exclusive_group(required=True)
    one.add_argument("--model", default="", help="LongMem checkpoint or run folder")
    one.add_argument("--random", help=f"in place of --model, e.g. hidden=512,layers=12; of {', '.join(SHAPE)}")
    parser.add_argument("--contexts", default=",".join(map(str, usual.contexts)))
    parser.add_argument("--systems", default=",".join(usual.systems))
    for name in ("window", "memory_size", "new_tokens", "repeats", "budget", "device", "dtype", "seed"):
        default = getattr(usual, name)
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--out", type=Path, default=Path("results/efficiency"))
    given = vars(parser.parse_args(arguments))
    shape, out = given.pop("random"), given.pop("out")
    parts = [part.partition("=") for part in (shape or "").split(",") if part]
    given["contexts"], given["systems"] = tuple(map(int, given["contexts"].split(","))), given["systems"].split(",")
    wrong = [name for name, _, value in parts if name not in SHAPE or not value.isdecimal()]
    wrong += [name for name in given["systems"] if name not in LABELS]
    if wrong:
        parser.error(f"{', '.join(wrong)}: shapes are NAME=NUMBER of {', '.join(SHAPE)}, systems {', '.join(LABELS)}")
    made = None if shape is None else {name: int(value) for name, _, value in parts}
    settings = Settings(shape=made, memory=not given.pop("no_memory"), **given)
    result = efficiency(settings)
    write_json(out / "efficiency.json", result)
    for table in tables_of(as_json(result)):
        print(plain(table, 120))
    for absent in result["left_out"]:
        print(f"{absent['context']:,} tokens: {absent['system']} left out: {absent['reason']}")
    return result


if __name__ == "__main__":
    child() if "--child" in sys.argv else main()
