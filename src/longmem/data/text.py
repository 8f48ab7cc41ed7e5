"""Readers: files, folders, JSON lines, tar archives and hub data sets, all as ``Document``s."""

from __future__ import annotations

import glob
import hashlib
import json
import lzma
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal

from longmem.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".py")
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
HUB = "hub:"


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        id: name inside its source: relative path, archive member, or ``file:line`` of a JSON lines file.
        text: not empty.
        source: the path (or hub name) it was read from.
        record: of JSON lines and hub records, the fields beside the text.
    """

    id: str
    text: str
    source: str
    record: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class WaysOut:
    """How whoever named a text mends what is wrong with it; errors end with these words.

    The defaults suit commands and functions that have no setting for it.

    Attributes:
        missing: nothing is at a path.
        undecodable: a file is not UTF-8.
        suffixes: a folder or archive holds no text.
        field: a record lacks the text field.
    """

    missing: str = "check the path"
    undecodable: str = "convert it, or name other files"
    suffixes: str = "name other files by themselves"
    field: str = "rename the field that has it to 'text'"


WITHOUT_SETTINGS = WaysOut()


@dataclass(frozen=True)
class TextSource:
    """Where documents come from, and which of them are wanted.

    Attributes:
        paths: files, folders (read recursively), ``.jsonl`` files, ``.tar[.gz|.xz|.bz2]`` archives, patterns
            (``books/train-*.tar.xz``), or ``hub:NAME[:CONFIG[:SPLIT]]`` for a data set of the hub.
        suffixes: what counts as text inside folders and archives; a file named itself is always read.
        include: patterns of document ids; empty takes all. ``*`` also matches ``/``.
        exclude: patterns of document ids that are left out.
        field: the text field of JSON lines and hub records.
        group: ``file``: every file is a document; ``folder``: the text files below each top folder are joined, in the
            order of their paths, into one document.
        undecodable: what happens to a file that is not UTF-8.
        ways_out: what errors propose.
    """

    paths: tuple[str, ...]
    suffixes: tuple[str, ...] = TEXT_SUFFIXES
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    field: str = "text"
    group: Literal["file", "folder"] = "file"
    undecodable: Literal["error", "skip", "replace"] = "error"
    ways_out: WaysOut = WITHOUT_SETTINGS

    def wants(self, name: str) -> bool:
        """Whether the patterns let this document id through."""
        included = not self.include or any(fnmatch(name, pattern) for pattern in self.include)
        return included and not any(fnmatch(name, pattern) for pattern in self.exclude)

    def fingerprint(self) -> str:
        """Hash of every file's bytes and of the settings: equal text gives an equal fingerprint."""
        settings = {**asdict(self), "paths": []}
        del settings["ways_out"]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for path in expand(self.paths, self.ways_out):
            files = [Path(path)] if not Path(path).is_dir() else list(_files_below(Path(path)))
            for file in files if not path.startswith(HUB) else []:
                name = file.relative_to(path).as_posix() if file != Path(path) else file.name
                digest.update(name.encode() + b"\0" + _hash_file(file))
            digest.update(path.encode() if path.startswith(HUB) else b"")
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
    documents = _read_all(paths)
    return _grouped(documents) if paths.group == "folder" else documents


def read_stream(stream: BinaryIO, name: str, *, lines: bool = False, **settings: object) -> Iterator[Document]:
    """What comes through a pipe: one text, or with ``lines`` JSON lines, each a document as soon as it is there.

    Args:
        name: of the document; JSON lines without an ``id`` are ``name:line``.
        settings: fields of ``TextSource``.

    Raises:
        DataError: nothing comes, or it is not UTF-8, or not JSON.
    """
    source = TextSource((), **settings)  # type: ignore[arg-type]
    count = 0
    for document in _read_lines(stream, name, name, source) if lines else _document(stream.read(), name, name, source):
        count += 1
        yield document
    if not count:
        raise DataError(f"{name}: no text came; pipe in something that is not white space only")


def expand(paths: Sequence[str], ways_out: WaysOut = WITHOUT_SETTINGS) -> list[str]:
    """Patterns replaced by what they match; every path exists.

    Args:
        ways_out: what the error proposes.

    Raises:
        DataError: nothing is there; lists all such paths.
    """
    found: list[str] = []
    missing: list[str] = []
    for path in paths:
        # an empty name, of a variable that nobody set, would be the folder one is in
        if path.startswith(HUB) or (path and Path(path).exists()):
            found.append(path)
        elif path and (matches := sorted(glob.glob(path, recursive=True))):
            found.extend(matches)
        else:
            missing.append(path)
    if missing:
        names = ", ".join(path or "''" for path in missing)
        raise DataError(f"{names}: no such file or folder (looked from {Path.cwd()}); {ways_out.missing}")
    return found


