"""What ``longmem convert`` accepts, and the line it answers with to what it does not."""

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

from longmem import LongMem
from longmem.convert import convert, read_fairseq
from longmem.errors import CheckpointError

DATA = Path(__file__).parents[1] / "parity" / "data"
LONGMEM = DATA / "fixture_a_longmem_plain.pt"
BACKBONE = DATA / "fixture_a_backbone_plain.pt"
STATE_DICT = DATA / "fixture_a_longmem.safetensors"
NAMESPACE = DATA / "fixture_a_backbone_namespace_fp16.pt"

Change = Callable[[dict[str, Any]], object]


def edited(folder: Path, change: Change, source: Path = LONGMEM, **how: Any) -> Path:
    """A checkpoint with one change."""
    checkpoint = torch.load(source, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, folder / "edited.pt", **how)
    return folder / "edited.pt"


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        convert(path, path.parent / "out", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("source", [LONGMEM, STATE_DICT, NAMESPACE], ids=lambda path: path.stem)
def test_a_checkpoint_cut_off_anywhere_is_one_line(source: Path, tmp_path: Path) -> None:
    whole = source.read_bytes()
    cut = tmp_path / source.name
    options = {"settings": DATA / "fixture_a.json"} if source.suffix == ".safetensors" else {}
    for left in (0, 3, len(whole) // 2, -20):
        cut.write_bytes(whole[:left])
        assert refusal(cut, **options).startswith(f"{cut}: cannot be read as")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["namespace cfg", "args", "dict"])
def test_settings_may_be_a_namespace_a_dict_or_the_older_args(kind: str, tmp_path: Path) -> None:
    def change(checkpoint: dict[str, Any]) -> None:
        settings = checkpoint["cfg"]["model"]
        if kind == "namespace cfg":
            checkpoint["cfg"] = {"model": argparse.Namespace(**settings)}
        elif kind == "args":
            checkpoint["args"], checkpoint["cfg"] = argparse.Namespace(**settings), None

    convert(edited(tmp_path, change), tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "elsewhere")  # the converted folder can be moved
    config = LongMem.from_pretrained(tmp_path / "elsewhere").config
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


def test_a_converted_checkpoint_names_its_own_backbone_whatever_is_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "backbone").mkdir()
    monkeypatch.chdir(tmp_path)
    convert(LONGMEM, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["backbone_name_or_path"] == "backbone"


def test_tensors_that_mean_nothing_are_told(tmp_path: Path, command: Command) -> None:
    path = edited(tmp_path, lambda it: it["model"].update({"decoder.strange": torch.zeros(1)}))
    assert command("convert", path, "--out", tmp_path / "out", "--json").json["ignored"] == ["decoder.strange"]


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
    (set_to("newgpt_mode", "rotary"), "newgpt_mode is 'rotary'; only 'alibi'"),
    (lambda it: it.pop("model"), "has no 'model' entry with tensors"),
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
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "is there already and not empty; choose another --out" in refusal(tmp_path / "list.pt")


def test_a_state_dict_finds_the_json_beside_it_or_asks(tmp_path: Path) -> None:
    save_file(load_file(STATE_DICT), tmp_path / "model.safetensors")
    assert "name the JSON with --settings" in refusal(tmp_path / "model.safetensors")
    (tmp_path / "model.json").write_text((DATA / "fixture_a.json").read_text())
    assert read_fairseq(tmp_path / "model.safetensors").setting("k") == 8
    (tmp_path / "model.json").write_text("{")
    assert "cannot be read as JSON" in refusal(tmp_path / "model.safetensors")
