"""The systems that are compared on identical inputs, on one pass of their common backbone where they can share it.

B rows · T window tokens · C width · V vocabulary · Hkv key/value heads · D head_dim · Q systems that run together
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from longmem.errors import CheckpointError, ConfigError
from longmem.memory import MemoryBank
from longmem.modeling.fingerprint import fingerprint_of, legacy_fingerprint
from longmem.modeling.reading import Reading
from longmem.progress import Progress
from longmem.types import AttentionKV

if TYPE_CHECKING:
    from longmem.modeling.baselines import MemTRM, TrainingFree
    from longmem.modeling.longmem import LongMem

BACKBONE, MEMORY_OFF, CONTROL = "backbone", "memory_off", "control"
LONGMEM, MEMTRM, TRAINING_FREE = "memory", "memtrm", "training_free"
MEMTRM_OFF = f"{MEMTRM}_off"
BLOCK = 512  # tokens whose (tokens, V) float32 logits exist at one time

Forward = Callable[[Tensor, Tensor, int], Iterable[tuple[Tensor, AttentionKV | None]]]
"""``forward(input_ids (B, T), rows (B,), keep)`` gives for each of Q systems, one after another, the logits of the last
``keep`` positions, (B, keep, V), and the memory layers' keys and values of all T, or None where there is no memory."""


@dataclass(frozen=True)
class System:
    """One of the models compared.

    Attributes:
        name: its key in results: ``backbone``, ``memory_off``, ``memory_<tokens>``, ``control``, ``memtrm_off``,
            ``memtrm_<tokens>``, ``training_free_<share>_<tokens>``.
        label: its name for people.
        identity: what its numbers depend on, hashed into the key of its records.
        reader: the LongMem whose SideNet runs, or a model that reads memory in its own layers; None is the backbone
            alone.
        memory_size: tokens of memory a row holds; None is no memory.
    """

    name: str
    label: str
    identity: dict[str, Any]
    reader: Any = None
    memory_size: int | None = None


def sized(name: str) -> tuple[str, int] | None:
    """``memory_64`` -> ``("memory", 64)``: which kind of memory, and how large; None where there is none."""
    found = re.fullmatch(r"(.+)_(\d+)", name)
    return None if found is None else (found[1], int(found[2]))


def largest(names: Iterable[str]) -> list[str]:
    """The systems without those memories of which there is a larger one of the same kind."""
    names = list(names)
    most = dict(sorted(filter(None, map(sized, names))))
    return [name for name in names if (memory := sized(name)) is None or most[memory[0]] == memory[1]]


def chosen(names: Sequence[str], beginnings: Sequence[str]) -> list[str]:
    """The systems whose names begin so.

    Raises:
        ConfigError: a beginning is that of none; names those there are.
    """
    lost = [start for start in beginnings if not any(name.startswith(start) for name in names)]
    if lost:
        raise ConfigError(f"--systems ({', '.join(lost)}) begins no system's name; there are {', '.join(names)}")
    return [name for name in names if not beginnings or name.startswith(tuple(beginnings))]


def compared(names: Sequence[str]) -> list[tuple[str, str]]:
    """The differences reported between systems, (system, against).

    Every system against the backbone; memory against the same model without it, and against the control; LongMem
    against each other kind of memory, or of context, of the same size.
    """
    pairs = [(name, BACKBONE) for name in names if name != BACKBONE and BACKBONE in names]
    sizes = {name: found for name in names if (found := sized(name)) is not None}
    for kind, other in ((LONGMEM, MEMORY_OFF), (LONGMEM, CONTROL), (MEMTRM, MEMTRM_OFF)):
        pairs += [(name, other) for name, (mine, _) in sizes.items() if mine == kind and other in names]
    same = {other: f"{LONGMEM}_{size}" for other, (kind, size) in sizes.items() if kind != LONGMEM}
    return pairs + [(name, other) for other, name in same.items() if name in names]


