"""A reader written from docs/memory-format.md alone, without this library, finds what the store says."""

import hashlib
import json
import sqlite3
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.store.small import chunks_of, open_small, words

NUMPY = {"float32": "<f4", "float16": "<f2", "bfloat16": "<i2", "int8": "<i1"}


def read(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Token ids, text, keys and values, and mean keys of every document."""
    db = sqlite3.connect(f"file:{folder / 'catalog.sqlite'}?mode=ro", uri=True)
    assert db.execute("PRAGMA user_version").fetchone() == (2,)
    meta = dict(db.execute("SELECT key, value FROM meta"))
    layout = json.loads(meta["layout"])
    heads = layout["heads_kv"] * len(layout["memory_layers"])
    size, dim, count = layout["chunk_size"], layout["head_dim"], meta["records"]
    kv = np.fromfile(folder / f"kv-{meta['generation']:06d}.bin", NUMPY[layout["dtype"]])
    kv = kv.reshape(-1, heads, 2, size, dim)[:count]
    keys = np.fromfile(folder / f"keys-{meta['generation']:06d}.bin", "<f4").reshape(len(kv), -1)[:count]
    found = {}
    for number, namespace, name, tokens in db.execute("SELECT id, namespace, name, tokens FROM document"):
        ids: list[int] = []
        text, rows = "", list[int]()
        for piece, first_token, kept in db.execute(
            "SELECT piece, first_token, tokens FROM part WHERE document = ? ORDER BY ordinal", (number,)
        ):
            digest, first, chunks, crc, ids_, text_, starts = db.execute(
                "SELECT digest, first, count, crc, token_ids, text, starts FROM piece WHERE id = ?", (piece,)
            ).fetchone()
            assert first_token == len(ids) and chunks == -(-len(ids_) // 4 // size)
            records = slice(first, first + chunks)
            assert zlib.crc32(keys[records].tobytes(), zlib.crc32(kv[records].tobytes())) == crc
            data = struct.pack("<Q", len(ids_) // 4) + ids_ + (b"" if text_ is None else b"t" + text_.encode())
            assert hashlib.blake2b(data, digest_size=16).digest() == digest
            ids += np.frombuffer(ids_, "<u4")[:kept].tolist()
            if text_ is not None:
                where = np.frombuffer(starts, "<u4")
                text += text_[: where[kept]] if kept < len(where) else text_
            rows += range(first, first + -(-kept // size))
        assert tokens == len(ids)
        found[namespace, name] = {"ids": ids, "text": text, "kv": kv[rows], "small": keys[rows]}
    db.close()
    return found


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_a_reader_written_from_the_page_finds_what_the_store_says(tmp_path: Path, dtype: Any) -> None:
    with open_small(tmp_path / "memory", dtype=dtype) as store:
        store.add_document("alice", words(1, 500), name="a")
        store.append("alice", words(2, 77), name="a")
        store.add_document("bob", ids=range(9), name="b")
        store.add_document("bob", words(3, 300), name="gone")
        store.forget("bob", name="gone")
        store.compact()
        expected = {(space, name): some for space in ("alice", "bob") for name, some in chunks_of(store, space).items()}
        ids = {key: store.token_ids(*key).tolist() for key in expected}
        text = store.text("alice", "a")
    found = read(tmp_path / "memory")
    assert found.keys() == expected.keys()
    assert found["alice", "a"]["text"] == text == words(1, 500) + words(2, 77)
    for key, chunks in expected.items():
        assert found[key]["ids"] == ids[key]
        assert np.array_equal(found[key]["kv"], chunks.kv)
        assert np.array_equal(found[key]["small"], chunks.raw()[1].view("<f4"))
