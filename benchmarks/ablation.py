"""What each setting is worth: perplexity with one of them changed at a time, against the default, paired by document.

Usage: python -m benchmarks.ablation --model runs/sidenet --data latex.tar.xz --of chunk_size=1,2 --of gate_share \\
    --also memory_layer:1=runs/layer1 --out results/ablate-latex

Settings that only say how memory is made and searched are changed on one trained SideNet (``--of``; without it, all of
them). Those that need training (memory layer, initialisation, fusion) are compared between SideNets that were trained
with them (``--also``). Writes ``ablate.json``; an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longmem import LongMem, MemoryBank
from longmem.data.text import TextSource, read_documents
from longmem.data.tokens import TokenizedDocument, tokenize_documents
from longmem.errors import ConfigError
from longmem.evaluation.asking import Asker
from longmem.evaluation.perplexity import PerplexitySettings, measure, scores
from longmem.evaluation.results import Bootstrap, Ledger, as_json, header, write_json
from longmem.evaluation.systems import BACKBONE, MEMORY_OFF, load_systems, systems_of
from longmem.evaluation.tables import plain, tables_of
from longmem.modeling.checkpoints import checkpoint_folder
from longmem.types import AttentionKV

DEFAULT = "default"
AXES = {
    "chunk_size": "chunk size (tokens)",
    "num_retrieved": "retrieved tokens per query (K)",
    "memory_size": "memory size (tokens)",
    "memory_dtype": "number format of keys and values",
    "gate_share": "share given to memory, forced",
}
"""What changes without training, and its name for people."""
DTYPES = ("float32", "float16", "bfloat16", "int8")
TRAINED = ("init", "fusion", "final_state", "stride", "chunk_size", "num_retrieved", "memory_size", "memory_layers")
"""Fields of a checkpoint's config by which trained SideNets are told apart."""


@dataclass(frozen=True)
class Planned:
    """A system, the value of the axis that it has, and how it was trained otherwise than the default."""

    system: Asker
    axis: str
    value: str
    differs: str = ""


