"""Files that users send: text, JSON lines, either of them compressed; nothing of a name becomes a path."""

from __future__ import annotations

import gzip
import io
import tempfile
import zlib
from pathlib import Path, PurePosixPath

from longmem.data.text import TEXT_SUFFIXES, read_documents
from longmem.server.refusals import Refused

SUFFIXES = (*TEXT_SUFFIXES, ".jsonl")
MOST_TEXT = 32 << 20
"""Bytes of a file when it is unpacked."""


def texts_of(filename: str, data: bytes) -> list[tuple[str, str]]:
    """Names and texts of the documents in a file.

    Raises:
        Refused: a kind that is not read, or one that grows too large when it is unpacked.
        DataError: no text in it, or not UTF-8.
    """
    name = PurePosixPath(filename.replace("\\", "/")).name[:200]
    packed = name.lower().endswith(".gz")
    plain = name[:-3] if packed else name
    suffix = PurePosixPath(plain).suffix.lower()
    if suffix not in SUFFIXES:
        raise Refused(400, f"files of these kinds are read: {', '.join(SUFFIXES)}, also as .gz", param="file")
    if packed:
        try:
            with gzip.open(io.BytesIO(data)) as stream:
                data = stream.read(MOST_TEXT + 1)
        except (OSError, EOFError, zlib.error):
            raise Refused(400, "the file ends in .gz and is no gzip file", param="file") from None
    if len(data) > MOST_TEXT:
        raise Refused(413, f"the file unpacks to more than {MOST_TEXT:,} bytes; send it in parts", param="file")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"file{suffix}"
        file.write_bytes(data)
        found = list(read_documents([file]))
    return [(plain if each.line is None else f"{plain}:{each.line}", each.text) for each in found]
