"""A tokenizer from text, or the one a model was made with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from longmem.errors import ConfigError, DataError

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
MIN_VOCABULARY = 256 + 3
_PIECE = 1 << 16


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_bytes: int = 64_000_000) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ``<s>``, ``<pad>`` and ``</s>`` as ids 0, 1, 2; every UTF-8 text can be encoded.

    Args:
        texts: what to learn the merges from, in order.
        vocab_size: V, the 256 bytes and the three special tokens included.
        max_bytes: stop reading after about so many bytes; more changes the merges little and takes longer.

    Raises:
        ConfigError: a vocabulary too small for bytes.
        DataError: no text.
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


def first_bytes(texts: Iterable[str], most: int) -> Iterator[str]:
    """Texts until about so many bytes are read, the last one cut."""
    for text in texts:
        yield text[:most]
        most -= len(text)
        if most <= 0:
            return


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or at a hub id.

    Raises:
        DataError: there is none.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: no tokenizer ({reason}); name a folder with tokenizer.json, or a hub id") from error
    return tokenizer


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
