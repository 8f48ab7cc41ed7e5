"""Tokenizers, text tokenised once (kept on disk, read as a memory map), and documents one by one."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from longmem.data.text import Document, TextSource, read_documents
from longmem.errors import ConfigError, DataError, first_line
from longmem.files import whole_folder

log = logging.getLogger(__name__)
FORMAT = 2
"""Of a cache; another number whenever the same source gives other tokens than before."""
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
MIN_VOCABULARY = 256 + 3
_PIECE = 1 << 16
_MARGIN = 256  # characters, more than any token has
_TOGETHER = 32  # documents that are tokenised at once, on all cores

# tokenizers


def load_tokenizer(path: str | Path, model: Any = None) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or at a hub id; with ``model``, one whose ids it must make."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: no tokenizer ({first_line(error)}); name a folder with tokenizer.json, or a hub id"
        ) from error
    if model is not None:
        check_tokenizer(tokenizer, model, str(path))
    return tokenizer


def check_tokenizer(
    tokenizer: Any, model: Any, name: str | None = None, way_out: str = "name the right one with --tokenizer"
) -> None:
    """Refuse a tokenizer whose ids the model has no embeddings for.

    Args:
        name: of the tokenizer in the message; None is the path that it was loaded from.
        way_out: what the message proposes.
    """
    known = _known(model)
    # without tokens added later: some checkpoints bring one or two that occur in no text and have no embedding
    if tokenizer.vocab_size > known:
        raise DataError(
            f"{name or tokenizer.name_or_path or 'this'}: a tokenizer of {tokenizer.vocab_size:,} tokens, the model "
            f"knows {known:,}: it is another model's; {way_out}"
        )


def check_ids(ids: Iterable[int], model: Any, what: str) -> None:
    """Refuse token ids of ``what`` ("the prompt") that the model has no embeddings for."""
    known = _known(model)
    wrong = next((each for each in ids if not 0 <= each < known), None)
    if wrong is not None:
        raise DataError(
            f"{what} has the token id {wrong:,}, the model knows {known:,}: the tokenizer is another model's; name the "
            "right one with --tokenizer"
        )


def _known(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """A text's token ids without special ones, whatever its length."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


Message = dict[str, str]
"""``role`` (``system``, ``user`` or ``assistant``) and ``content``, as chat templates take them."""


