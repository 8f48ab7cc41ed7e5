"""Tiny models whose next token depends on memory, and banks for them."""

from typing import Any

import torch
from tests.family_table import SETTINGS, ids, make_backbone
from torch import nn
from transformers import PreTrainedModel

from longmem import LongMem, MemoryBank, MemTRM, TrainingFree


def longmem(name: str | PreTrainedModel = "llama", **settings: Any) -> LongMem:
    """Over a backbone of the family table; half of its tokens would be others without memory."""
    torch.manual_seed(1)
    backbone = make_backbone(name) if isinstance(name, str) else name
    model = LongMem.from_backbone(backbone, **{**SETTINGS, **settings}).eval()
    attention = model.backbone.family.attention(model.sidenet.layers[model.augmented_layer])
    projection: nn.Module = model.backbone.family.output_projection(attention)
    with torch.no_grad():
        model.sidenet.memory_gate.normal_()
        projection.weight.mul_(5.0)  # type: ignore[operator, union-attr]
    return model


def reader(kind: Any, name: str) -> Any:
    """A model of any kind, over a backbone of the family table."""
    return longmem(name) if kind is LongMem else kind.from_backbone(make_backbone(name), **SETTINGS).eval()


KINDS = [LongMem, MemTRM, TrainingFree]


def bank_of(model: Any, rows: int = 1, tokens: int = 20, seed: int = 7, capacity: int = 64) -> MemoryBank:
    """Every row holds a text of its own."""
    bank = MemoryBank.for_model(model, rows, capacity)
    bank.add(model.encode(ids(rows, tokens, seed)), documents=["before"] * rows)
    bank.end_document()
    return bank
