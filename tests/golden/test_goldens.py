"""Numbers frozen with the code of the tag ``house-before`` still come out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.golden.making import DTYPES, HERE, IDS, LETTER, LOGITS, NOTE, family_logits, fill, store_model
from torch import Tensor

from longmem.store import MemoryStore

CLOSE = {"float16": 2e-3, "int8": 2e-2}
"""Two encodings of the same text may round to neighbouring numbers."""


FROZEN: dict[str, Tensor] = load_file(LOGITS)


@pytest.mark.parametrize("name", sorted({key.split("/")[0] for key in FROZEN}))
def test_logits_with_and_without_memory(name: str) -> None:
    found = family_logits(name)
    assert found.keys() == {key for key in FROZEN if key.startswith(f"{name}/")} and len(found) == 6
    for key, logits in found.items():
        torch.testing.assert_close(
            logits, FROZEN[key], atol=2e-6, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_import_of_a_format_1_export_is_encoding_anew(dtype: str, tmp_path: Path, byte_tokenizer: Any) -> None:
    settings: dict[str, Any] = {"model": store_model(), "tokenizer": byte_tokenizer, "dtype": dtype}
    with (
        MemoryStore.open(tmp_path / "imported", **settings) as imported,
        MemoryStore.open(tmp_path / "encoded", **settings) as encoded,
    ):
        imported.import_(HERE / f"format-1-{dtype}.tar", "alice")
        fill(encoded)
        assert imported.text("alice", "letter") == LETTER and imported.text("alice", "note") == NOTE
        assert imported.token_ids("alice", "numbers").tolist() == IDS
        for mine, theirs in zip(imported.documents("alice"), encoded.documents("alice"), strict=True):
            for name in ("name", "source", "metadata", "added", "expires", "tokens"):
                assert getattr(mine, name) == getattr(theirs, name), name
        (ours, *found), (theirs, *wanted) = (everything(store.bank("alice")) for store in (imported, encoded))
    assert ours == theirs and {place[0] for place in ours} == {"letter", "note", "numbers"}
    torch.testing.assert_close(found, wanted, atol=CLOSE[dtype], rtol=CLOSE[dtype])


def everything(bank: Any) -> tuple[list[tuple[str | None, int, int]], Tensor, Tensor]:
    """Of every chunk, by number: document, first token and length; scores (H, N); keys and values (2, H, N, S, D)."""
    queries = torch.randn(1, 4, 1, 8, generator=torch.Generator().manual_seed(5))
    found = bank.search(queries, int(bank.chunks[0]))
    chunks, order = found.chunks[0, :, 0].sort(dim=-1)
    origins = [bank.provenance(0, chunk) for chunk in chunks[0].tolist()]
    tokens = (torch.stack((found.keys, found.values)) * found.mask[..., None])[:, 0, :, 0]
    by_chunk = tokens.unflatten(2, (-1, found.chunk_size))[:, torch.arange(4)[:, None], order]
    places = [(each.document, each.start_token, each.length) for each in origins]
    return places, found.scores[0, :, 0].gather(-1, order), by_chunk
