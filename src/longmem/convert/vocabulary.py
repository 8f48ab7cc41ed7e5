"""The released code's vocabulary as a tokenizer of transformers.

Text goes through GPT-2's byte pairs (``encoder.json``, ``vocab.bpe``), and GPT-2's ids through a fairseq dictionary
(``dict.txt``): line n, counted from 0, is id n + 4, behind ``<s>``, ``<pad>``, ``</s>`` and ``<unk>``. Here both steps
are one table: the byte pairs carry the dictionary's ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from longmem.errors import CheckpointError

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
"""Ids 0 to 3 of every fairseq dictionary."""
FILES = ("encoder.json", "vocab.bpe", "dict.txt")


def tokenizer_from_fairseq(folder: str | Path, rows: int, window: int | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a released checkpoint.

    Args:
        folder: holds ``encoder.json``, ``vocab.bpe`` and ``dict.txt``.
        rows: of the model's embeddings (51,200 in the released ones); the dictionary must have as many.
        window: tokens that the model attends to, ``model_max_length``.
    """
    folder = Path(folder)
    encoder, merges, symbols = _encoder(folder), _merges(folder), _symbols(folder)
    spelled = {str(number): token for token, number in encoder.items()}
    vocabulary = {token: number for number, token in enumerate(SPECIAL)}
    for number, symbol in enumerate(symbols, start=len(SPECIAL)):
        vocabulary[spelled.get(symbol, symbol)] = number  # what is no id fills the table up to its size
    if len(vocabulary) != len(symbols) + len(SPECIAL):
        raise CheckpointError(f"{folder / 'dict.txt'}: names a symbol twice; give the dictionary of the released code")
    if len(vocabulary) != rows:
        raise CheckpointError(
            f"{folder / 'dict.txt'}: {len(symbols):,} lines and {len(SPECIAL)} special tokens make "
            f"{len(vocabulary):,} ids, the checkpoint has {rows:,}; give the dictionary it was trained with"
        )
    unknown = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - vocabulary.keys())
    if unknown:
        raise CheckpointError(
            f"{folder / 'dict.txt'}: lacks {len(unknown)} of the 256 bytes; give the dictionary of the released code"
        )
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as problem:  # a pair whose parts or whole are not in the table
        raise CheckpointError(f"{folder / 'vocab.bpe'}: does not fit the dictionary ({problem})") from problem
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    settings: dict[str, Any] = {} if window is None else {"model_max_length": window}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **named, **settings)


def _encoder(folder: Path) -> dict[str, int]:
    try:
        return {str(token): int(number) for token, number in json.loads(_text(folder / "encoder.json")).items()}
    except (ValueError, TypeError, AttributeError) as problem:
        raise CheckpointError(f"{folder / 'encoder.json'}: is no table of tokens and ids ({problem})") from problem


def _merges(folder: Path) -> list[tuple[str, str]]:
    lines = enumerate(_text(folder / "vocab.bpe").split("\n"), start=1)
    pairs = {number: line.split() for number, line in lines if line.strip() and not line.startswith("#version")}
    if odd := [number for number, pair in pairs.items() if len(pair) != 2]:
        raise CheckpointError(f"{folder / 'vocab.bpe'}: line {odd[0]} is not a pair of symbols")
    return [(first, second) for first, second in pairs.values()]


def _symbols(folder: Path) -> list[str]:
    return [line.rsplit(" ", 1)[0] for line in _text(folder / "dict.txt").split("\n") if line]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as problem:
        raise CheckpointError(f"{path}: no such file; the folder must hold {', '.join(FILES)}") from problem
    except (OSError, UnicodeDecodeError) as problem:
        raise CheckpointError(f"{path}: cannot be read ({problem})") from problem
