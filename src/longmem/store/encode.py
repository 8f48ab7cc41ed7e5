"""From a document to tokens, and from token ids to stored chunks: many segments in a batch, through the backbone.

What a segment leaves in memory must not depend on its company, to the last bit: then adding in parts equals adding at
once, equal texts need not be encoded twice, and a lost file can be made again. Matrix products round differently for
different shapes, so a segment always goes through in a batch of the same shape: as long as the next power of two, in a
number of rows that depends on this length alone; rows without a segment are filled up.

T segment tokens · B rows · n chunks · H heads of all layers · S tokens per chunk · D head_dim
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import threading
import time
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longmem.config import positions, usual_window
from longmem.data.tokens import check_ids, load_tokenizer, start_tokens
from longmem.errors import DataError, StoreError, not_a_multiple
from longmem.store.disk import DTYPES, Dtype, Layout, StoredChunks, pack

Ids = NDArray[np.uint32]
_SURROGATE = re.compile("[\ud800-\udfff]")  # no Unicode
_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # and what would break lines and terminals


def composed(name: str) -> str:
    """A name in composed form (Unicode NFC), as all names are kept: what looks the same is the same."""
    if not isinstance(name, str):
        raise StoreError(f"a name of a namespace or document ({name!r:.60}) must be a text")
    return unicodedata.normalize("NFC", name)


@dataclass(frozen=True)
class NewDocument:
    """A document to add: either ``text`` or ``ids``."""

    name: str  # unique in its namespace
    text: str | None = None
    ids: Sequence[int] | NDArray[Any] | Tensor | None = None  # to remember as they are, where there is no text
    source: str | None = None  # where it came from
    metadata: Mapping[str, Any] | None = None  # a JSON object
    time: float | None = None  # seconds since the epoch, None is now; documents are in the order of their times
    expires: float | None = None  # seconds since the epoch from which on it is not found any more
    replace: bool = False  # whether it may take the place of another text of this name

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", composed(self.name))

    def check(self, namespace: str, *, past: bool = False) -> None:
        """Raises StoreError where something cannot be what it should; lists all of it.

        Args:
            past: whether it may have expired already, as what was exported may have since.
        """
        wrong = []
        for what, value in (("namespace", namespace), ("name", self.name)):
            if not 0 < len(value) <= 1000 or _UNFIT.search(value):
                wrong.append(f"{what} ({value!r:.60}) must be 1 to 1000 characters, none of them for control")
        if self.source is not None and (not isinstance(self.source, str) or _SURROGATE.search(self.source)):
            wrong.append(f"source ({self.source!r:.60}) must be a text")
        for what, moment in (("time", self.time), ("expires", self.expires)):
            if moment is not None and not (isinstance(moment, int | float) and math.isfinite(moment)):
                wrong.append(f"{what} ({moment!r}) must be seconds since the epoch")
            elif what == "expires" and moment is not None and moment <= time.time() and not past:
                wrong.append(f"{what} ({moment!r}) has passed, {self.name!r} would never be found; give a later time")
        try:
            metadata_text(self.metadata).encode()
        except (TypeError, ValueError, RecursionError) as error:
            wrong.append(f"metadata of {self.name!r} must be a JSON object ({error}); use strings, numbers, lists")
        if wrong:
            raise StoreError("; ".join(wrong))


def metadata_text(metadata: Mapping[str, Any] | None) -> str:
    """Metadata as the catalog keeps it."""
    return json.dumps(dict(metadata or {}), sort_keys=True, ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True)
class Tokens:
    """A run of tokens, with its text if it was made from one."""

    ids: Ids  # (t,)
    text: str | None = None  # that they were made from; None where only ids were given
    starts: Ids | None = None  # (t,) where in ``text`` each token begins, never falling; None without text

    def __len__(self) -> int:
        return len(self.ids)

    def slice(self, start: int, stop: int) -> Tokens:
        """Tokens ``start`` to ``stop`` with their part of the text; the parts of all slices make the whole text."""
        ids = self.ids[start:stop]
        if self.text is None or self.starts is None:
            return Tokens(ids)
        begin = 0 if start == 0 else int(self.starts[start])
        end = len(self.text) if stop >= len(self.ids) else int(self.starts[stop])
        starts = np.maximum(self.starts[start:stop].astype(np.int64) - begin, 0).astype(np.uint32)
        return Tokens(ids, self.text[begin:end], starts)

    def digest(self) -> bytes:
        """16 bytes of BLAKE2b over ids and text."""
        text = b"" if self.text is None else b"t" + self.text.encode()
        data = len(self.ids).to_bytes(8, "little") + self.ids.astype("<u4").tobytes() + text
        return hashlib.blake2b(data, digest_size=16).digest()

    def spelled(self, tokenizer: Any) -> str:
        """The text; of ids without one, what they decode to. Raises StoreError where that takes a tokenizer."""
        if self.text is not None:
            return self.text
        if tokenizer is None:
            raise StoreError("this document was added as token ids; open the store with tokenizer= to see text")
        return str(tokenizer.decode(self.ids.tolist()))


def joined_tokens(runs: Sequence[Tokens]) -> Tokens:
    """Runs of tokens, one after the other; a text only where all have one."""
    ids = np.concatenate([np.zeros(0, np.uint32), *(run.ids for run in runs)]).astype(np.uint32)
    starts, text = [np.zeros(0, np.uint32)], ""
    for run in runs:
        if run.text is None or run.starts is None:
            return Tokens(ids)
        starts.append(run.starts + np.uint32(len(text)))
        text += run.text
    return Tokens(ids, text, np.concatenate(starts))


def _of_ids(name: str, ids: Any) -> Tokens:
    given = ids.detach().cpu().numpy() if isinstance(ids, torch.Tensor) else np.asarray(ids)
    flat = given.reshape(-1) if given.ndim != 2 or given.shape[0] == 1 else given
    if flat.ndim != 1 or (flat.size and flat.dtype.kind not in "iu"):
        raise StoreError(
            f"document {name!r}: ids of shape {given.shape} and type {given.dtype} must be integers, (tokens,)"
        )
    if flat.size and not 0 <= int(flat.min()) <= int(flat.max()) < 1 << 32:
        raise StoreError(f"document {name!r}: token ids {int(flat.min())}..{int(flat.max())} must lie in 0..2^32-1")
    return Tokens(flat.astype(np.uint32))


def _of_text(name: str, text: str, tokenizer: Any, begin: bool) -> Tokens:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise StoreError(
            f"document {name!r} is no valid Unicode (character {error.start}); read it with errors='replace'"
        ) from error
    if not getattr(tokenizer, "is_fast", False):  # slow ones do not say where in the text their tokens begin
        way_out = "open it with tokenizer=, or give token ids with ids="
        raise StoreError(f"document {name!r}: the store has no fast tokenizer; {way_out}")
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False)
    # of what the tokenizer puts around a text, only its beginning (<s> of Llama, nothing of GPT-2): memory goes on
    prefix = start_tokens(tokenizer) if begin and found["input_ids"] else ()
    offsets = np.array(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)[:, 0]
    # offsets of some tokenizers step back at composed characters; text is cut at them, so they must not
    starts = np.concatenate([np.zeros(len(prefix), dtype=np.int64), np.maximum.accumulate(offsets)])
    return Tokens(np.array([*prefix, *found["input_ids"]], dtype=np.uint32), text, starts.astype(np.uint32))


BATCH_TOKENS = {"cpu": 512, "gpu": 16384}
"""That go through together, about; another number, device or number of threads may round the last bit differently."""
_SHORTEST = 16


class Encoder:
    """Encodes texts for a store.

    Args:
        model: a LongMem, MemTRM or TrainingFree over the backbone of the layout; None: nothing can be encoded.
        tokenizer: None loads that of the model's backbone when a text is first given.
    """

    def __init__(self, model: Any, layout: Layout, tokenizer: Any = None) -> None:
        self.model, self.layout, self._tokenizer = model, layout, tokenizer
        self._busy = threading.Lock()  # held while the model encodes
        self._batch_tokens = BATCH_TOKENS["cpu" if model is None or model.device.type == "cpu" else "gpu"]
        config = None if model is None else model.config.backbone_config.get_text_config()
        counts = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
        # experts get some of the tokens: the shapes of their products would depend on a segment's company
        self._alone = any((getattr(config, name, None) or 0) > 1 for name in counts)

    def accepts(self, fingerprint: str) -> bool:
        """Whether the model's backbone is the one of this fingerprint: a model may know several of the same weights."""
        return self.model is not None and bool(self.model.accepts(fingerprint))

    def needed(self) -> Any:
        """The model; StoreError if the store was opened without it."""
        if self.model is None:
            raise StoreError(
                "the store was opened without a model, which encoding text needs; open it with model= "
                f"(a LongMem over {self.layout.backbone})"
            )
        return self.model

    def find_tokenizer(self, *, needed: bool = False) -> Any:
        """The tokenizer given, or that of the model's backbone; None where there is neither, or it cannot be loaded.

        Raises DataError where it cannot be loaded and is ``needed``.
        """
        if self._tokenizer is None and self.model is not None and (name := backbone_of(self.model)):
            try:
                self._tokenizer = load_tokenizer(name)
            except DataError:
                if needed:
                    raise
        return self._tokenizer

    def tokens(self, new: NewDocument, *, begin: bool = True) -> Tokens:
        """The tokens of a text, or ids as they are.

        Args:
            begin: whether a document begins here: what the tokenizer puts before a text comes first, as in training.

        Raises:
            StoreError: nothing to remember, both given, or a tokenizer that gives no offsets.
            DataError: token ids that the backbone does not know.
        """
        if (new.text is None) == (new.ids is None):
            raise StoreError(f"document {new.name!r}: give either a text or ids=")
        if not isinstance(new.text, str | None):
            raise StoreError(f"document {new.name!r}: text (a {type(new.text).__name__}) must be a str, what it says")
        if new.text is None:
            tokens = _of_ids(new.name, new.ids)
        else:
            tokens = _of_text(new.name, new.text, self.find_tokenizer(needed=True), begin)
        if not len(tokens):
            raise StoreError(f"document {new.name!r} has no tokens; there is nothing to remember")
        if self.model is not None:
            check_ids([int(tokens.ids.max())], self.model, f"document {new.name!r}")
        return tokens

    def encode(self, pieces: Sequence[Ids]) -> list[StoredChunks]:
        """Encode pieces, each a run of whole segments whose last may be short.

        Raises StoreError where there is no model, or for numbers that the store's type cannot hold.
        """
        size, done = self.layout.segment_tokens, dict[tuple[int, int], Tensor]()
        with self._busy:
            for batch in self._batches(pieces):
                segments = [pieces[piece][start : start + size] for piece, start in batch]
                done.update(zip(batch, self._run(segments), strict=True))
        whole = ([done[piece, at] for at in range(0, len(ids), size)] for piece, ids in enumerate(pieces))
        return [pack(torch.cat(segments, dim=2), self.layout) for segments in whole]

    def _batches(self, pieces: Sequence[Ids]) -> Iterator[list[tuple[int, int]]]:
        """Segments (piece, first token) that go through together, the pieces' order kept within a length."""
        waiting: dict[int, list[tuple[int, int]]] = defaultdict(list)
        size = self.layout.segment_tokens
        for piece, ids in enumerate(pieces):
            for start in range(0, len(ids), size):
                length = self.padded(min(size, len(ids) - start))
                waiting[length].append((piece, start))
                if len(waiting[length]) == self.rows(length):
                    yield waiting.pop(length)
        for length in sorted(waiting, reverse=True):
            yield waiting[length]

    def padded(self, length: int) -> int:
        """The length at which a segment of so many tokens goes through."""
        longer = max(_SHORTEST, 1 << (length - 1).bit_length())
        return min(longer, max(length, self.layout.segment_tokens))

    def rows(self, length: int) -> int:
        """B of a batch of segments padded to this length."""
        return 1 if self._alone else max(1, self._batch_tokens // length)

    @torch.no_grad()
    def _run(self, segments: list[Ids]) -> Iterator[Tensor]:
        """Keys and values (H, 2, t, D) of each segment, in float32 on the CPU."""
        model, length = self.needed(), self.padded(len(segments[0]))
        ids = torch.zeros(self.rows(length), length, dtype=torch.long)
        for row, segment in enumerate(segments):
            ids[row, : len(segment)] = torch.from_numpy(segment.astype("int64"))
        # no mask: a causal model's tokens do not see the filling after them
        with torch.autocast(model.device.type, enabled=False):
            kv = model.encode(ids.to(model.device))
        pair = torch.stack((kv.keys, kv.values), dim=2).to("cpu", torch.float32)
        for row, segment in enumerate(segments):
            yield pair[row, :, :, : len(segment)]


def new_layout(
    model: Any, dtype: Dtype | None = None, chunk_size: int | None = None, segment_tokens: int | None = None
) -> Layout:
    """Of a new store of this model's memory.

    Raises:
        StoreError: sizes that do not fit each other, or the backbone.
    """
    if dtype not in (None, *DTYPES):
        raise StoreError(f"dtype ({dtype!r}) must be one of {', '.join(DTYPES)}")
    config = model.config.backbone_config
    size = int(model.config.chunk_size) if chunk_size is None else chunk_size
    segment = usual_window(config) // size * size if segment_tokens is None else segment_tokens
    if problems := not_a_multiple("segment_tokens", segment, "chunk_size", size):
        raise StoreError(*problems)
    if segment < max(size, 1):
        raise StoreError(f"segment_tokens ({segment}) must be at least one chunk_size ({size})")
    if (window := positions(config)) is not None and segment > window:
        raise StoreError(f"segment_tokens ({segment}) must not exceed the backbone's window of {window} tokens")
    heads, dim = model.memory_heads, model.memory_head_dim
    about = (os.urandom(8).hex(), model.fingerprint, name_of(model), model.memory_layers)
    return Layout(*about, heads, dim, size, segment, dtype or "float16", created=time.time())


def backbone_of(model: Any) -> str | None:
    """Where a model's backbone is, as others can find it: a folder, or a name of the hub; None where nothing says."""
    named, loaded = model.config.backbone_name_or_path, model.config.backbone_config._name_or_path
    # a checkpoint names its backbone from its own folder, which means another place from here, or none
    found = next((Path(name).resolve() for name in (loaded, named) if name and Path(name).is_dir()), named or loaded)
    return str(found) if found else None


def name_of(model: Any) -> str:
    """The backbone's name; of one without, what kind it is."""
    return backbone_of(model) or str(model.config.backbone_config.model_type)