def _read_all(source: TextSource) -> Iterator[Document]:
    for path in expand(source.paths, source.ways_out):
        count = 0
        for document in _read_path(path, source):
            count += 1
            yield document
        # a pattern that lets nothing of one path through is no fault as long as another path has text
        if not count and not source.include:
            raise DataError(_nothing_in(path, source))


def _read_path(path: str, source: TextSource) -> Iterator[Document]:
    if path.startswith(HUB):
        return _read_hub(path, source)
    file = Path(path)
    if file.is_dir():
        return _read_folder(file, source)
    if file.name.endswith(ARCHIVES):
        return _read_archive(file, source)
    if file.suffix == ".jsonl":
        return _read_jsonl(file, source)
    return _read_file(file, file.name, source)


def _read_folder(folder: Path, source: TextSource) -> Iterator[Document]:
    for file in _files_below(folder):
        name = file.relative_to(folder).as_posix()
        if file.name.endswith(ARCHIVES):
            yield from _read_archive(file, source)
        elif file.suffix == ".jsonl":
            yield from _read_jsonl(file, source)
        elif file.suffix in source.suffixes:
            yield from _read_file(file, name, source)


def _read_file(file: Path, name: str, source: TextSource) -> Iterator[Document]:
    if source.wants(name):
        yield from _document(file.read_bytes(), name, str(file), source)


def _read_archive(file: Path, source: TextSource) -> Iterator[Document]:
    try:
        with tarfile.open(file) as archive:
            for member in archive:
                wanted = member.isfile() and PurePosixPath(member.name).suffix in source.suffixes
                if wanted and source.wants(member.name):
                    stream = archive.extractfile(member)
                    assert stream is not None
                    yield from _document(stream.read(), member.name, f"{file}:{member.name}", source)
            # a header that damage made unreadable looks like the end: the checksum behind it does not
            while archive.fileobj is not None and archive.fileobj.read(1 << 20):
                pass
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{file}: not a readable tar archive ({error}); fetch or pack it again") from error


def _read_jsonl(file: Path, source: TextSource) -> Iterator[Document]:
    with file.open("rb") as lines:
        yield from _read_lines(lines, file.name, str(file), source)


def _read_lines(lines: BinaryIO, name: str, path: str, source: TextSource) -> Iterator[Document]:
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8 (byte {error.start}); convert the file to UTF-8") from error
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error.msg}); every line must be one JSON object") from error
        yield from _record(record, f"{name}:{number}", where, source)


def _read_hub(path: str, source: TextSource) -> Iterator[Document]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(f"{path}: reading the hub needs `datasets`; pip install 'longmem-lm[data]'") from error
    name, config, split = [*path.removeprefix(HUB).split(":"), "", ""][:3]
    try:
        records = load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the hub has no common base of errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: the hub data set cannot be loaded ({reason}); write hub:NAME:CONFIG:SPLIT") from error
    for number, record in enumerate(records):
        yield from _record(record, f"{name}:{number}", path, source)


def _record(record: object, name: str, where: str, source: TextSource) -> Iterator[Document]:
    if not isinstance(record, dict) or not isinstance(record.get(source.field), str):
        fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{where}: no text field {source.field!r} (it has: {fields}); {source.ways_out.field}")
    name = str(record.get("id", name))
    if source.wants(name) and record[source.field].strip():
        yield Document(name, record[source.field], where, {k: v for k, v in record.items() if k != source.field})


def _document(data: bytes, name: str, where: str, source: TextSource) -> Iterator[Document]:
    try:
        text = data.decode("utf-8", errors="replace" if source.undecodable == "replace" else "strict")
    except UnicodeDecodeError as error:
        if source.undecodable == "skip":
            return
        byte = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise DataError(f"{where}: not UTF-8 text ({byte}); {source.ways_out.undecodable}") from error
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    if text.strip():
        yield Document(name, text, where)


def _grouped(documents: Iterator[Document]) -> Iterator[Document]:
    """Join the files of each top folder; a file outside any folder stays a document of its own."""

    def top(document: Document) -> str:
        parts = PurePosixPath(document.id).parts
        return parts[0] if len(parts) > 1 else document.id

    for name, files in groupby(sorted(documents, key=lambda d: (top(d), d.id)), key=top):
        members = list(files)
        yield Document(name, "\n\n".join(member.text for member in members), members[0].source)


def _files_below(folder: Path) -> Iterator[Path]:
    """In the order of their paths; what is hidden or made by Python is left out."""
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        if file.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in parts):
            yield file


def _hash_file(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _nothing_in(path: str, source: TextSource) -> str:
    suffixes, way_out = ", ".join(source.suffixes), source.ways_out.suffixes
    if Path(path).is_dir():
        return f"{path}: no text in this folder; looked for {suffixes}, .jsonl and tar archives; {way_out}"
    if path.endswith(ARCHIVES):
        return f"{path}: no text in this archive; looked for {suffixes}; {way_out}"
    return f"{path}: no text, the file is empty or holds white space only; name one with text in it"
