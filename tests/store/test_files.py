"""Data files: whole or not there, readable by safetensors, every block compared before it is used."""

from __future__ import annotations

import errno
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors import safe_open

from longmem.errors import StoreDamaged, StoreError, StoreFull
from longmem.store import durable
from longmem.store.durable import FAILPOINTS, failpoint, file_errors, placed
from longmem.store.precision import pack, quantise, unpack
from longmem.store.records import DTYPES, Layout
from longmem.store.segments import BLOCK, DataFile, OtherBits, SegmentGone, bad_blocks, file_name, write_file

NAME = "0123456789abcdef"


def layout(dtype: Any = "float32") -> Layout:
    return Layout("0" * 16, "f", "numbers", 1, 2, 8, 4, 32, dtype, time.time())


def chunks(count: int = 700, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 5, (count,), generator=draw)
    real = (torch.arange(4) < lengths[:, None])[:, None, None, :, None]
    return torch.randn(count, 2, 2, 4, 8, generator=draw) * real, lengths


@pytest.fixture
def room(tmp_path: Path) -> Path:
    (tmp_path / "staging").mkdir()
    (tmp_path / "segments").mkdir()
    return tmp_path


def written(room: Path, dtype: Any = "float32", **more: Any) -> tuple[DataFile, torch.Tensor, torch.Tensor]:
    values, lengths = chunks()
    stored = pack(values, lengths, dtype)
    parts = [stored.slice(0, 3), stored.slice(3, 650), stored.slice(650, 700)]
    row = write_file(room / "staging", room / "segments", NAME, parts, layout(dtype), **more)
    return DataFile.open(room / "segments" / file_name(NAME), row, layout(dtype)), values, lengths


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_what_was_written_is_read(room: Path, dtype: Any) -> None:
    file, values, lengths = written(room, dtype)
    assert torch.equal(file.lengths(), lengths.int()) and len(file) == 700
    means = values[:, :, 0].sum(2) / lengths[:, None, None]
    assert torch.allclose(file.keys(), means, atol=1e-6) and torch.equal(file.keys(10, 12), file.keys()[10:12])
    where = torch.tensor([0, 699, 3, 3, 650])
    found = file.gather(where, torch.float32)
    limit = {"float32": 0.0, "float16": 2e-3, "bfloat16": 2e-2, "int8": 0.02}[dtype]
    assert float((found - values[where]).abs().max()) <= limit
    assert not (room / "staging" / file_name(NAME)).exists()


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_safetensors_reads_the_same(room: Path, dtype: Any) -> None:
    file, _, _ = written(room, dtype)
    with safe_open(file.path, "pt") as other:
        assert other.metadata() == {"format": "longmem-segment-1", "id": NAME}
        assert torch.equal(other.get_tensor("keys"), file.keys())
        kv = other.get_tensor("kv")
        assert kv.dtype == DTYPES[dtype][0]
        if dtype == "int8":
            kv = (kv.float() * other.get_tensor("scales")[..., None, None]).half()
        assert torch.equal(kv, file.gather(torch.arange(700)))


def test_the_same_chunks_give_the_same_bytes(room: Path) -> None:
    first = written(room)[0]
    data = first.path.read_bytes()
    assert written(room, expected=first.row.blocks)[0].path.read_bytes() == data
    values, lengths = chunks(seed=1)
    with pytest.raises(OtherBits):
        write_file(
            room / "staging",
            room / "segments",
            NAME,
            [pack(values, lengths, "float32")],
            layout(),
            expected=first.row.blocks,
        )
    assert first.path.read_bytes() == data and not list((room / "staging").iterdir())


