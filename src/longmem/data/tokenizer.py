"""A tokenizer from text, or the one a model was made with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from longmem.errors import ConfigError, DataError, first_line

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
MIN_VOCABULARY = 256 + 3
_PIECE = 1 << 16
_MARGIN = 256  # characters, more than any token has


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
    known = int(model.get_input_embeddings().weight.shape[0])
    # without tokens added later: some checkpoints bring one or two that occur in no text and have no embedding
    if tokenizer.vocab_size > known:
        raise DataError(
            f"{name or tokenizer.name_or_path or 'this'}: a tokenizer of {tokenizer.vocab_size:,} tokens, the model "
            f"knows {known:,}: it is another model's; {way_out}"
        )


def check_ids(ids: Iterable[int], model: Any, what: str) -> None:
    """Refuse token ids of ``what`` ("the prompt") that the model has no embeddings for."""
    known = int(model.get_input_embeddings().weight.shape[0])
    wrong = next((each for each in ids if not 0 <= each < known), None)
    if wrong is not None:
        raise DataError(
            f"{what} has the token id {wrong:,}, the model knows {known:,}: the tokenizer is another model's; name the "
            "right one with --tokenizer"
        )


def first_text(text: str, tokenizer: Any, tokens: int) -> str:
    """A beginning of a text, cut where words end, whose first ``tokens`` tokens are those of the whole text.

    It is found without tokenising the rest: of a book of which 1,000 tokens are wanted, about 8,000 characters.
    """
    characters = 8 * tokens + _MARGIN
    while characters < len(text):
        end = _word_end(text, characters)
        # what comes after the cut can change the last word only, and its neighbours where no blank separates words
        sure = text[: max(0, end - _MARGIN)]
        if end < len(text) and len(tokenizer(sure, add_special_tokens=False, verbose=False)["input_ids"]) >= tokens:
            return text[:end]
        characters *= 2
    return text


def _word_end(text: str, start: int) -> int:
    found = re.compile(r"\s").search(text, start)
    return found.start() if found else len(text)


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
    pieces = list(_pieces(texts, max_bytes))
    if not pieces:
        raise DataError("the tokenizer has no text to learn from; check data.paths")
    tokenizer.train_from_iterator(pieces, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def _pieces(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Texts cut into pieces at line ends, so that all cores count merges at once."""
    seen = 0
    for text in texts:
        start = 0
        while start < len(text) and seen < max_bytes:
            end = text.find("\n", start + _PIECE) + 1 or len(text)
            yield text[start:end]
            seen += end - start
            start = end
        if seen >= max_bytes:
            return
