"""The frozen behaviour of the tag ``house-before``, and how it was written.

``python -m tests.golden.making`` writes ``logits.safetensors`` anew. It was run once, with the code of that tag, one
thread and float32; run it again only where a change of the numbers is wanted and told in CHANGELOG.md. The archives
``format-1-*.tar`` are of documents as ``fill`` adds them; a store of today does not write that format.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tests.family_table import FAMILIES, SETTINGS, ids, make_backbone, tiny_gpt
from torch import Tensor

from longmem import LongMem, MemoryBank, MemTRM, TrainingFree
from longmem.store import MemoryStore

HERE = Path(__file__).parent
LOGITS = HERE / "logits.safetensors"
DTYPES = ("float16", "int8")
SHARES = (0.2, 0.35, 0.5, 0.65)
"""What each head gives to memory."""

LETTER = "Anna keeps the seven keys of the old house under a stone by the river. " * 3
NOTE = "The ferry leaves at six; ask Bertil, who has the map, about the other shore."
IDS = [3 + (7 * n * n + 5 * n) % 250 for n in range(61)]


def family_models(name: str) -> Iterator[tuple[str, Any]]:
    """All three kinds of model over one tiny backbone, with gates that let memory speak."""
    gates = torch.logit(torch.tensor(SHARES))
    for kind in (LongMem, MemTRM, TrainingFree):
        model: Any
        if kind is TrainingFree:
            model = TrainingFree.from_backbone(make_backbone(name), gate=list(SHARES), **SETTINGS)
        else:
            model = kind.from_backbone(make_backbone(name), **SETTINGS)
            gate = (model.sidenet if kind is LongMem else model).memory_gate
            with torch.no_grad():
                gate.copy_(gates.view_as(gate))
        yield kind.__name__, model.eval()


@torch.no_grad()
def family_logits(name: str) -> dict[str, Tensor]:
    """Logits (2, 2, V) of the last two tokens of both rows, by kind of model, without memory and with a full bank."""
    found = {}
    for kind, model in family_models(name):
        bank = MemoryBank.for_model(model, rows=2, capacity_tokens=64)
        for seed in range(1, 8):  # 84 tokens: the oldest have left
            bank.add(model.encode(ids(seed=seed)))
        found[f"{name}/{kind}/none"] = model(ids()).logits[:, -2:].contiguous()
        found[f"{name}/{kind}/bank"] = model(ids(), memory=bank).logits[:, -2:].contiguous()
    return found


def store_model() -> LongMem:
    """The model whose keys and values the archives hold: always the same random weights, one token per byte."""
    return LongMem.from_backbone(tiny_gpt(initializer_range=0.02), chunk_size=4, num_retrieved=16).eval()


def fill(store: MemoryStore) -> None:
    """Documents of text and of token ids, one of them appended to."""
    store.add_document("alice", LETTER, name="letter", source="letter.txt", metadata={"year": 1907}, time=1.0)
    store.add_document("alice", NOTE, name="note", time=2.0, expires=4e9)
    store.add_document("alice", ids=IDS[:40], name="numbers", time=3.0)
    store.append("alice", ids=IDS[40:], name="numbers")


def main() -> None:
    torch.set_num_threads(1)
    logits: dict[str, Tensor] = {}
    for name in FAMILIES:
        logits |= family_logits(name)
    save_file(logits, LOGITS)


if __name__ == "__main__":
    main()