def chosen(named: Sequence[str], model: LongMem, size: int) -> dict[str, list[Any]]:
    """Values by axis of ``chunk_size=1,2`` and ``gate_share``; the model's own are always among them."""
    config = model.config
    chunk, retrieved, softmax = config.chunk_size, config.num_retrieved, config.fusion == "softmax"
    usual: dict[str, list[Any]] = {
        "chunk_size": [n for n in (1, 2, 4, 8, 16) if retrieved % n == 0 and size % n == 0],
        "num_retrieved": [n * chunk for n in (1, 4, 8, 16, 32, 64)],
        "memory_size": [max(chunk, size // part // chunk * chunk) for part in (64, 16, 8, 4, 2, 1)],
        "memory_dtype": list(DTYPES),
        "gate_share": [] if softmax else [0.0, 0.1, 0.25, 0.5, 0.75, 1.0],
    }
    found: dict[str, list[Any]] = {}
    for axis, _, values in (one.partition("=") for one in named):
        kind: Any = {"gate_share": float, "memory_dtype": str}.get(axis, int)
        found[axis] = [kind(value) for value in values.split(",")] if values else usual[axis]
        own = {"memory_size": size}.get(axis, getattr(config, axis, None))
        if own is not None:
            found[axis] = sorted({*found[axis], own})
    return found or usual


def varied(model: LongMem, gate_share: float | None = None, **config: int) -> LongMem:
    """The same weights with other settings; ``gate_share`` is the share of memory in every head that finds anything."""
    other = copy.copy(model)
    other.config = copy.deepcopy(model.config)
    for name, value in config.items():
        setattr(other.config, name, value)
    if problems := other.config.problems():
        raise ConfigError(problems)
    if gate_share is not None:
        backbone = model.backbone
        shared: Any = {id(one): one for one in (backbone, backbone.model, backbone.family)}
        side = copy.deepcopy(model.sidenet, shared)  # its layers read the gate of their own SideNet
        odds = math.inf if gate_share == 1 else gate_share / (1 - gate_share)
        nn.init.constant_(side.memory_gate, math.log(odds) if odds else -math.inf)
        object.__setattr__(other, "_modules", model._modules | {"sidenet": side})
    return other


class Int8Bank(MemoryBank):
    """Keys and values are rounded as a store in int8 rounds them, a scale for each chunk, head, and key or value.

    They stay floating point, so it saves no memory. Chunks begin where what is added begins.
    """

    def add(self, kv: AttentionKV, **settings: Any) -> None:
        super().add(AttentionKV(self._rounded(kv.keys), self._rounded(kv.values), kv.mask), **settings)

    def _rounded(self, states: Tensor) -> Tensor:
        parts = []
        for chunk in states.float().split(self.chunk_size, dim=2):
            scale = (chunk.abs().amax(dim=(2, 3), keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
            parts.append((chunk / scale).round() * scale)
        return torch.cat(parts, dim=2).to(states)


class OtherFormat(Asker):
    """Its memory holds keys and values in the number format that its identity names."""

    def bank(self, rows: int, longest: int) -> MemoryBank | None:
        usual, word = super().bank(rows, longest), self.identity["memory_dtype"]
        if usual is None:
            return None
        if word == "int8":
            return Int8Bank.for_model(self.model, rows, usual.capacity_tokens)
        return MemoryBank.for_model(self.model, rows, usual.capacity_tokens, dtype=getattr(torch, word))


def untrained(model: LongMem, size: int, axes: dict[str, list[Any]], **how: Any) -> tuple[list[Asker], list[Planned]]:
    """Systems that differ from the default in one setting, all on one pass of the backbone."""
    backbone, off, on = systems_of(model, [size], **how)
    default = replace(on, name=DEFAULT)
    own = {"memory_size": size, "memory_dtype": str(model.dtype).removeprefix("torch."), "gate_share": None}
    planned = list[Planned]()
    for axis, value in ((axis, value) for axis, values in axes.items() for value in values):
        said = f"{value:g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
        if value == own.get(axis, getattr(model.config, axis, None)):  # it needs no system of its own
            planned.append(Planned(default, axis, said))
            continue
        other = varied(model, **({axis: value} if axis in ("chunk_size", "num_retrieved", "gate_share") else {}))
        remembered = value if axis == "memory_size" else size
        identity = on.identity | {"memory": remembered, axis: value}
        kind = OtherFormat if axis == "memory_dtype" else Asker
        system = kind(f"{axis}={value}", f"{AXES[axis]}: {said}", identity, other, memory_size=remembered, **how)
        planned.append(Planned(system, axis, said))
    return [backbone, off, default, *(one.system for one in planned if one.system is not default)], planned


def trained(named: Sequence[str], model: LongMem, size: int, **how: Any) -> list[Planned]:
    """``LABEL=FOLDER`` or ``AXIS:LABEL=FOLDER``: SideNets over the same backbone.

    Raises:
        CheckpointError: one of them is over another backbone.
    """
    found = []
    for name, _, folder in (one.partition("=") for one in named):
        axis, _, label = name.rpartition(":")
        other: Any = LongMem.from_pretrained(checkpoint_folder(folder), backbone=model.backbone.model)
        system = systems_of(other.to(model.device).eval(), [size], **how)[-1]
        mine, its = (_config(each) for each in (other, model))
        differs = ", ".join(f"{name} {mine[name]} (default {its[name]})" for name in TRAINED if mine[name] != its[name])
        axis = axis or "other SideNets"
        found.append(Planned(replace(system, name=f"{axis}={label}"), axis, label, differs))
    return found


def _config(model: LongMem) -> dict[str, Any]:
    return {name: getattr(model.config, name) for name in TRAINED} | {"memory_layers": model.memory_layers}


def ablate(
    model: LongMem,
    documents: Sequence[TokenizedDocument],
    settings: PerplexitySettings,
    of: Sequence[str] = (),
    also: Sequence[str] = (),
    *,
    memory_size: int | None = None,
    records: Path | None = None,
    config: dict[str, Any] | None = None,
    **how: Any,
) -> dict[str, Any]:
    """Measure every value of every axis on every document: the JSON of ``ablate.json``; ``how``: window and rows."""
    began, size, ledger = time.monotonic(), memory_size or model.config.memory_size, Ledger(records)
    together, planned = untrained(model, size, chosen(of, model, size), **how)
    window, others = together[0].window, trained(also, model, size, **how)
    planned += others
    # each by itself: another memory layer has keys and values of its own
    apart = [[one.system] for one in others]
    names = dict.fromkeys([BACKBONE, MEMORY_OFF, DEFAULT, *(one.system.name for one in planned)])
    scored: dict[str, dict[str, Any]] = {name: {} for name in names}
    for protocol in settings.protocols:
        table: dict[str, list[dict[str, Any]]] = {}
        for some in (together, *apart):
            table |= measure(some, documents, settings, protocol, ledger)
        found = scores("all", documents, table, [(name, DEFAULT) for name in names], settings)
        perplexities = {one["system"]: one["perplexity"] for one in found["systems"]}
        for gap in as_json(found["differences"]):
            kept = {name: gap[name] for name in ("percent", "documents", "blocks")}
            scored[gap["system"]][protocol] = {"perplexity": perplexities[gap["system"]]} | kept
    return {
        "header": header(
            "ablate",
            config=asdict(settings) | how | {"memory_size": size, "of": list(of), "also": list(also)} | (config or {}),
            models={system.name: system.identity for each in (together, *apart) for system in each},
            samples={"documents": len(documents), "tokens": sum(document.scored for document in documents)},
            seeds=[settings.bootstrap.seed],
            seconds=time.monotonic() - began,
        ),
        "default": _config(model) | {"memory_size": size, "gate_share": model.memory_share.tolist()},
        "protocols": {
            name: {"protocol": name, "window": window, "stride": settings.stride_of(name, window)}
            for name in settings.protocols
        },
        "without": {name: scored[name] for name in (BACKBONE, MEMORY_OFF)},
        "axes": [_axis(name, planned, scored) for name in dict.fromkeys(one.axis for one in planned)],
    }


def _axis(name: str, planned: Sequence[Planned], scored: dict[str, dict[str, Any]]) -> dict[str, Any]:
    mine = [one for one in planned if one.axis == name]
    values = [
        {"value": one.value, "default": of == DEFAULT, "scores": scored[of], "differs": one.differs}
        for one in mine
        if (of := one.system.name)
    ]
    if not any(value["default"] for value in values):
        own = "as trained" if name == "gate_share" else DEFAULT
        values.insert(0, {"value": own, "default": True, "scores": scored[DEFAULT], "differs": ""})
    label = AXES.get(name, name.replace("_", " "))
    return {"name": name, "label": label, "trained": any(one.differs for one in mine), "values": values}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, keep the JSON and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--of", action="append", default=[], help=f"AXIS or AXIS=VALUES, of {', '.join(AXES)}")
    parser.add_argument("--also", action="append", default=[], help="LABEL=FOLDER or AXIS:LABEL=FOLDER, a SideNet")
    parser.add_argument("--num-documents", type=int)
    parser.add_argument("--max-tokens", type=int, help="of each document")
    parser.add_argument("--memory-size", type=int)
    parser.add_argument("--protocols", default="sliding,segments")
    parser.add_argument("--window", type=int)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    texts = list(islice(read_documents(TextSource(tuple(given.data))), given.num_documents))
    system = load_systems(given.model, device=given.device, window=given.window)[-1]
    model = system.model
    if not isinstance(model, LongMem):
        raise ConfigError(f"{given.model}: no LongMem checkpoint; ablations change the settings of one")
    settings = PerplexitySettings(
        protocols=tuple(given.protocols.split(",")),
        bootstrap=Bootstrap(resamples=given.resamples),
    )
    result = ablate(
        model,
        tokenize_documents(texts, system.tokenizer, max_tokens=given.max_tokens),
        settings,
        given.of,
        given.also,
        memory_size=given.memory_size,
        records=given.out / "records.jsonl",
        config={"model": given.model, "data": given.data, "max_tokens": given.max_tokens},
        window=system.window,
        rows=given.rows,
    )
    write_json(given.out / "ablate.json", result)
    for table in tables_of(as_json(result)):
        print("\n" + plain(table, 120))
    return result


if __name__ == "__main__":
    main()
