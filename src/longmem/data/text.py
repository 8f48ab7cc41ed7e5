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
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import groupby, islice
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, BinaryIO, Literal

from longmem.errors import DataError, first_line

log = logging.getLogger(__name__)
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".py")
COMPRESSED: dict[str, Callable[[BinaryIO], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
ARCHIVES = (".tar", ".tgz", ".txz", ".tbz2", ".zip")  # and compressed ones, as .tar.xz
FOREIGN = (".zst", ".7z", ".rar", ".lz4", ".br")  # packed in ways that Python's library does not read
HUB = "hub:"
_SURROGATE = re.compile("[\ud800-\udfff]")
_DAMAGE = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, NotImplementedError,
)  # fmt: skip


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
class WaysOut:
    """What errors propose, in the words of the command or file that named the text."""

    missing: str = "check the path"
    undecodable: str = "convert it, or name other files"
    line: str = "mend the line"
    suffixes: str = "name other files by themselves"
    field: str = "rename the field that has it to 'text'"


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
        group: ``file``: every file is a document; ``folder``: the text files below each top folder are joined, in the
            order of their paths, into one document.
        undecodable: what happens to a file or line that is not UTF-8: ``skip`` leaves it out with a warning, and with
            it any line that is no JSON or has no text; ``replace`` puts U+FFFD in place of what cannot be decoded.
    """

    paths: tuple[str, ...]
    suffixes: tuple[str, ...] = TEXT_SUFFIXES
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    field: str = "text"
    group: Literal["file", "folder"] = "file"
    undecodable: Literal["error", "skip", "replace"] = "error"
    ways_out: WaysOut = WaysOut()

    def wants(self, name: str) -> bool:
        """Whether the patterns let this document id through."""
        included = not self.include or any(_matches(name, pattern) for pattern in self.include)
        return included and not any(_matches(name, pattern) for pattern in self.exclude)

    def fingerprint(self) -> str:
        """Hash of every file's bytes and of the settings: equal text gives an equal fingerprint."""
        settings = {**asdict(self), "paths": []}
        del settings["ways_out"]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for path in expand(self.paths, self.ways_out):
            if path.startswith(HUB):
                digest.update(path.encode())
                continue
            for file, name in _files_of(Path(path)):
                with file.open("rb") as stream:
                    digest.update(name.encode() + b"\0" + hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


def read_documents(paths: TextSource | Iterable[str | Path], **settings: object) -> Iterator[Document]:
    """Every document of a source, in a fixed order.

    Args:
        paths: a ``TextSource``, or its paths.
        settings: the other fields of ``TextSource``, where ``paths`` are paths.

    Raises:
        DataError: a path is missing, empty, not UTF-8 or holds no text; names the path and the way out.
    """
    if not isinstance(paths, TextSource):
        paths = TextSource(tuple(str(path) for path in paths), **settings)  # type: ignore[arg-type]
    # at once: a relative path means the folder of this call, also where the documents are read later
    documents = _read_all(expand(paths.paths, paths.ways_out), paths)
    return _grouped(documents) if paths.group == "folder" else documents


def read_stream(stream: BinaryIO, name: str, *, lines: bool = False, **settings: object) -> Iterator[Document]:
    """What comes through a pipe: one text, or with ``lines`` JSON lines, each a document as soon as it is there.

    Args:
        name: of the document; JSON lines without an ``id`` are ``name:line``.
        settings: fields of ``TextSource``.
    """
    source, count = TextSource((), **settings), 0  # type: ignore[arg-type]
    for document in _read_lines(stream, name, name, source) if lines else _read_text(stream, name, name, source):
        count += 1
        yield document
    if not count:
        raise DataError(f"{name}: no text came; pipe in something that is not white space only")


def expand(paths: Sequence[str], ways_out: WaysOut = WaysOut()) -> list[str]:
    """Whole paths, patterns replaced by what they match; every path exists."""
    found: list[str] = []
    missing: list[str] = []
    for path in paths:
        # some file systems decompose the accents of a name that was typed composed
        forms = [path, *(unicodedata.normalize(form, path) for form in ("NFC", "NFD"))]
        if path.startswith(HUB):
            found.append(path)
        # an empty name, of a variable that was never set, would be the current folder
        elif path and (there := next((form for form in forms if Path(form).exists()), None)):
            found.append(str(Path(there).absolute()))
        elif path and (matches := sorted(glob.glob(path, recursive=True))):
            found.extend(str(Path(match).absolute()) for match in matches)
        else:
            missing.append(path or "''")
    if missing:
        raise DataError(f"{', '.join(missing)}: no such file or folder (looked from {Path.cwd()}); {ways_out.missing}")
    return found


def _read_all(paths: list[str], source: TextSource) -> Iterator[Document]:
    unmatched = set(source.include)
    for path in paths:
        count = 0
        for document in _read_path(path, source):
            count += 1
            unmatched -= {pattern for pattern in unmatched if _matches(document.id, pattern)}
            yield document
        # a pattern that matches nothing in one path is no fault as long as another path has a match
        if not count and not source.include:
            raise DataError(_nothing_in(path, source))
    patterns = ", ".join(sorted(unmatched))
    if unmatched and unmatched < set(source.include):
        log.warning("no document matches %s", patterns)
    elif unmatched:
        there = ", ".join(document.id for document in islice(_read_all(paths, replace(source, include=())), 5))
        raise DataError(
            f"{', '.join(source.paths)}: no document matches {patterns}; there are {there}; check the pattern"
        )


def _read_path(path: str, source: TextSource) -> Iterator[Document]:
    if path.startswith(HUB):
        yield from _read_hub(path, source)
        return
    for file, name in _files_of(Path(path)):
        # a file that is named itself is read whatever its name
        if str(file) == path or _is_text(name, str(file), source):
            with file.open("rb") as stream:
                yield from _read(stream, name, _whole(str(file)), source)


def _read(stream: BinaryIO, name: str, where: str, source: TextSource, kind: str | None = None) -> Iterator[Document]:
    """What a stream holds; ``kind`` is its name in small letters, without the suffixes that are unpacked already."""
    kind = name.lower() if kind is None else kind
    suffix = PurePosixPath(kind).suffix
    if suffix in ARCHIVES or _unpacked(kind).endswith(".tar"):  # tarfile decompresses by itself
        with _undamaged(where, f"{'zip' if suffix == '.zip' else 'tar'} archive"):
            for content, member in _zip_members(stream, where) if suffix == ".zip" else _tar_members(stream):
                if _is_text(member, f"{where}:{member}", source):
                    yield from _read(content, _whole(member), f"{where}:{_whole(member)}", source)
    elif suffix in COMPRESSED:
        with _undamaged(where, f"{suffix} file"), COMPRESSED[suffix](stream) as content:
            yield from _read(content, name, where, source, kind.removesuffix(suffix))
    elif suffix in FOREIGN:
        raise DataError(f"{where}: {suffix} files are not read; unpack it first")
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


def _zip_members(stream: BinaryIO, where: str) -> Iterator[tuple[Any, str]]:
    with zipfile.ZipFile(stream) as archive:
        for member in archive.infolist():
            if member.flag_bits & 1:
                raise DataError(f"{where}:{member.filename}: locked by a password; unpack it first")
            if not member.is_dir():
                yield archive.open(member), member.filename


@contextmanager
def _undamaged(where: str, what: str) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        reason = str(error).split("\n")[0].rstrip(":")
        raise DataError(f"{where}: not a readable {what} ({reason}); fetch or pack it again") from error


def _whole(text: str) -> str:
    """A text with U+FFFD for surrogates: halves of a pair, and Python's spelling of bytes that are not UTF-8."""
    return _SURROGATE.sub("\ufffd", text)


def _unpacked(name: str) -> str:
    """A name without the suffixes of compression."""
    while (suffix := PurePosixPath(name).suffix) in COMPRESSED:
        name = name.removesuffix(suffix)
    return name


def _is_text(name: str, where: str, source: TextSource) -> bool:
    """Whether a file of a folder or archive is read, by its name; warns of packed files that may hold text."""
    if _is_hidden(PurePosixPath(name)):
        return False
    kind = _unpacked(name.lower())
    suffix = PurePosixPath(kind).suffix
    if suffix in FOREIGN or (not suffix and kind != name.lower()):
        log.warning("%s: left out; it may hold text, but cannot be looked into; unpack it", _whole(where))
    return bool(suffix) and suffix in (".jsonl", *ARCHIVES, *map(str.lower, source.suffixes))


class _Unreadable(DataError):
    """A file or line that ``undecodable = "skip"`` leaves out."""

    def __init__(self, where: str, fault: str, way_out: str) -> None:
        super().__init__(f"{where}: {fault}; {way_out}")
        self.fault = f"{where}: {fault}"


@contextmanager
def _skipping(source: TextSource) -> Iterator[None]:
    try:
        yield
    except _Unreadable as error:
        if source.undecodable != "skip":
            raise
        log.warning("%s; skipped", error.fault)


def _read_text(stream: BinaryIO, name: str, where: str, source: TextSource) -> Iterator[Document]:
    text = ""
    with _skipping(source):
        text = _decoded(stream.read(), where, source)
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    if text.strip():
        yield Document(_whole(name), text, where)


def _read_lines(stream: BinaryIO, name: str, path: str, source: TextSource) -> Iterator[Document]:
    for number, line in enumerate(stream, 1):
        document = None
        with _skipping(source):
            if line.strip():
                record = _parsed(line, f"{path}:{number}", source)
                document = _record(record, f"{_whole(name)}:{number}", path, number, source)
        if document is not None:
            yield document


def _decoded(data: bytes, where: str, source: TextSource) -> str:
    try:
        return data.decode("utf-8", errors="replace" if source.undecodable == "replace" else "strict")
    except UnicodeDecodeError as error:
        fault = f"not UTF-8 text (byte 0x{data[error.start]:02x} at offset {error.start})"
        raise _Unreadable(where, fault, source.ways_out.undecodable) from error


def _parsed(line: bytes, where: str, source: TextSource) -> Any:
    text = _decoded(line, where, source).removeprefix("\ufeff")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        fault = f"not JSON ({getattr(error, 'msg', error)}); every line must be one JSON object"
        raise _Unreadable(where, fault, source.ways_out.line) from error
    # JSON can spell half of a pair, which no text can hold: "\ud83d" where an emoji was cut in two
    if "\\ud" not in text.lower() or not (half := _SURROGATE.search(flat := json.dumps(record, ensure_ascii=False))):
        return record
    if source.undecodable == "replace":
        return json.loads(_whole(flat))
    fault = f"not UTF-8 text (half of a character, \\u{ord(half[0]):04x})"
    raise _Unreadable(where, fault, source.ways_out.undecodable)


def _record(record: object, name: str, path: str, line: int | None, source: TextSource) -> Document | None:
    where = path if line is None else f"{path}:{line}"
    if not isinstance(record, dict):
        raise _Unreadable(where, f"{_kind(record)}, not an object with a text field", source.ways_out.line)
    text, given = record.get(source.field), record.get("id")
    if not isinstance(text, str):
        fault = f"the field {source.field!r} holds {_kind(text)}, not text"
        fault = fault if source.field in record else f"no text field {source.field!r}"
        raise _Unreadable(where, f"{fault} (it has: {', '.join(record) or 'nothing'})", source.ways_out.field)
    if isinstance(given, dict | list):
        raise _Unreadable(where, f"the field 'id' holds {_kind(given)}, not a name", source.ways_out.line)
    name = name if given is None or not str(given).strip() else str(given)
    if not source.wants(name) or not text.strip():
        return None
    return Document(name, text, path, {key: value for key, value in record.items() if key != source.field}, line)


def _kind(value: object) -> str:
    """What a JSON value is called in messages."""
    kinds = {"dict": "an object", "list": "a list", "str": "a string", "int": "a number", "float": "a number"}
    return kinds.get(type(value).__name__) or json.dumps(value)


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
        document = None
        with _skipping(source):
            document = _record(record, f"{name}:{number}", path, None, source)
        if document is not None:
            yield document


def _grouped(documents: Iterator[Document]) -> Iterator[Document]:
    """Join the files of each top folder; a file outside any folder stays a document of its own."""

    def top(document: Document) -> str:
        return PurePosixPath(document.id).parts[0]

    for name, files in groupby(sorted(documents, key=lambda d: (top(d), d.id)), key=top):
        members = list(files)
        yield Document(name, "\n\n".join(member.text for member in members), members[0].source)


def _files_of(path: Path) -> list[tuple[Path, str]]:
    """A file and its name; of a folder all files with their paths in it, in the order of these."""
    if not path.is_dir():
        return [(path, path.name)]
    files = [(file, file.relative_to(path)) for file in sorted(path.rglob("*")) if file.is_file()]
    return [(file, name.as_posix()) for file, name in files if not _is_hidden(name)]


def _is_hidden(path: PurePath) -> bool:
    """What begins with a dot, and what Python and macOS leave beside their files."""
    return any(part in ("__pycache__", "__MACOSX") or (part[0] == "." and part != "..") for part in path.parts)


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a name; composed and decomposed accents are the same."""
    return fnmatchcase(unicodedata.normalize("NFC", name), unicodedata.normalize("NFC", pattern))


def _nothing_in(path: str, source: TextSource) -> str:
    if source.exclude or source.undecodable == "skip":
        return f"{path}: no text is left after what is excluded or skipped; name more files"
    kind = "folder" if Path(path).is_dir() else "archive" if _unpacked(path.lower()).endswith(ARCHIVES) else None
    if kind is None:
        return f"{path}: no text, the file is empty or holds white space only; name one with text in it"
    kinds = f"{', '.join(source.suffixes)}, .jsonl, .tar and .zip, also compressed"
    return f"{path}: no text in this {kind}; looked for {kinds}; {source.ways_out.suffixes}"
