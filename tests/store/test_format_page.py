"""docs/memory-format.md is enough to write a reader: here is one, without a line of this library, and what it reads."""

from __future__ import annotations

import hashlib
import json
import mmap
import sqlite3
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from longmem import LongMem
from longmem.store.reading import Selection, read_chunks
from longmem.store.schema import TABLES
from longmem.store.store import MemoryStore

# -- the reader: struct, sqlite3, json and mmap ----------------------------------------------------------------------

LETTERS = {"F32": "f", "F16": "e", "BF16": "H", "I8": "b", "I32": "i"}


class Reader:
    """A store's folder, read as the page says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.catalog = sqlite3.connect(f"file:{folder}/catalog.sqlite?mode=ro", uri=True)
        self.meta = dict(self.catalog.execute("SELECT key, value FROM meta"))
        self.size, self.dim = int(self.meta["chunk_size"]), int(self.meta["head_dim"])
        self.heads = int(self.meta["heads_kv"])

    def documents(self, namespace: str) -> list[tuple[int, str]]:
        where = "WHERE namespace = ? AND (expires IS NULL OR expires > strftime('%s', 'now') + 0) ORDER BY added, id"
        return self.catalog.execute(f"SELECT id, name FROM documents {where}", (namespace,)).fetchall()

    def pieces(self, document: int) -> Iterator[tuple[Any, ...]]:
        columns = "pieces.tokens, contents.tokens, file, contents.first_chunk, token_ids, text, starts, first_token"
        joins = "JOIN contents ON contents.id = pieces.content JOIN texts ON texts.content = pieces.content"
        yield from self.catalog.execute(
            f"SELECT {columns} FROM pieces {joins} WHERE document = ? ORDER BY ordinal", (document,)
        )

    def token_ids(self, document: int) -> list[int]:
        return [
            id for tokens, *_, ids, _, _, _ in self.pieces(document) for id in struct.unpack_from(f"<{tokens}I", ids)
        ]

    def text(self, document: int) -> str:
        parts = []
        for tokens, whole, _, _, _, text, starts, _ in self.pieces(document):
            end = struct.unpack_from("<I", starts, 4 * tokens)[0] if tokens < whole else None
            parts.append(text[:end])
        return "".join(parts)

    def chunks(self, document: int) -> Iterator[tuple[int, int, list[float], list[float]]]:
        """First token in the document, real tokens, mean keys (Hkv * D), keys and values (Hkv * 2 * S * D)."""
        for tokens, _, file, first_chunk, _, _, _, first_token in self.pieces(document):
            with (self.folder / "segments" / f"{file}.safetensors").open("rb") as stream:
                data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            (header,) = struct.unpack_from("<Q", data)
            arrays = json.loads(data[8 : 8 + header])
            for number in range(-(-tokens // self.size)):
                at = first_chunk + number
                (length,) = self.line(data, arrays, header, "lengths", at)
                kv = self.line(data, arrays, header, "kv", at)
                if "scales" in arrays:
                    scales = self.line(data, arrays, header, "scales", at)
                    run = self.size * self.dim
                    kv = [number * scales[place // run] for place, number in enumerate(kv)]
                yield first_token + number * self.size, length, self.line(data, arrays, header, "keys", at), kv
            data.close()

    def line(self, data: mmap.mmap, arrays: dict[str, Any], header: int, name: str, at: int) -> list[Any]:
        """Row ``at`` of an array."""
        kind, shape = arrays[name]["dtype"], arrays[name]["shape"]
        count, width = 1, struct.calcsize(LETTERS[kind])
        for length in shape[1:]:
            count *= length
        begin = 8 + header + arrays[name]["data_offsets"][0] + at * count * width
        numbers = list(struct.unpack_from(f"<{count}{LETTERS[kind]}", data, begin))
        if kind == "BF16":  # the upper half of a float32
            return [struct.unpack("<f", struct.pack("<I", bits << 16))[0] for bits in numbers]
        return numbers


# -- what it reads is what was written -------------------------------------------------------------------------------


@pytest.fixture
def written(tiny_backbone: Any, byte_tokenizer: Any, made_text: Callable[..., str], tmp_path: Path) -> Any:
    """``written(dtype)``: a store with a long document, an appended one, an expired one, and one of ids."""

    def write(dtype: Any) -> tuple[MemoryStore, str]:
        model = LongMem.from_backbone(tiny_backbone, chunk_size=4, num_retrieved=8, memory_size=64)
        store = MemoryStore.open(tmp_path / "memory", model=model, tokenizer=byte_tokenizer, dtype=dtype)
        long = made_text(180) + "Zürich 𝄞 is not ASCII. " + made_text(20, 1)
        assert len(long) > 16 * 32 + 100  # two contents
        store.add_document("ada", long, name="long.txt", metadata={"year": 1843}, time=10.0)
        store.add_document("ada", made_text(30, 2), name="said.txt", time=5.0)
        store.append("ada", made_text(30, 3), name="said.txt")
        store.add_document("ada", "gone before it was read", name="expired.txt", expires=1.0)
        store.add_document("bob", ids=[5, 6, 7, 8, 9], name="ids")
        return store, long

    return write


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_a_reader_made_from_the_page_reads_what_the_store_reads(written: Any, dtype: str) -> None:
    store, long = written(dtype)
    with store:
        reader = Reader(store.path)  # beside the writer
        assert reader.meta["dtype"] == dtype
        assert reader.meta["fingerprint"] == store.layout.fingerprint
        documents = reader.documents("ada")
        assert [name for _, name in documents] == ["said.txt", "long.txt"]
        assert documents == [(info.id, info.name) for info in store.documents("ada")]
        assert reader.text(documents[1][0]) == long
        for number, name in documents:
            assert reader.text(number) == store.text("ada", name)
            assert reader.token_ids(number) == store.token_ids("ada", name).tolist()
            same_chunks(reader, store, number, name)
        reader.catalog.close()


def same_chunks(reader: Reader, store: MemoryStore, number: int, name: str) -> None:
    found = list(reader.chunks(number))
    with store.snapshot() as snapshot:
        table = read_chunks(snapshot, "ada", Selection(documents=[name]))
    each = table.expand()
    assert [first for first, *_ in found] == each.start_token.tolist()
    assert [length for _, length, *_ in found] == each.length.tolist()
    for (_, _, keys, kv), file, chunk in zip(found, each.file.tolist(), each.chunk.tolist(), strict=True):
        data = store.data_file(table.files[file])
        assert torch.equal(torch.tensor(keys), data.keys(chunk, chunk + 1).flatten())
        wanted = data.gather(torch.tensor([chunk]), torch.float32).flatten()
        assert torch.equal(torch.tensor(kv, dtype=torch.float32), wanted)


def test_digests_sums_and_seals_are_what_the_page_says(written: Any) -> None:
    store, _ = written("int8")
    store.close()
    catalog = sqlite3.connect(f"file:{store.path}/catalog.sqlite?mode=ro", uri=True)
    rows = {
        table: catalog.execute(f"SELECT * FROM {table}").fetchall()
        for table in ("meta", "totals", "files", "contents", "texts", "documents", "pieces")
    }
    assert catalog.execute("PRAGMA user_version").fetchone() == (1,)
    catalog.close()
    for table, lines in rows.items():
        assert all(line[-1] == row_sum(table, line[:-1]) for line in lines)
    totals = {scope: (count, int.from_bytes(total, "little")) for scope, count, total, _ in rows["totals"]}
    for table in ("files", "contents", "texts", "documents", "pieces"):
        assert totals[table] == summed(rows[table])
    assert totals["documents:bob"] == summed([line for line in rows["documents"] if line[1] == "bob"])
    assert totals["totals"] == summed([line for line in rows["totals"] if line[0] != "totals"])
    texts = {line[0]: line for line in rows["texts"]}
    for number, digest, tokens, *_ in rows["contents"]:
        _, ids, text, *_ = texts[number]
        data = struct.pack("<Q", tokens) + ids + (b"" if text is None else b"t" + text.encode())
        assert hashlib.blake2b(data, digest_size=16).digest() == digest
    for name, size, _, blocks, _ in rows["files"]:
        data = (store.path / "segments" / f"{name}.safetensors").read_bytes()
        sums = [zlib.crc32(data[at : at + 65536]) for at in range(0, len(data), 65536)]
        assert (len(data), struct.pack(f"<{len(sums)}I", *sums)) == (size, blocks)
        assert (8 + struct.unpack_from("<Q", data)[0]) % 64 == 0
    whole = (store.path / "catalog.sqlite").read_bytes()
    seal = {"bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}
    assert (store.path / "catalog.seal").read_text() == json.dumps(seal) + "\n"
    record = json.loads((store.path / "writer.lock").read_bytes())
    assert (store.path / "writer.lock").stat().st_size == 2048
    assert record.pop("check") == zlib.crc32(json.dumps(record).encode())
    assert record["commits"] == totals["commits"][0]


def row_sum(table: str, columns: tuple[Any, ...]) -> bytes:
    digest = hashlib.blake2b(digest_size=8, person=table.encode())
    for value in columns:
        if value is None:
            digest.update(b"n")
        elif isinstance(value, int | float):
            digest.update(
                b"i" + struct.pack("<q", value) if isinstance(value, int) else b"d" + struct.pack("<d", value)
            )
        else:
            data = value.encode() if isinstance(value, str) else value
            digest.update((b"t" if isinstance(value, str) else b"b") + struct.pack("<Q", len(data)) + data)
    return digest.digest()


def summed(lines: list[tuple[Any, ...]]) -> tuple[int, int]:
    return len(lines), sum(int.from_bytes(line[-1], "little") for line in lines) % 2**64


def test_the_page_names_every_table_column_and_file() -> None:
    page = (Path(__file__).parents[2] / "docs" / "memory-format.md").read_text()
    for kind, table in TABLES.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{table}` |")]
        for column in kind._fields:
            assert f"`{column} " in line, (table, column)