def chat_text(tokenizer: Any, messages: Sequence[Message], *, answer: bool) -> str:
    """The text of a conversation; with ``answer`` it ends where the assistant begins to speak.

    A chat template that refuses a system message has it before the first question.

    Raises:
        DataError: the chat template refuses these messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        lines = "".join(f"{message['role'].capitalize()}: {message['content']}\n" for message in messages)
        return lines + "Assistant: " * answer
    ways, (first, *rest) = [list(messages)], messages
    if first["role"] == "system" and rest:
        ways.append([{**rest[0], "content": f"{first['content']}\n\n{rest[0]['content']}"}, *rest[1:]])
    for way in ways:
        try:
            return str(tokenizer.apply_chat_template(way, tokenize=False, add_generation_prompt=answer))
        except TemplateError as error:
            problem = error
    raise DataError(
        f"the model's chat template refuses these messages ({first_line(problem)}); let user and assistant take turns"
    ) from problem


def first_text(text: str, tokenizer: Any, tokens: int) -> str:
    """A beginning of a text, cut where words end, whose first ``tokens`` tokens are those of the whole text.

    It is found without tokenising the rest: of a book of which 1,000 tokens are wanted, about 8,000 characters.
    """
    characters = 8 * tokens + _MARGIN
    while (space := re.compile(r"\s").search(text, characters)) is not None:
        # what comes after the cut can change the last word only, and its neighbours where no blank separates words
        sure = text[: max(0, space.start() - _MARGIN)]
        if len(token_ids(tokenizer, sure)) >= tokens:
            return text[: space.start()]
        characters *= 2
    return text


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_bytes: int = 64_000_000) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ``<s>``, ``<pad>`` and ``</s>`` as ids 0, 1, 2; every UTF-8 text can be encoded.

    Args:
        texts: what to learn the merges from, in order.
        vocab_size: V, the 256 bytes and the three special tokens included.
        max_bytes: stop reading after about so many bytes; more changes the merges little and takes longer.
    """
    if vocab_size < MIN_VOCABULARY:
        raise ConfigError(f"data.vocab_size ({vocab_size}) must be at least {MIN_VOCABULARY}: 256 bytes and 3 specials")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(_pieces(texts, max_bytes)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def _pieces(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Texts cut into pieces at line ends, so that all cores count merges at once."""
    seen = 0
    for text in texts:
        start = 0
        while start < len(text):
            if seen >= max_bytes:
                return
            end = text.find("\n", start + _PIECE) + 1 or len(text)
            yield text[start:end]
            seen += end - start
            start = end


# tokens


@dataclass(frozen=True)
class TokenCorpus:
    """Documents as one array of token ids.

    Attributes:
        ids: (tokens,) uint16 or uint32, document after document, each ended by the tokenizer's end token.
        bounds: (documents + 1,) int64; document d is ``ids[bounds[d]:bounds[d + 1]]``.
        names: document ids.
        fingerprint: of text and tokenizer.
    """

    ids: NDArray[np.unsignedinteger[Any]]
    bounds: NDArray[np.int64]
    names: tuple[str, ...]
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
    def from_parts(
        cls, parts: Iterable[tuple[str, NDArray[np.unsignedinteger[Any]]]], fingerprint: str = ""
    ) -> TokenCorpus:
        """From names and ids, at least one of each. The fingerprint may be that of the ids."""
        names, some = zip(*parts, strict=True)
        ids, bounds = np.concatenate(some), np.cumsum([0, *map(len, some)], dtype=np.int64)
        if not fingerprint:
            fingerprint = hashlib.sha256(ids.tobytes() + bounds.tobytes()).hexdigest()[:16]
        return cls(ids, bounds, names, fingerprint)

    def save(self, folder: Path) -> None:
        """Write into a folder that is complete or absent."""
        index = {"names": self.names, "bounds": self.bounds.tolist(), "fingerprint": self.fingerprint}
        with whole_folder(folder) as part:
            np.save(part / "ids.npy", self.ids)
            (part / "index.json").write_text(json.dumps(index))

    @classmethod
    def load(cls, folder: Path) -> TokenCorpus:
        """Open a saved corpus; the ids stay in the file until they are read.

        Raises:
            DataError: the folder is damaged.
        """
        try:
            index = json.loads((folder / "index.json").read_text())
            ids, bounds = np.load(folder / "ids.npy", mmap_mode="r"), np.array(index["bounds"], dtype=np.int64)
            return cls(ids, bounds, tuple(index["names"]), index["fingerprint"])
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder}: damaged token cache ({error}); delete the folder, it is made again") from error


def tokenize(source: TextSource, tokenizer: PreTrainedTokenizerBase, cache_dir: Path) -> TokenCorpus:
    """The tokens of a source: from the cache where text and tokenizer are the same, else made and kept there.

    Raises:
        DataError: see ``read_documents``.
    """
    fingerprint = hashlib.sha256(f"{FORMAT} {source.fingerprint()} {_hash(tokenizer)}".encode()).hexdigest()
    folder = cache_dir / f"ids-{fingerprint[:16]}"
    if not folder.exists():
        log.info("tokenising %s", ", ".join(source.paths))
        TokenCorpus.from_parts(encoded(read_documents(source), tokenizer), fingerprint).save(folder)
    return TokenCorpus.load(folder)


def encoded(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, NDArray[np.unsignedinteger[Any]]]]:
    """Name and token ids of each document, with what the tokenizer puts in front of a text, and its end token."""
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    prefix = start_tokens(tokenizer)
    suffix = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    remaining = iter(documents)
    while some := list(islice(remaining, _TOGETHER)):
        texts = [document.text for document in some]
        found = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for document, ids in zip(some, found, strict=True):
            yield document.id, np.array([*prefix, *ids, *suffix], dtype=dtype)


def as_corpus(documents: TokenCorpus | Iterable[Mapping[str, Any]]) -> TokenCorpus:
    """Tokenised documents as one corpus.

    Args:
        documents: a corpus as it is; or records (of a ``datasets.Dataset``, a list) with ``input_ids``, each a whole
            document, and perhaps a ``name`` or ``id``.
    """
    if isinstance(documents, TokenCorpus):
        return documents
    parts = []
    for number, record in enumerate(documents):
        if "input_ids" not in record:
            raise DataError(
                f"record {number} has no input_ids (it has {', '.join(map(str, record)) or 'nothing'}); tokenise each "
                "document as a whole, without cutting it to the window"
            )
        name = str(record.get("name", record.get("id", number)))
        parts.append((name, np.asarray(record["input_ids"], dtype=np.uint32)))
    if not any(len(ids) for _, ids in parts):
        raise DataError("no record has any token in input_ids; give documents to train on")
    return TokenCorpus.from_parts(parts)


def _hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of everything that decides which ids a text gets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(f"{content} {list(start_tokens(tokenizer))} {tokenizer.eos_token_id}".encode()).hexdigest()


def start_tokens(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer itself puts in front of a text (``<s>`` of Llama, nothing of GPT-2)."""
    ids: list[int] = tokenizer("")["input_ids"]
    return (int(ids[0]),) if ids and ids[0] == tokenizer.bos_token_id else ()


# documents one by one, of which perplexity is measured

PROJECT_SEPARATOR = "__"


@dataclass(frozen=True)
class TokenizedDocument:
    """A document's ids (n,), of which all but the first are scored, and the words and UTF-8 bytes of the scored text.

    ``digest`` is the hash of the ids; ``group`` what is reported apart, if anything; documents of one ``project`` are
    not independent, so intervals draw projects first.
    """

    id: str
    ids: Tensor
    words: int
    bytes: int
    digest: str
    group: str | None
    project: str

    @property
    def scored(self) -> int:
        return len(self.ids) - 1


def tokenize_documents(
    documents: Sequence[Any],
    tokenizer: Any,
    *,
    max_tokens: int | None = None,
    group_separator: str | None = None,
) -> list[TokenizedDocument]:
    """Tokenize each document from its beginning.

    Special tokens are as in training: where the tokenizer itself puts a ``<s>`` in front (Llama's does, GPT-2's does
    not), it stays there and the first token of the text is scored too. No end token is added or scored.

    Args:
        documents: records with ``id`` and ``text``.
        max_tokens: keep this many tokens of each document; words and bytes are those of the kept part.
        group_separator: a document's group is its file name up to this string (all of it where it does not occur).
            The group is its project too. None: no groups; the project is the name up to ``__``.

    Raises:
        DataError: no document has two tokens.
    """
    kept, prefix = [], start_tokens(tokenizer)
    first = 0 if prefix else 1
    for document in documents:
        part = document.text if max_tokens is None else first_text(document.text, tokenizer, max_tokens)
        ids = token_ids(tokenizer, part)[:max_tokens]
        if len(ids) <= first:
            log.warning("%s: skipped, %d tokens leave nothing to predict", document.id, len(ids))
            continue
        text = tokenizer.decode(ids[first:], clean_up_tokenization_spaces=False)
        ids = [*prefix, *ids]
        group = _group(document.id, group_separator) if group_separator else None
        project = _group(document.id, PROJECT_SEPARATOR) if PROJECT_SEPARATOR in document.id else document.id
        kept.append(
            TokenizedDocument(
                document.id,
                torch.tensor(ids, dtype=torch.long),
                words=len(text.split()),
                bytes=len(text.encode("utf-8", errors="surrogatepass")),
                digest=hashlib.sha256(np.asarray(ids, dtype="<i8").tobytes()).hexdigest()[:32],
                group=group,
                project=group or project,
            )
        )
    if not kept:
        raise DataError(
            f"no text to measure: {len(documents)} documents read, none has two tokens; check --data, --include and "
            "--max-tokens"
        )
    return kept


def _group(name: str, separator: str) -> str:
    """Separator ``__``: ``test/clowder__02-sets.tex`` belongs to ``clowder``; folders count only if it has a ``/``."""
    return (name if "/" in separator else name.rsplit("/", 1)[-1]).split(separator)[0]