def test_every_flipped_byte_is_found_and_never_read(room: Path) -> None:
    file, values, _ = written(room)
    data = file.path.read_bytes()
    draw = np.random.default_rng(0)
    for place in [0, 7, len(data) - 1, *draw.integers(0, len(data), 40).tolist()]:
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(draw.integers(8))
        file.path.write_bytes(bytes(flipped))
        assert bad_blocks(file.path, file.row) == [place // BLOCK]
        opened = DataFile.open(file.path, file.row, layout())
        for chunk in range(0, 700, 50):
            where = torch.arange(chunk, chunk + 50)
            if place // BLOCK in opened.blocks_of(chunk, chunk + 50):
                with suppress(StoreDamaged):  # its keys and values may lie beside the block
                    assert torch.equal(opened.gather(where), values[where])
                with pytest.raises(StoreDamaged, match=f"{file.path.name}: block {place // BLOCK} "):
                    opened.chunks(chunk, chunk + 50)
            else:
                assert torch.equal(opened.gather(where), values[where])


def test_a_cut_file_is_damaged_and_a_missing_one_is_gone(room: Path) -> None:
    file, _, _ = written(room)
    file.path.write_bytes(file.path.read_bytes()[:-1])
    with pytest.raises(StoreDamaged, match="bytes where"):
        DataFile.open(file.path, file.row, layout())
    file.path.unlink()
    with pytest.raises(SegmentGone, match="missing"):
        DataFile.open(file.path, file.row, layout())


def test_a_file_that_was_removed_is_read_on_by_those_who_have_it_open(room: Path) -> None:
    file, values, _ = written(room)
    file.path.unlink()
    assert torch.equal(file.gather(torch.arange(700)), values)


def test_int8_is_exact_to_half_a_step_and_zero_stays_zero() -> None:
    values, _ = chunks(50)
    values[3] = 0
    integers, scales = quantise(values)
    again = unpack(integers.numpy(), scales.numpy(), "int8", torch.float32)
    assert bool(((again - values).abs() <= scales[..., None, None] / 2 + 1e-7).all())
    assert float(again[3].abs().max()) == 0 and int(integers.min()) >= -127


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_what_is_not_finite_is_refused(dtype: Any, bad: float) -> None:
    values, lengths = chunks(10)
    values[4, 0, 1, 0, 0] = bad
    with pytest.raises(StoreError, match=f"cannot be stored as {dtype}"):
        pack(values, lengths, dtype)


@contextmanager
def size_limit(limit: int) -> Iterator[None]:
    """No file of this process can grow beyond ``limit`` bytes: as on a full disk, for anyone, root too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_nothing_behind(room: Path) -> None:
    with size_limit(100_000), pytest.raises(StoreFull, match="nothing was changed: make room"):
        written(room)
    assert not [path for path in room.rglob("*") if path.is_file()]


@pytest.mark.parametrize("point", [name for name in FAILPOINTS if name.startswith("file.")])
def test_a_file_is_there_whole_or_not_at_all_wherever_writing_fails(room: Path, point: str) -> None:
    (room / "segments" / "x").write_bytes(b"old")
    armed = durable._Armed(f"{point}=EIO")
    with (
        patch.object(durable, "_armed", {point: armed}),
        pytest.raises(StoreDamaged, match="Input/output error"),
        placed(room / "staging", room / "segments" / "x") as stream,
    ):
        stream.write(b"new")
    assert (room / "segments" / "x").read_bytes() in (b"old", b"new")
    assert not list((room / "staging").iterdir())


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        (errno.ENOSPC, StoreFull, "No space left on device while writing; nothing was changed: make room"),
        (errno.EDQUOT, StoreFull, "quota"),
        (errno.EFBIG, StoreFull, "File too large"),
        (errno.EROFS, StoreFull, "Read-only file system while writing; nothing was changed: allow writing"),
        (errno.EACCES, StoreFull, "Permission denied"),
        (errno.EIO, StoreDamaged, "the device fails"),
        (errno.EMFILE, StoreError, "Too many open files"),
    ],
)
def test_errors_of_the_system_are_one_clear_line(code: int, kind: type[StoreError], message: str) -> None:
    with pytest.raises(kind, match=message) as caught, file_errors(Path("memory"), "writing"):
        raise OSError(code, "what the system says")
    assert type(caught.value) is kind and "\n" not in str(caught.value)


def test_a_failpoint_strikes_the_time_it_is_told() -> None:
    armed = durable._Armed("add.placed:3=ENOSPC")
    with patch.object(durable, "_armed", {"add.placed": armed}):
        failpoint("add.placed")
        failpoint("add.committed")
        failpoint("add.placed")
        with pytest.raises(OSError, match="No space"):
            failpoint("add.placed")
        failpoint("add.placed")
    with pytest.raises(StoreError, match=r"names no failpoint; there are: create\.folder"):
        durable._Armed("add.nowhere")


def test_every_failpoint_stands_somewhere_in_the_source() -> None:
    source = "".join(path.read_text() for path in Path(durable.__file__).parent.glob("*.py"))
    for name in FAILPOINTS:
        assert source.count(f'"{name}"') >= 2, name
