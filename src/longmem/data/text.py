"""Readers: files, folders, JSON lines, archives, compressed files and hub data sets, all as ``Document``s.

Archives and compressed files are read through, without unpacking to disk, also inside of one another.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import json
import logging
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain, count, islice
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, BinaryIO, Literal

from longmem.errors import DataError, first_line

log = logging.getLogger(__name__)
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".py")
COMPRESSED: dict[str, Callable[[BinaryIO], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
ARCHIVES = (".tar", ".tgz", ".txz", ".tbz2", ".zip")  # and compressed ones, as .tar.xz
HUB = "hub:"
_SURROGATE = re.compile("[\ud800-\udfff]")
# a RuntimeError is what a password or a compression that Python lacks comes to
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError)


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        id: name inside its source: relative path, archive member, or ``file:line`` of a JSON lines file.
        text: not empty.
        source: the path (or hub name) it was read from.
        record: of JSON lines and hub records, the fields beside the text.
        line: in a JSON lines file, from 1.
    """

    id: str
    text: str
    source: str
    record: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    line: int | None = None

    @property
    def place(self) -> str:
        """Where it was read, for messages: ``source``, or ``source:line``."""
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True)
class TextSource:
    """Where documents come from, and which of them are wanted.

    Attributes:
        paths: files, folders (read recursively), ``.jsonl`` files, ``.tar`` and ``.zip`` archives, any of these
            compressed (``.gz``, ``.xz``, ``.bz2``), patterns (``books/train-*.tar.xz``), or
            ``hub:NAME[:CONFIG[:SPLIT]]`` for a data set of the hub.
        suffixes: what counts as text inside folders and archives; a file named itself is always read.
        include: patterns of document ids; empty takes all. ``*`` also matches ``/``.
        exclude: patterns of document ids that are left out.
        field: the text field of JSON lines and hub records.
        undecodable: what happens to a file or line that is not UTF-8: ``skip`` leaves it out with a warning, and with
            it any line that is no JSON or has no text; ``replace`` puts U+FFFD in place of what cannot be decoded.
        option: how errors tell the user to change one of these settings: ``"pass --{} {}"``; empty: they do not.
    """

    paths: tuple[str, ...]
    suffixes: tuple[str, ...] = TEXT_SUFFIXES
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    field: str = "text"
    undecodable: Literal["error", "skip", "replace"] = "error"
    option: str = ""

    def wants(self, name: str) -> bool:
        """Whether the patterns let this document id through."""
        included = not self.include or any(fnmatchcase(name, pattern) for pattern in self.include)
        return included and not any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def fingerprint(self) -> str:
        """Hash of every file's bytes and of the settings: equal text gives an equal fingerprint."""
        settings = {**asdict(self), "paths": [], "group": "file"}  # groups were a setting once
        del settings["option"]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for path in expand(self.paths):
            if path.startswith(HUB):
                digest.update(path.encode())
                continue
            for file, name in _files_of(Path(path)):
                with file.open("rb") as stream:
                    named = name.encode(errors="surrogateescape")  # a name may hold bytes that are not UTF-8
                    digest.update(named + b"\0" + hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


def numbered(names: Sequence[str]) -> list[str]:
    """Equal names of documents told apart: ``test.txt``, ``test.txt (2)``."""
    found: list[str] = []
    for name in names:
        more = (f"{name} ({number})" for number in count(2))
        found.append(next(shown for shown in chain([name], more) if shown not in found))
    return found


def read_documents(source: TextSource | Iterable[str | Path]) -> Iterator[Document]:
    """Every document of a source, or of paths, in a fixed order.

    Raises:
        DataError: a path is missing, empty, not UTF-8 or holds no text; names the path and the way out.
    """
    if not isinstance(source, TextSource):
        source = TextSource(tuple(str(path) for path in source))
    # at once: a relative path means the folder of this call, also where the documents are read later
    return _read_all(expand(source.paths), source)


def read_stream(stream: BinaryIO, name: str, *, lines: bool = False, **settings: Any) -> Iterator[Document]:
    """What comes through a pipe: one text, or with ``lines`` JSON lines, each a document as soon as it is there.

    Args:
        name: of the document; JSON lines without an ``id`` are ``name:line``.
        settings: fields of ``TextSource``.
    """
    source, count = TextSource((), **settings), 0
    for document in _read_lines(stream, name, name, source) if lines else _read_text(stream, name, name, source):
        count += 1
        yield document
    if not count:
        raise DataError(f"{name}: no text came; pipe in something that is not white space only")


def expand(paths: Sequence[str]) -> list[str]:
    """Whole paths, patterns replaced by what they match; every path exists."""
    found: list[str] = []
    missing: list[str] = []
    for path in paths:
        if path.startswith(HUB):
            found.append(path)
        # an empty name, of a variable that was never set, would be the current folder
        elif path and (there := [path] if Path(path).exists() else sorted(glob.glob(path, recursive=True))):
            found += [str(Path(each).absolute()) for each in there]
        else:
            missing.append(path or "''")
    if missing:
        raise DataError(f"{', '.join(missing)}: no such file or folder (looked from {Path.cwd()}); check the path")
    return found


def _read_all(paths: list[str], source: TextSource) -> Iterator[Document]:
    total = 0
    for path in paths:
        count = 0
        for count, document in enumerate(_read_path(path, source), 1):  # noqa: B007
            yield document
        # a pattern that matches nothing in one path is no fault as long as another path has a match
        if not count and not source.include:
            raise DataError(_nothing_in(path, source))
        total += count
    if not total and source.include:
        there = ", ".join(document.id for document in islice(_read_all(paths, replace(source, include=())), 5))
        asked = ", ".join(source.include)
        raise DataError(f"{', '.join(paths)}: no document matches {asked}; there are {there}; check the pattern")


def _read_path(path: str, source: TextSource) -> Iterator[Document]:
    if path.startswith(HUB):
        yield from _read_hub(path, source)
        return
    for file, name in _files_of(Path(path)):
        # a file that is named itself is read whatever its name
        if str(file) == path or _is_text(name, source):
            with file.open("rb") as stream:
                yield from _read(stream, name, _whole(str(file)), source)


def _read(stream: BinaryIO, name: str, where: str, source: TextSource, kind: str | None = None) -> Iterator[Document]:
    """What a stream holds; ``kind`` is its name in small letters, without the suffixes that are unpacked already."""
    kind = name.lower() if kind is None else kind
    suffix = PurePosixPath(kind).suffix
    if suffix in ARCHIVES or _unpacked(kind).endswith(".tar"):  # tarfile decompresses by itself
        zipped = suffix == ".zip"
        with _undamaged(where, f"{'zip' if zipped else 'tar'} archive"):
            for content, member in _zip_members(stream) if zipped else _tar_members(stream):
                if _is_text(member, source):
                    yield from _read(content, _whole(member), f"{where}:{_whole(member)}", source)
    elif suffix in COMPRESSED:
        with _undamaged(where, f"{suffix} file"), COMPRESSED[suffix](stream) as content:
            yield from _read(content, name, where, source, kind.removesuffix(suffix))
    elif suffix == ".jsonl":
        yield from _read_lines(stream, name, where, source)
    elif source.wants(name):
        yield from _read_text(stream, name, where, source)


def _tar_members(stream: BinaryIO) -> Iterator[tuple[Any, str]]:
    with tarfile.open(fileobj=stream) as archive:
        for member in archive:
            if member.isfile():
                yield archive.extractfile(member), member.name
        # a header that damage made unreadable looks like the end: the checksum behind it does not
        while archive.fileobj is not None and archive.fileobj.read(1 << 20):
            pass


def _zip_members(stream: BinaryIO) -> Iterator[tuple[Any, str]]:
    with zipfile.ZipFile(stream) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                yield archive.open(member), member.filename


@contextmanager
def _undamaged(where: str, what: str) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise DataError(f"{where}: not a readable {what} ({first_line(error)}); fetch or pack it again") from error


def _whole(text: str) -> str:
    """A text with U+FFFD for surrogates: halves of a pair, and Python's spelling of bytes that are not UTF-8."""
    return _SURROGATE.sub("\ufffd", text)


def _unpacked(name: str) -> str:
    """A name without the suffixes of compression."""
    while (suffix := PurePosixPath(name).suffix) in COMPRESSED:
        name = name.removesuffix(suffix)
    return name


def _is_text(name: str, source: TextSource) -> bool:
    """Whether a file of a folder or archive is read, by its name."""
    suffix = PurePosixPath(_unpacked(name.lower())).suffix
    wanted = bool(suffix) and suffix in (".jsonl", *ARCHIVES, *map(str.lower, source.suffixes))
    return wanted and not _is_hidden(PurePosixPath(name))


class _Unreadable(Exception):
    """A file or line: the fault, the way out, and the setting with its value that is another way out."""


def _read_one(where: str, source: TextSource, read: Callable[[], Document | None]) -> Iterator[Document]:
    """What ``read`` finds, if anything; what is unreadable is an error, or where ``undecodable`` says so a warning."""
    try:
        document = read()
    except _Unreadable as problem:
        fault, way_out, *setting = problem.args
        if source.undecodable != "skip":
            other = f", or {source.option.format(*setting)}" if source.option else ""
            raise DataError(f"{where}: {fault}; {way_out}{other}") from problem
        log.warning("%s: %s; skipped", where, fault)
        return
    if document is not None and document.text.strip():
        yield document


def _read_text(stream: BinaryIO, name: str, where: str, source: TextSource) -> Iterator[Document]:
    def read() -> Document:
        return Document(_whole(name), _decoded(stream.read(), source).replace("\r\n", "\n"), where)

    yield from _read_one(where, source, read)


def _read_lines(stream: BinaryIO, name: str, path: str, source: TextSource) -> Iterator[Document]:
    for number, line in enumerate(stream, 1):
        read = partial(_line, line, f"{_whole(name)}:{number}", path, number, source)
        yield from _read_one(f"{path}:{number}", source, read)


def _read_hub(path: str, source: TextSource) -> Iterator[Document]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(f"{path}: reading the hub needs `datasets`; pip install 'longmem-lm[data]'") from error
    name, config, split = [*path.removeprefix(HUB).split(":"), "", ""][:3]
    try:
        records = load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the hub has no common base of errors
        reason = f"cannot be loaded ({first_line(error)})"
        raise DataError(f"{path}: the hub data set {reason}; write hub:NAME:CONFIG:SPLIT") from error
    for number, record in enumerate(records):
        yield from _read_one(path, source, partial(_document, record, f"{name}:{number}", path, None, source))


def _not_utf8(fault: str) -> _Unreadable:
    return _Unreadable(f"not UTF-8 text ({fault})", "convert it, exclude it", "undecodable", "skip or replace")


def _decoded(data: bytes, source: TextSource) -> str:
    try:
        text = data.decode("utf-8", errors="replace" if source.undecodable == "replace" else "strict")
    except UnicodeDecodeError as error:
        raise _not_utf8(f"byte 0x{data[error.start]:02x} at offset {error.start}") from error
    return text.removeprefix("\ufeff")


def _line(data: bytes, name: str, path: str, number: int, source: TextSource) -> Document | None:
    line = _decoded(data, source)
    if not line.strip():
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        fault = f"not JSON ({getattr(error, 'msg', error)}), every line must be one JSON object"
        raise _Unreadable(fault, "mend the line", "undecodable", "skip") from error
    # JSON can spell half of a pair, which no text can hold: "\ud83d" where an emoji was cut in two
    if "\\ud" in line.lower() and (half := _SURROGATE.search(flat := json.dumps(record, ensure_ascii=False))):
        if source.undecodable != "replace":
            raise _not_utf8(f"half of a character, \\u{ord(half[0]):04x}")
        record = json.loads(_whole(flat))
    return _document(record, name, path, number, source)


def _document(record: Any, name: str, path: str, line: int | None, source: TextSource) -> Document | None:
    """Of a record; None where it is not wanted."""
    if not isinstance(record, dict):
        raise _Unreadable(f"{record!r:.40} is no object with a text field", "mend the line", "undecodable", "skip")
    text, given = record.get(source.field), record.get("id")
    if not isinstance(text, str):
        there = f"it holds {text!r:.40}; " if text is not None else ""
        fault = f"no text in the field {source.field!r} ({there}fields: {', '.join(record) or 'none'})"
        raise _Unreadable(fault, "rename the field that has it", "field", "NAME")
    if isinstance(given, dict | list):
        raise _Unreadable(f"the id is {given!r:.40}, no text or number", "mend the line", "undecodable", "skip")
    name = name if given is None or not str(given).strip() else str(given)
    others = {key: value for key, value in record.items() if key != source.field}
    return Document(name, text, path, others, line) if source.wants(name) else None


def _files_of(path: Path) -> list[tuple[Path, str]]:
    """A file and its name; of a folder all files with their paths in it, in the order of these."""
    if not path.is_dir():
        return [(path, path.name)]
    files = [(file, file.relative_to(path)) for file in sorted(path.rglob("*")) if file.is_file()]
    return [(file, name.as_posix()) for file, name in files if not _is_hidden(name)]


def _is_hidden(path: PurePath) -> bool:
    """What begins with a dot, and what Python and macOS leave beside their files."""
    return any(part in ("__pycache__", "__MACOSX") or (part[0] == "." and part != "..") for part in path.parts)


def _nothing_in(path: str, source: TextSource) -> str:
    if source.exclude or source.undecodable == "skip":
        return f"{path}: no text is left after what is excluded or skipped; name more files"
    kind = "folder" if Path(path).is_dir() else "archive" if _unpacked(path.lower()).endswith(ARCHIVES) else None
    if kind is None:
        return f"{path}: no text, the file is empty or holds white space only; name one with text in it"
    kinds = f"{', '.join(source.suffixes)}, .jsonl, .tar and .zip, also compressed"
    return f"{path}: no text in this {kind}; looked for {kinds}; name other files one by one"


# Python packages: real long text that every machine has. Source refers back to itself over long distances (names,
# signatures, whole idioms), which is what a memory is for.

HELD_OUT = ("email", "http", "logging", "xmlrpc")
"""Packages of the standard library that are measured on, and never trained on."""
# Tests and other people's packages differ from machine to machine; the rest are tables, not text that refers back.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "encodings", "pydoc_data"}
SHORTEST = 2_000
"""Packages of fewer characters are left out."""
FILE_LINE = "# file: "


def packages(library: Path) -> Iterator[tuple[str, str]]:
    """Name and text of every package of a folder; a module outside any package is a package of one file."""
    for top in sorted(library.iterdir()):
        text = "" if top.name.startswith((".", "_sysconfigdata")) else package_text(top, library)
        if len(text) >= SHORTEST:
            yield top.name.removesuffix(".py"), text


def package_text(top: Path, library: Path) -> str:
    """The text of a package or module: its files in the order of their paths, each after a line that names it."""
    parts = []
    for file in sorted(top.rglob("*.py")) if top.is_dir() else [top] if top.suffix == ".py" else []:
        path = file.relative_to(library)
        if LEFT_OUT.isdisjoint(path.parts):
            # a few test-like files of the library are not UTF-8 on purpose
            text = file.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
            parts.append(f"{FILE_LINE}{path.as_posix()}\n{text}\n")
    return "".join(parts)