@dataclass(frozen=True)
class Comparison:
    """Systems over one backbone; the first of them is the backbone alone, the baseline of all differences.

    ``fingerprints`` are more of those by which the backbone goes: as it was before it was converted to another dtype.
    """

    model: PreTrainedModel
    systems: tuple[System, ...]
    main: LongMem | None = None
    make_memory: Callable[..., MemoryBank] = MemoryBank.for_model
    fingerprints: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def of_backbone(cls, model: PreTrainedModel) -> Comparison:
        """A causal language model by itself."""
        return cls(model, (System(BACKBONE, "backbone alone", {"backbone": digest(model.state_dict().items())}),))

    @classmethod
    def of_longmem(cls, model: LongMem, memory_sizes: Sequence[int], *, control: LongMem | None = None) -> Comparison:
        """Backbone alone, memory switched off, a control SideNet, and memory at each size.

        Raises:
            CheckpointError: the control stands on another backbone.
        """
        if control is not None and not model.accepts(control.fingerprint):
            raise CheckpointError(
                f"the control's backbone ({control.fingerprint}) is not the model's ({model.fingerprint}); "
                "compare SideNets trained over the same backbone"
            )
        mine = _identity(model)
        systems = [
            System(BACKBONE, "backbone alone", {name: mine[name] for name in ("backbone", "dtype")}),
            System(MEMORY_OFF, "SideNet, memory off", mine, model),
        ]
        if control is not None:
            systems.append(System(CONTROL, "SideNet trained without memory", _identity(control), control))
        systems += _with_memory(LONGMEM, "LongMem", mine, model, memory_sizes)
        return cls(model.backbone.model, tuple(systems), model)

    def beside(self, model: MemTRM | TrainingFree, memory_sizes: Sequence[int]) -> Comparison:
        """And a model that reads memory in its own layers, at each size.

        A Memorizing Transformer was trained from this backbone, and is measured without memory too; training-free
        attention without memory is the backbone.

        Raises:
            CheckpointError: it is of another backbone.
            ConfigError: there is one of this kind already.
        """
        config: Any = model.config
        identity, more = _identity(model), list[System]()
        if model.frozen:
            share = "calibrated" if config.fusion == "token" else f"{float(model.memory_share.mean()):.4g}"
            start, kind, label = model.fingerprint, f"{TRAINING_FREE}_{share}", f"training-free {share}"
        else:
            start, kind, label = str(config.start_fingerprint), MEMTRM, "MemTRM"
            more = [System(MEMTRM_OFF, "MemTRM, memory off", identity, model)]
        mine = fingerprint_of(self.model) if self.main is None else self.main.fingerprint
        if start not in self.fingerprints | {mine, fingerprint_of(self.model), legacy_fingerprint(self.model)}:
            raise CheckpointError(
                f"{label} was made from backbone {start}, the others stand on {mine}; compare models of one backbone"
            )
        more += _with_memory(kind, label, identity, model, memory_sizes)
        if {system.name for system in self.systems} & {system.name for system in more}:
            raise ConfigError(f"{label} is compared twice; leave one of them away")
        return replace(self, systems=(*self.systems, *more))

    def described(self) -> dict[str, dict[str, Any]]:
        """Every system's identity and number of parameters, for the header of a result."""
        found = {}
        for system in self.systems:
            reader: Any = system.reader or self.model
            found[system.name] = system.identity | {"parameters": sum(p.numel() for p in reader.parameters())}
            if hasattr(reader, "sidenet"):
                found[system.name]["trained_parameters"] = sum(p.numel() for p in reader.trainable_parameters())
        return found

    def prepare(self, names: Sequence[str], rows: int, longest: int) -> tuple[Forward, list[MemoryBank | None]]:
        """The named systems with fresh, empty memories, for documents of at most ``longest`` tokens."""
        systems = [system for system in self.systems if system.name in names]
        memories: list[MemoryBank | None] = []
        for system in systems:
            chunk = 1 if system.reader is None else system.reader.config.chunk_size
            # a bank larger than the longest document is never filled: do not reserve it
            capacity = min(system.memory_size or 0, -(-longest // chunk) * chunk)
            memories.append(self.make_memory(system.reader, rows, capacity) if capacity else None)

        def forward(input_ids: Tensor, rows: Tensor, keep: int) -> Iterator[tuple[Tensor, AttentionKV | None]]:
            run: Any = None  # the pass of the backbone that its SideNets share
            for system, memory in zip(systems, memories, strict=True):
                reader = system.reader
                if reader is not None and not hasattr(reader, "sidenet"):  # it reads in its own layers
                    given = {"memory": memory, "memory_rows": rows, "use_cache": False, "logits_to_keep": keep}
                    out = reader(input_ids, **given)
                    yield out.logits[:, -keep:], out.kv
                elif self.main is None:
                    yield last_logits(self.model, input_ids, keep), None
                else:
                    run = run or self.main.backbone.run(input_ids, use_cache=False)
                    state = run.output.last_hidden_state
                    if reader is not None:
                        run.reading = Reading.of(reader, memory, rows, explain=False)
                        state = reader.read(run)
                    logits: Any = self.main.backbone.head(state, run, logits_to_keep=keep).logits
                    yield logits[:, -keep:], run.kv(None)

        return forward, memories


def _with_memory(kind: str, label: str, identity: dict[str, Any], model: Any, sizes: Sequence[int]) -> list[System]:
    return [
        System(f"{kind}_{size}", f"{label}, {size:,} tokens", identity | {"memory": size}, model, size)
        for size in sizes
    ]


def last_logits(model: Any, input_ids: Tensor, keep: int, **reads: Any) -> Tensor:
    """Of the last ``keep`` positions, (B, keep, V); a model that does not know ``logits_to_keep`` gives all."""
    known = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    some = {"logits_to_keep": keep} if known else {}
    logits: Tensor = model(input_ids=input_ids, use_cache=False, **some, **reads).logits
    return logits[:, -keep:]


def _identity(model: Any) -> dict[str, Any]:
    """The weights beside the frozen backbone's, and the settings that outputs depend on besides them."""
    names = ("memory_layers", "stride", "chunk_size", "num_retrieved", "final_state", "fusion")
    found: dict[str, Any] = {"backbone": model.fingerprint, "dtype": str(model.dtype).removeprefix("torch.")}
    trained = zip(model.trainable_parameter_names(), model.trainable_parameters(), strict=True)
    if hasattr(model, "sidenet"):
        found["side"] = digest(trained)
    else:
        found["gates"] = digest([("memory_gate", model.memory_gate), *(trained if model.frozen else ())])
        if not model.frozen:
            found["weights"] = digest(model.state_dict().items())
    return found | {name: getattr(model.config, name) for name in names if hasattr(model.config, name)}


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of named tensors, bit for bit."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


# running documents through systems


class Window(NamedTuple):
    """Input positions ``[start, end)`` of a document; those from ``scored_from`` are scored, by the token after each.

    Everything before ``start`` has left the window: it is what memory may hold.
    """

    start: int
    scored_from: int
    end: int


def windows(length: int, window: int, stride: int) -> Iterator[Window]:
    """Cover ``length`` input positions so that each is scored exactly once.

    The first window scores all it sees. Each later one starts ``stride`` further on and scores its last ``stride``
    positions, which therefore see ``window - stride`` to ``window`` tokens. ``stride == window`` gives the paper's
    non-overlapping segments.
    """
    start, scored = 0, 0
    while scored < length:
        end = min(start + window, length)
        yield Window(start, scored, end)
        start, scored = start + stride, end


@dataclass(eq=False)
class _Lane:
    """One row of the batch: a document part way through."""

    row: int
    document: int
    ids: Tensor  # (n,) on the device; inputs are the first n - 1, targets the last n - 1
    plan: Iterator[Window]
    window: Window
    nll: list[NDArray[np.float64]] = field(default_factory=list)  # one (Q, t) for each window
    held: dict[int, Tensor] = field(default_factory=dict)  # by system, keys and values (2, Hkv, t, D) of its window


@torch.inference_mode()
def stream_nll(
    forward: Forward,
    memories: Sequence[Any],
    documents: Sequence[Tensor],
    *,
    window: int,
    stride: int,
    rows: int,
    names: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Score every token of every document but its first, which nothing precedes.

    Documents are rows of one batch, the longest first; a finished row is reset and given to the next document, so a row
    never reads another document. Rows are padded at their ends, where a causal model cannot look.

    What memory holds when window ``[start, end)`` is scored is exactly the tokens before ``start``. The keys and values
    of a token are computed once, in the window in which the token is scored (so with at least ``window - stride``
    tokens of context, where the document has them), wait while the token is still in the window, and are written when
    it has left. With ``stride == window`` this is: score a segment, then memorize it.

    Args:
        memories: the banks of the Q systems that ``forward`` runs, None for those without memory.
        documents: token ids, each (n,) with n >= 2.
        names: of documents, for the memory's provenance.
        progress: advanced by the tokens that each forward pass scores, each counted once for every system.

    Yields:
        document index and its negative log-likelihoods in nats, (Q, n - 1), in the order in which documents finish.
    """
    names = names or list(map(str, range(len(documents))))
    banks = {number: memory for number, memory in enumerate(memories) if memory is not None}
    waiting = deque(sorted(range(len(documents)), key=lambda i: -len(documents[i])))
    free = list(range(rows))[::-1]
    lanes: list[_Lane] = []
    while waiting or lanes:
        while waiting and free:
            row, document = free.pop(), waiting.popleft()
            for memory in banks.values():
                memory.reset(rows=torch.tensor([row]))
            plan = windows(len(documents[document]) - 1, window, stride)
            lanes.append(_Lane(row, document, documents[document].to(device), plan, next(plan)))
        moved = [lane for lane in lanes if lane.held]
        for number, memory in banks.items() if moved else ():
            keys, values = torch.stack([lane.held[number][:, :, :stride] for lane in moved], dim=1)
            memory.add(
                AttentionKV(keys, values),
                rows=torch.tensor([lane.row for lane in moved]),
                documents=[names[lane.document] for lane in moved],
                offsets=[lane.window.start - stride for lane in moved],
            )
        width = max(lane.window.end - lane.window.start for lane in lanes)
        input_ids = lanes[0].ids.new_zeros(len(lanes), width)
        for b, lane in enumerate(lanes):
            start, _, end = lane.window
            input_ids[b, : end - start] = lane.ids[start:end]
        skipped = min(lane.window.scored_from - lane.window.start for lane in lanes)
        scored: list[list[Tensor]] = [[] for _ in lanes]
        for number, (logits, kv) in enumerate(
            forward(input_ids, torch.tensor([e.row for e in lanes]), width - skipped)
        ):
            for b, lane in enumerate(lanes):
                start, scored_from, end = lane.window
                first, last, targets = scored_from - start, end - start, lane.ids[scored_from + 1 : end + 1]
                scored[b].append(_nll(logits[b, first - skipped : last - skipped], targets))
                if number in banks and kv is not None:
                    new = torch.stack([kv.keys[b, :, first:last], kv.values[b, :, first:last]])
                    waited = lane.held[number][:, :, stride:] if number in lane.held else new[:, :, :0]
                    lane.held[number] = torch.cat([waited, new], dim=2)
        for lane, nll in zip(list(lanes), scored, strict=True):
            lane.nll.append(torch.stack(nll).double().cpu().numpy())
            if progress is not None:
                progress.advance(lane.nll[-1].size)
            following = next(lane.plan, None)
            if following is None:
                lanes.remove(lane)
                free.append(lane.row)
                yield lane.document, np.concatenate(lane.nll, axis=1)
            else:
                lane.window = following


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target in nats: logits (T, V), targets (T,) -> (T,) float32, a block at a time."""
    blocks = zip(logits.split(BLOCK), targets[:, None].split(BLOCK), strict=True)
    return torch.cat([part.float().logsumexp(1) - part.float().gather(1, wanted)[:, 0] for part, wanted in blocks])
