"""What ``longmem convert`` accepts, the vocabulary it makes, and the line it answers with to anything else."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.calling import Command
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from longmem import LongMem
from longmem.convert import convert, read_fairseq, tokenizer_from_fairseq
from longmem.errors import CheckpointError

DATA = Path(__file__).parents[1] / "parity" / "data"
LONGMEM = DATA / "fixture_a_longmem_plain.pt"
BACKBONE = DATA / "fixture_a_backbone_plain.pt"
STATE_DICT = DATA / "fixture_a_longmem.safetensors"

Change = Callable[[dict[str, Any]], object]


def edited(folder: Path, change: Change, **how: Any) -> Path:
    """A checkpoint with one change."""
    checkpoint = torch.load(LONGMEM, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, folder / "edited.pt", **how)
    return folder / "edited.pt"


def refusal(path: Path, **options: Any) -> str:
    """The one line; nothing is written."""
    with pytest.raises(CheckpointError) as caught:
        convert(path, path.parent / "out", **options)
    assert "\n" not in str(caught.value) and not (path.parent / "out").exists()
    return str(caught.value)


@pytest.mark.parametrize("source", [LONGMEM, STATE_DICT], ids=lambda path: path.suffix)
def test_a_checkpoint_cut_off_anywhere_is_one_line(source: Path, tmp_path: Path) -> None:
    whole = source.read_bytes()
    cut = tmp_path / source.name
    for left in (0, len(whole) // 2, -20):
        cut.write_bytes(whole[:left])
        assert refusal(cut, settings=DATA / "fixture_a.json").startswith(f"{cut}: cannot be read as")


def test_older_settings_are_read_strange_tensors_told_and_the_folder_can_be_moved(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(checkpoint: dict[str, Any]) -> None:
        checkpoint["args"] = argparse.Namespace(**checkpoint.pop("cfg")["model"])
        checkpoint["model"]["decoder.strange"] = torch.zeros(1)

    (tmp_path / "backbone").mkdir()  # another one than that of the converted checkpoint
    monkeypatch.chdir(tmp_path)
    done = command("convert", edited(tmp_path, change), "--out", "out", "--json").json
    assert (done["kind"], done["ignored"]) == ("longmem", ["decoder.strange"])
    (tmp_path / "out").rename("elsewhere")
    config = LongMem.from_pretrained("elsewhere").config
    assert (config.chunk_size, config.num_retrieved, config.memory_layer) == (2, 8, 2)
    assert (config.final_state, config.side_activation, config.side_norm_eps) == ("normed", "gelu", 1e-5)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["LONGMEM_TEST_TRAP"],)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_checkpoint_is_run(tmp_path: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGMEM_TEST_TRAP", str(tmp_path / "trap"))
    path = edited(tmp_path, lambda it: it.update(extra_state=Hostile()), _use_new_zipfile_serialization=zipped)
    assert "which is not loaded because it could run code" in refusal(path)
    assert not (tmp_path / "trap").exists()


def drop(part: str) -> Change:
    return lambda it: it.update(model={name: each for name, each in it["model"].items() if part not in name})


def set_to(name: str, value: Any) -> Change:
    return lambda it: it["cfg"]["model"].update({name: value})


REFUSED: list[tuple[Change, str]] = [
    (drop("decoder.layers.0.fc1.weight"), 'for SideNet: Missing key(s) in state_dict: "layers.0.mlp.fc_in.weight"'),
    (drop("pretrained_model"), "holds no backbone; name its checkpoint with --backbone"),
    (set_to("retrieval_layer_index", 1), "puts memory into SideNet layer 0, but the gate is in layer 1"),
    (set_to("decoder_attention_heads", 5), "5 heads do not divide the width 32"),
    (set_to("retrieval_layer_index", None), "its settings lack retrieval_layer_index"),
    (set_to("layer_reduction_factor", 0), "layer_reduction_factor (0) in its settings must be a whole number from 1"),
    (set_to("chunk_size", "four"), "chunk_size ('four') in its settings must be a whole number from 1 on; name a JSON"),
    (set_to("newgpt_mode", "rotary"), "newgpt_mode is 'rotary'; only 'alibi'"),
    (lambda it: it.update(model=[1, 2]), "has no 'model' entry with tensors"),
    (lambda it: it.update(model={"x": torch.zeros(1)}), "has neither a newgpt backbone nor a LongMem SideNet in it"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_checkpoint_that_contradicts_itself_is_refused(tmp_path: Path, change: Change, message: str) -> None:
    assert message in refusal(edited(tmp_path, change))


def test_other_files_and_folders_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.pt") == f"{tmp_path}/none.pt: no such file; give the path of a checkpoint"
    torch.save([1, 2], tmp_path / "list.pt")
    assert "has no 'model' entry with tensors" in refusal(tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds a backbone; --backbone is for a file with a SideNet alone"):
        convert(LONGMEM, tmp_path / "out", backbone=BACKBONE)
    save_file(load_file(STATE_DICT), tmp_path / "model.safetensors")
    assert "name the JSON with --settings" in refusal(tmp_path / "model.safetensors")
    (tmp_path / "model.json").write_text("{")
    assert "cannot be read as JSON" in refusal(tmp_path / "model.safetensors")
    (tmp_path / "model.json").write_text((DATA / "fixture_a.json").read_text())
    assert read_fairseq(tmp_path / "model.safetensors").setting("k") == 8
    with pytest.raises(CheckpointError, match="is there already and not empty; choose another --out"):
        convert(LONGMEM, tmp_path)


# the released vocabulary: GPT-2's byte pairs under the ids of a fairseq dictionary

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


def test_text_gets_the_ids_of_both_steps_and_comes_back(folder: Path) -> None:
    tokenizer = tokenizer_from_fairseq(folder, ROWS, 32)
    plain = TEXT.replace("<s>", "s")
    assert tokenizer(plain).input_ids == by_hand(folder, plain)
    ids = tokenizer(TEXT).input_ids
    assert tokenizer.decode(ids) == TEXT
    assert (len(tokenizer), tokenizer.model_max_length) == (ROWS, 32)
    special = tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id
    assert special == (0, 1, 2, 3)
    tokenizer.save_pretrained(str(folder / "saved"))
    assert AutoTokenizer.from_pretrained(folder / "saved")(TEXT).input_ids == ids


@pytest.mark.shared
def test_the_released_files_make_the_released_vocabulary(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "gpt2_bpe"
    tokenizer = tokenizer_from_fairseq(folder, 51_200, 1024)
    text = TEXT.replace("<s>", "s")
    assert tokenizer(text).input_ids == by_hand(folder, text)
    # the full stop, first line of the dictionary, and the last filler
    assert tokenizer.convert_tokens_to_ids(".") == 4
    assert tokenizer.convert_ids_to_tokens(51_199) == "madeupword0938"


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("vocab.bpe", "Ġk e", "a b", "is not a folder with encoder.json, vocab.bpe and dict.txt of the"),
        ("dict.txt", "\n5 7\n", "\nx 7\n", "all 256 bytes among them; give the dictionary it was trained with"),
        ("dict.txt", "madeupword0002 0\n", "", "make 266 ids, the checkpoint has 267"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_refused_and_nothing_written(
    file: str, old: str, new: str, says: str, folder: Path
) -> None:
    (folder / file).write_text((folder / file).read_text().replace(old, new))
    with pytest.raises(CheckpointError, match=says):
        tokenizer_from_fairseq(folder, ROWS)
    assert refusal(edited(folder, lambda it: None), vocabulary=folder).startswith(str(folder))
