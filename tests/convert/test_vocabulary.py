"""The released vocabulary: GPT-2's byte pairs under the ids of a fairseq dictionary."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from longmem.convert import convert, tokenizer_from_fairseq
from longmem.errors import CheckpointError

BACKBONE = Path(__file__).parents[1] / "parity" / "data" / "fixture_a_backbone_plain.pt"
TEXT = "The old  key's teeth:\n\tété, 日本 <s> don't\r\n   9,999 — <|endoftext|>"
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "k"), ("Ġk", "e")]
ROWS = 4 + 256 + len(MERGES) + 3
"""Special tokens, bytes, pairs, and three symbols that fill the table."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Bytes and four pairs, in the dictionary in another order than in the encoder."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
    numbers = {token: number for number, token in enumerate(tokens)}
    (tmp_path / "encoder.json").write_text(json.dumps(numbers))
    (tmp_path / "vocab.bpe").write_text("\n".join(["#version: 0.2", *map(" ".join, MERGES), ""]))
    lines = [f"{number} 7" for number in reversed(numbers.values())] + [f"madeupword{n:04} 0" for n in range(3)]
    (tmp_path / "dict.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def by_hand(folder: Path, text: str) -> list[int]:
    """GPT-2's ids first, then each through the dictionary, as the released code does."""
    encoder = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
    bpe = Tokenizer(models.BPE(vocab=encoder, merges=[tuple(line.split()) for line in lines if line]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    symbols = [line.split()[0] for line in (folder / "dict.txt").read_text(encoding="utf-8").splitlines()]
    return [symbols.index(str(number)) + 4 for number in bpe.encode(text).ids]


def test_text_gets_the_ids_of_both_steps_and_comes_back(folder: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_from_fairseq(folder, ROWS, 32)
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    plain = TEXT.replace("<s>", "s")
    assert tokenizer(plain).input_ids == by_hand(folder, plain)
    assert tokenizer.decode(ids) == TEXT
    assert (len(tokenizer), tokenizer.model_max_length) == (ROWS, 32)
    special = tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id
    assert special == (0, 1, 2, 3)
    tokenizer.save_pretrained(str(tmp_path / "saved"))
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(TEXT).input_ids == ids


@pytest.mark.shared
def test_the_released_files_make_the_released_vocabulary(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "gpt2_bpe"
    tokenizer = tokenizer_from_fairseq(folder, 51_200, 1024)
    assert len(tokenizer) == 51_200
    text = TEXT.replace("<s>", "s")
    assert tokenizer(text).input_ids == by_hand(folder, text)
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    # the full stop, first line of the dictionary, and the last filler
    assert tokenizer.convert_tokens_to_ids(".") == 4
    assert tokenizer.convert_ids_to_tokens(51_199) == "madeupword0938"


def test_a_vocabulary_of_another_size_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"make 267 ids, the checkpoint has 96, .*; give the dictionary it was"):
        convert(BACKBONE, tmp_path / "out", vocabulary=folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "harm", "says"),
    [
        ("vocab.bpe", lambda text: f"{text}a b\n", "is not a folder with encoder.json, vocab.bpe and dict.txt of the"),
        ("dict.txt", lambda text: text.replace("\n5 7\n", "\nx 7\n"), "all 256 bytes among them"),
    ],
)
def test_damaged_files_are_refused_in_one_line(file: str, harm: Callable[[str], str], says: str, folder: Path) -> None:
    (folder / file).write_text(harm((folder / file).read_text()))
    with pytest.raises(CheckpointError, match=says) as problem:
        tokenizer_from_fairseq(folder, ROWS)
    assert "\n" not in str(problem.value)
