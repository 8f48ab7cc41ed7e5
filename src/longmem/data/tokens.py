"""Text tokenised once, kept on disk, read as a memory map."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from longmem.data.text import Document, TextSource, read_documents
from longmem.errors import DataError

log = logging.getLogger(__name__)
FORMAT = 2
"""Of a cache; another number whenever the same source gives other tokens than before."""
_BATCH_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class TokenCorpus:
    """Documents as one array of token ids.

    Attributes:
        ids: (tokens,) uint16 or uint32, document after document, each ended by the tokenizer's end token.
        bounds: (documents + 1,) int64; document d is ``ids[bounds[d]:bounds[d + 1]]``.
        names: document ids.
        num_bytes: (documents,) int64, UTF-8 bytes of each text.
        num_words: (documents,) int64, words between white space.
        fingerprint: of text and tokenizer.
    """

    ids: NDArray[np.unsignedinteger[Any]]
    bounds: NDArray[np.int64]
    names: tuple[str, ...]
    num_bytes: NDArray[np.int64]
    num_words: NDArray[np.int64]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_tokens(self) -> int:
        return int(self.bounds[-1])

    def document(self, index: int) -> NDArray[np.int64]:
        """Token ids of one document, (tokens,)."""
        return self.ids[self.bounds[index] : self.bounds[index + 1]].astype(np.int64)

    @classmethod
    def from_documents(
        cls, documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, fingerprint: str = ""
    ) -> TokenCorpus:
        """Tokenise in RAM; ``tokenize`` is the same with a cache on disk."""
        rows = [
            (ids, document.id, len(document.text.encode()), len(document.text.split()))
            for document, ids in _encode(documents, tokenizer)
        ]
        if not rows:
            raise DataError("no document with text; check data.paths, data.include and data.exclude")
        parts, names, num_bytes, num_words = zip(*rows, strict=True)
        return cls(np.concatenate(parts), _bounds(parts), names, np.array(num_bytes), np.array(num_words), fingerprint)

    def save(self, folder: Path) -> None:
        """Write into a folder that is complete or absent."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".tokens-", dir=folder.parent))
        self.ids.tofile(temporary / "tokens.bin")
        index = {"format": FORMAT, "dtype": self.ids.dtype.name, "fingerprint": self.fingerprint, "names": self.names}
        index |= {name: getattr(self, name).tolist() for name in ("bounds", "num_bytes", "num_words")}
        (temporary / "index.json").write_text(json.dumps(index))
        try:
            os.replace(temporary, folder)
        except OSError:  # another process was first with the same content
            shutil.rmtree(temporary)

    @classmethod
    def load(cls, folder: Path) -> TokenCorpus:
        """Open a saved corpus; the ids stay in the file until they are read.

        Raises:
            DataError: the folder is damaged.
        """
        try:
            index = json.loads((folder / "index.json").read_text())
            bounds = np.array(index["bounds"], dtype=np.int64)
            ids = np.memmap(folder / "tokens.bin", dtype=index["dtype"], mode="r")
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder}: damaged token cache ({error}); delete the folder, it is made again") from error
        if index["format"] != FORMAT or len(ids) != bounds[-1]:
            raise DataError(f"{folder}: damaged token cache ({len(ids)} of {bounds[-1]} tokens); delete the folder")
        num_bytes, num_words = (np.array(index[name], dtype=np.int64) for name in ("num_bytes", "num_words"))
        return cls(ids, bounds, tuple(index["names"]), num_bytes, num_words, index["fingerprint"])


def tokenize(source: TextSource, tokenizer: PreTrainedTokenizerBase, cache_dir: Path | None = None) -> TokenCorpus:
    """The tokens of a source: from the cache where text and tokenizer are the same, else made and kept there.

    Raises:
        DataError: see ``read_documents``.
    """
    fingerprint = hashlib.sha256(f"{FORMAT} {source.fingerprint()} {tokenizer_hash(tokenizer)}".encode()).hexdigest()
    folder = cache_dir / f"tokens-{fingerprint[:16]}" if cache_dir else None
    if folder is not None and folder.exists():
        return TokenCorpus.load(folder)
    log.info("tokenising %s", ", ".join(source.paths))
    corpus = TokenCorpus.from_documents(read_documents(source), tokenizer, fingerprint)
    if folder is None:
        return corpus
    corpus.save(folder)
    return TokenCorpus.load(folder)


def as_corpus(documents: TokenCorpus | Iterable[Mapping[str, Any]]) -> TokenCorpus:
    """Tokenised documents as one corpus.

    Args:
        documents: a corpus as it is; or records (of a ``datasets.Dataset``, a list) with ``input_ids``, each a whole
            document, and perhaps a ``name`` or ``id``.
    """
    if isinstance(documents, TokenCorpus):
        return documents
    parts, names = [], []
    for number, record in enumerate(documents):
        if "input_ids" not in record:
            raise DataError(
                f"record {number} has no input_ids (it has {', '.join(map(str, record)) or 'nothing'}); tokenise each "
                "document as a whole, without cutting it to the window"
            )
        parts.append(np.asarray(record["input_ids"], dtype=np.uint32))
        names.append(str(record.get("name", record.get("id", number))))
    if not sum(map(len, parts)):
        raise DataError("no record has any token in input_ids; give documents to train on")
    ids, bounds = np.concatenate(parts), _bounds(parts)
    unknown = np.zeros(len(parts), dtype=np.int64)
    fingerprint = hashlib.sha256(ids.tobytes() + bounds.tobytes()).hexdigest()[:16]
    return TokenCorpus(ids, bounds, tuple(names), unknown, unknown, fingerprint)


def _bounds(parts: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    return np.cumsum([0, *map(len, parts)], dtype=np.int64)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that decides which ids a text gets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(f"{content} {_prefix(tokenizer)} {tokenizer.eos_token_id}".encode()).hexdigest()


def _encode(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Document, NDArray[np.unsignedinteger[Any]]]]:
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    prefix = _prefix(tokenizer)
    suffix = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for batch in _batches(documents):
        for document, ids in zip(batch, _ids(tokenizer, [document.text for document in batch]), strict=True):
            yield document, np.array([*prefix, *ids, *suffix], dtype=dtype)


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Whole batches at once on all cores, without offsets, which take longer and are not needed here."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        slow: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return slow
    backend.no_truncation()
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts in front of a text (``<s>`` of Llama, nothing of GPT-2)."""
    ids: list[int] = tokenizer("")["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
