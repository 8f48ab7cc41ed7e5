"""Compressed files and archives: what is packed in them, by name, without unpacking to disk."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, BinaryIO, TypeVar

from longmem.errors import DataError

Item = TypeVar("Item")
Wanted = Callable[[str, str], bool]
Read = Callable[[BinaryIO, str, str], Iterator[Item]]

COMPRESSED: dict[str, Callable[[BinaryIO], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
ARCHIVES = (".tar", ".tgz", ".txz", ".tbz2", ".zip")  # and compressed ones, as .tar.xz
FOREIGN = (".zst", ".7z", ".rar", ".lz4", ".br")  # packed in ways that Python's library does not read


def unpacked(name: str) -> str:
    """A name without the suffixes of compression."""
    while (suffix := PurePosixPath(name).suffix) in COMPRESSED:
        name = name.removesuffix(suffix)
    return name


@contextmanager
def decompressed(stream: BinaryIO, suffix: str, where: str) -> Iterator[BinaryIO]:
    """The content of a compressed file.

    Args:
        suffix: a key of ``COMPRESSED``.
        where: the file, for messages.

    Raises:
        DataError: it is damaged.
    """
    with _damage(where, f"{suffix} file"), COMPRESSED[suffix](stream) as opened:
        yield opened


def read_members(stream: BinaryIO, where: str, *, zipped: bool, wanted: Wanted, read: Read[Item]) -> Iterator[Item]:
    """What ``read`` gives of the files in a tar or zip archive, in its order.

    Args:
        where: the archive, for messages.
        zipped: whether it is a zip archive.
        wanted: whether to read a file, told its name and its place, ``archive:name``.
        read: told its content, name and place.

    Raises:
        DataError: it is damaged, or locked by a password.
    """
    yield from (_read_zip if zipped else _read_tar)(stream, where, wanted, read)


def _read_tar(stream: BinaryIO, where: str, wanted: Wanted, read: Read[Item]) -> Iterator[Item]:
    with _damage(where, "tar archive"), tarfile.open(fileobj=stream) as archive:
        for member in archive:
            place = f"{where}:{member.name}"
            if member.isfile() and wanted(member.name, place):
                opened: Any = archive.extractfile(member)
                yield from read(opened, member.name, place)
        # a header that damage made unreadable looks like the end: the checksum behind it does not
        while archive.fileobj is not None and archive.fileobj.read(1 << 20):
            pass


def _read_zip(stream: BinaryIO, where: str, wanted: Wanted, read: Read[Item]) -> Iterator[Item]:
    with _damage(where, "zip archive"), zipfile.ZipFile(stream) as archive:
        for member in archive.infolist():
            place = f"{where}:{member.filename}"
            if not member.is_dir() and wanted(member.filename, place):
                if member.flag_bits & 1:
                    raise DataError(f"{place}: locked by a password; unpack it first")
                opened: Any = archive.open(member)
                with opened:
                    yield from read(opened, member.filename, place)


@contextmanager
def _damage(where: str, what: str) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError,
            NotImplementedError) as error:  # fmt: skip
        reason = str(error).split("\n")[0].rstrip(":")
        raise DataError(f"{where}: not a readable {what} ({reason}); fetch or pack it again") from error
