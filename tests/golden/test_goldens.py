"""Numbers frozen with the code of the tag ``house-before`` still come out."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.golden.making import DTYPES, HERE, IDS, LETTER, LOGITS, NOTE, family_logits, fill, store_model
from torch import Tensor

from longmem import LongMem
from longmem.store import MemoryStore

CLOSE = {"float16": 2e-3, "int8": 2e-2}
"""Two encodings of the same text may round to neighbouring numbers."""


@pytest.fixture(scope="module")
def frozen() -> dict[str, Tensor]:
    logits: dict[str, Tensor] = load_file(LOGITS)
    return logits


@pytest.mark.parametrize("name", sorted({key.split("/")[0] for key in load_file(LOGITS)}))
def test_logits_with_and_without_memory(name: str, frozen: dict[str, Tensor]) -> None:
    expected = {key: value for key, value in frozen.items() if key.startswith(f"{name}/")}
    found = family_logits(name)
    assert found.keys() == expected.keys() and len(found) == 6
    for key, logits in found.items():
        torch.testing.assert_close(
            logits, expected[key], atol=2e-6, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.fixture(scope="module")
def model() -> LongMem:
    return store_model()


@pytest.fixture(params=DTYPES)
def stores(request: pytest.FixtureRequest, tmp_path: Path, model: LongMem, byte_tokenizer: Any) -> Iterator[Any]:
    """A store that imported the archive of format 1, and one that encoded the same documents itself."""
    settings: dict[str, Any] = {"model": model, "tokenizer": byte_tokenizer, "dtype": request.param}
    with (
        MemoryStore.open(tmp_path / "imported", **settings) as imported,
        MemoryStore.open(tmp_path / "encoded", **settings) as encoded,
    ):
        imported.import_(HERE / f"format-1-{request.param}.tar", "alice")
        fill(encoded)
        yield imported, encoded, CLOSE[request.param]


def test_import_of_a_format_1_export_is_encoding_anew(stores: Any) -> None:
    imported, encoded, close = stores
    assert [info.name for info in imported.documents("alice")] == ["letter", "note", "numbers"]
    assert imported.text("alice", "letter") == LETTER and imported.text("alice", "note") == NOTE
    assert imported.token_ids("alice", "numbers").tolist() == IDS
    for mine, theirs in zip(imported.documents("alice"), encoded.documents("alice"), strict=True):
        for name in ("name", "source", "metadata", "added", "expires", "tokens"):
            assert getattr(mine, name) == getattr(theirs, name), name
        assert imported.token_ids("alice", mine.name).tolist() == encoded.token_ids("alice", mine.name).tolist()
    banks = [store.bank("alice") for store in stores[:2]]
    queries = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(5))
    found = [bank.search(queries, 200) for bank in banks]  # all there is, so that near ties change nothing
    assert int(found[0].chunk_mask[0, 0, 0].sum()) == int(found[1].chunk_mask[0, 0, 0].sum()) > 80
    torch.testing.assert_close(found[0].scores, found[1].scores, atol=close, rtol=close)
    mine, theirs = (_by_chunk(each, bank) for each, bank in zip(found, banks, strict=True))
    assert mine.keys() == theirs.keys()
    for place, tokens in mine.items():
        torch.testing.assert_close(tokens, theirs[place], atol=close, rtol=close)


def _by_chunk(found: Any, bank: Any) -> dict[tuple[str, int, int], Tensor]:
    """Keys and values (H, 2, S, D) of every chunk found for the first token, by document, first token and length."""
    tokens = torch.stack((found.keys, found.values))[:, 0, :, 0].unflatten(2, (-1, found.chunk_size))
    chunks = {}
    for chunk in found.chunks[0, 0, 0].tolist():
        if chunk >= 0:
            origin = bank.provenance(0, chunk)
            where = (found.chunks[0, :, 0] == chunk).nonzero()
            assert len(where) == len(found.chunks[0])
            tokens_of_head = [tokens[:, head, place, : origin.length] for head, place in where.tolist()]
            chunks[str(origin.document), origin.start_token, origin.length] = torch.stack(tokens_of_head)
    return chunks
