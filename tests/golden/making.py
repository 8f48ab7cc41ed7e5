"""The frozen behaviour of the tag ``house-before``, and how it was written.

``python -m tests.golden.making`` writes ``logits.safetensors`` and ``format-1-*.tar`` anew. It was run once, with the
code of that tag, one thread and float32; run it again only where a change of the numbers is wanted and told in
CHANGELOG.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from tests.family_table import FAMILIES, V, make_backbone
from torch import Tensor

from longmem import AlibiGPTConfig, AlibiGPTForCausalLM, LongMem, MemoryBank, MemTRM, TrainingFree
from longmem.store import MemoryStore

HERE = Path(__file__).parent
LOGITS = HERE / "logits.safetensors"
SETTINGS: dict[str, Any] = {"chunk_size": 2, "num_retrieved": 8, "memory_size": 64}
DTYPES = ("float16", "int8")
SHARES = (0.2, 0.35, 0.5, 0.65)
"""What each head gives to memory."""

LETTER = "Anna keeps the seven keys of the old house under a stone by the river. " * 3
NOTE = "The ferry leaves at six; ask Bertil, who has the map, about the other shore."
IDS = [3 + (7 * n * n + 5 * n) % 250 for n in range(61)]


def text_ids(seed: int, length: int = 12) -> Tensor:
    """(2, length) token ids."""
    return torch.randint(3, V, (2, length), generator=torch.Generator().manual_seed(seed))


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
            bank.add(model.encode(text_ids(seed)))
        found[f"{name}/{kind}/none"] = model(text_ids(0)).logits[:, -2:].contiguous()
        found[f"{name}/{kind}/bank"] = model(text_ids(0), memory=bank).logits[:, -2:].contiguous()
    return found


def store_model() -> LongMem:
    """The model whose keys and values the archives hold: always the same random weights, one token per byte."""
    torch.manual_seed(0)
    config = AlibiGPTConfig(
        vocab_size=260, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=32
    )
    return LongMem.from_backbone(AlibiGPTForCausalLM(config).eval(), chunk_size=4, num_retrieved=16).eval()


def fill(store: MemoryStore) -> None:
    """Documents of text and of token ids, one of them appended to."""
    store.add_document("alice", LETTER, name="letter", source="letter.txt", metadata={"year": 1907}, time=1.0)
    store.add_document("alice", NOTE, name="note", time=2.0, expires=4e9)
    store.add_document("alice", ids=IDS[:40], name="numbers", time=3.0)
    store.append("alice", ids=IDS[40:], name="numbers")


def main() -> None:
    from tests.conftest import make_byte_tokenizer

    torch.set_num_threads(1)
    logits: dict[str, Tensor] = {}
    for name in FAMILIES:
        logits |= family_logits(name)
    save_file(logits, LOGITS)
    for dtype in DTYPES:
        with (
            TemporaryDirectory() as folder,
            MemoryStore.open(
                Path(folder) / "memory", model=store_model(), tokenizer=make_byte_tokenizer(), dtype=dtype
            ) as store,
        ):
            fill(store)
            store.export("alice", HERE / f"format-1-{dtype}.tar")


if __name__ == "__main__":
    main()
