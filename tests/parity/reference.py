"""Reference tensors of the released code, and how our parts are driven to meet them.

The tensors are made by running the released code (commit b7f3c6b) on a tiny random model; ``data/`` holds one set,
``LONGMEM_PARITY_DIR`` names a folder with others. Sizes and tolerances: data/README.md.
"""

import contextlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tests.parity.released import ReleasedBank
from torch import Tensor

from longmem.convert import backbone_from_fairseq, longmem_from_fairseq, read_fairseq, side_name
from longmem.modeling.longmem import LongMem
from longmem.types import AttentionKV, RetrievedMemory

FOLDER = Path(os.environ.get("LONGMEM_PARITY_DIR") or Path(__file__).parent / "data")
DEVICE = torch.device(os.environ.get("LONGMEM_PARITY_DEVICE", "cpu"))
ATOL = 1e-5 if DEVICE.type == "cpu" else 1e-4
"""Two independent implementations in float32 agree to 5e-6 on every tensor; a GPU adds up in another order."""
HALF_STORE_ATOL = {"logits": 2e-4, "memory_keys": 2e-3}
"""A float32 value beside a float16 rounding boundary may fall on the other side."""
LOSS_SUM_ATOL = 10 * ATOL


@dataclass(frozen=True)
class Reference:
    """One ``fixture_*.json`` and the files that go with it."""

    path: Path

    @cached_property
    def record(self) -> dict[str, Any]:
        return json.loads(self.path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]

    @property
    def config(self) -> dict[str, Any]:
        return self.record["config"]  # type: ignore[no-any-return]

    def file(self, suffix: str) -> Path:
        return self.path.with_name(f"{self.path.stem}_{suffix}")

    def checkpoints(self, kind: str) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.stem}_{kind}*.pt"))

    def model(self) -> LongMem:
        checkpoint = read_fairseq(self.file("longmem.safetensors"), self.path)
        return longmem_from_fairseq(checkpoint, backbone_from_fairseq(checkpoint)).to(DEVICE)


@dataclass(frozen=True)
class Case:
    """One case of a reference: its record, its tensors, and a fresh model and bank for it."""

    reference: Reference
    name: str

    @property
    def record(self) -> dict[str, Any]:
        return self.reference.record["cases"][self.name]  # type: ignore[no-any-return]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.reference.file(f"case_{self.name}.safetensors"), device=str(DEVICE))

    @property
    def half_store(self) -> bool:
        return self.record.get("store_dtype") == "float16"

    @property
    def added(self) -> list[dict[str, Any]]:
        """Records of the segments that are written to memory, in order."""
        return [record for record in self.record["segs"] if record.get("added", True)]

    @property
    def probes(self) -> list[dict[str, Any]]:
        """Records of the segments that only read."""
        return [record for record in self.record["segs"] if not record.get("added", True)]

    def bank(self, model: LongMem) -> ReleasedBank:
        return ReleasedBank(
            rows=self.record["batch"],
            capacity_tokens=self.record["capacity_chunks"] * model.config.chunk_size,
            heads_kv=model.memory_heads,
            head_dim=model.memory_head_dim,
            chunk_size=model.config.chunk_size,
            dtype=torch.float16 if self.half_store else torch.float32,
            device=DEVICE,
        )

    def segment(self, tensors: dict[str, Tensor], index: int) -> Tensor:
        length = self.record["seg_len"]
        return tensors["tokens"][:, index * length : (index + 1) * length]


@dataclass
class Seen:
    """What one forward pass computed, under the reference's names and shapes."""

    logits: Tensor
    kv: AttentionKV
    retrieved: RetrievedMemory
    queries: Tensor
    side_hidden: list[Tensor]
    side_final: Tensor


def watch(model: LongMem, bank: ReleasedBank, input_ids: Tensor) -> Seen:
    """One forward pass that reads the bank, with everything on its way written down."""
    states: list[Tensor] = []

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append((args[0] if args else kwargs["hidden_states"]).detach())

    norm = model.sidenet.final_norm
    with contextlib.ExitStack() as stack:
        for layer in (*model.sidenet.layers, norm):
            stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(norm.register_forward_hook(lambda module, args, output: states.append(output.detach())).remove)
        out = model(input_ids, memory=bank)
    (read,) = out.reads
    return Seen(out.logits, out.kv, read.retrieved, read.queries.detach(), states[:-1], states[-1])


def backbone_states(model: LongMem, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The backbone alone: hidden states (L+1, B, T, C) with the last one normed, and logits (B, T, V)."""
    with torch.no_grad():
        out = model.backbone.model(input_ids, output_hidden_states=True)
    return torch.stack(out.hidden_states), out.logits


def trained(model: LongMem, official: str) -> torch.nn.Parameter:
    """Our parameter of a released name."""
    name = side_name(official)
    assert name is not None, official
    return dict(model.sidenet.named_parameters())[name]


def close(ours: Tensor, theirs: Tensor, name: str, atol: float = ATOL) -> None:
    """Equal within ``atol``, absolutely; the message names the tensor."""
    assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)} against {tuple(theirs.shape)}"
    distance = (ours - theirs).abs().max().item()
    assert distance <= atol, f"{name}: off by {distance:.2e}, more than {atol:.0e}"
