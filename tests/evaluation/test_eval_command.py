"""``longmem eval perplexity`` from files to table, JSON and pictures, and its one-line errors."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.calling import Command
from tests.evaluation.pairs import SHAPE, TEXT, TOKENIZER, backbone
from tests.family_table import disturbed

from longmem import LongMem, MemTRM, TrainingFree
from longmem.data.tokens import train_tokenizer
from longmem.evaluation.systems import load_systems


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two backbones; over the first a SideNet, a control, a MemTRM and settings without training; three documents."""
    home = tmp_path_factory.mktemp("home")
    for seed, name in enumerate(("backbone", "other")):
        backbone(seed).save_pretrained(home / name)
        TOKENIZER.save_pretrained(home / name)
    for seed, (name, over) in enumerate((("side/final", "backbone"), ("control", "backbone"), ("foreign", "other"))):
        disturbed(LongMem.from_backbone(home / over, **SHAPE), 0.05, seed).save_pretrained(home / name)
    for name, over in (("memtrm/final", "backbone"), ("foreign-memtrm", "other")):
        disturbed(MemTRM.from_backbone(home / over, **SHAPE), 0.05).save_pretrained(home / name)
    TrainingFree.from_backbone(home / "backbone", gate=[0.1, 0.2, 0.3, 0.4], **SHAPE).save_pretrained(home / "free")
    (home / "texts").mkdir()
    for i, name in enumerate(("one__a", "one__b", "two__a")):
        (home / "texts" / f"{name}.txt").write_text(TEXT * (i + 2))
    train_tokenizer([" ".join(f"word{number}" for number in range(200))], 400).save_pretrained(home / "larger")
    (home / "no-object").mkdir()
    (home / "no-object" / "config.json").write_text("[1]")
    (home / "short.txt").write_text("a")
    return home


def test_all_systems_from_run_folders_to_table_json_and_pictures(home: Path, command: Command, tmp_path: Path) -> None:
    given: list[Any] = ["--model", home / "side", "--control", home / "control", "--memtrm", home / "memtrm"]
    given += ["--training-free", "0.1", "--training-free", home / "free", "--memory-sizes", "16,64"]
    given += ["--set", "memory_temperature=0.5"]
    given += ["--data", home / "texts", "--group-by-prefix", "__", "--batch", 2, "--resamples", 20, "--out", tmp_path]
    shown = command("eval", "perplexity", *given).out
    for words in (
        "backbone alone", "SideNet, memory off", "SideNet trained without memory", "LongMem, 16 tokens",
        "MemTRM, 64 tokens", "training-free 0.1, 16 tokens", "training-free 0.25, 64", "segments of 16",
        "sliding window, 16 by 8", "two (1)", "3 documents of 2 projects", "2 projects say little about another one",
    ):  # fmt: skip
        assert words in " ".join(shown.split()), words
    result = json.loads((tmp_path / "perplexity.json").read_text())
    assert {"memory_16", "control", "memtrm_off", "training_free_0.25_64"} <= set(result["systems"])
    assert result["header"]["samples"]["documents"] == 3 and result["header"]["samples"]["projects"] == 2
    heads = result["header"]["models"]
    assert heads["memory_16"]["memory_temperature"] == 0.5 and heads["memtrm_16"]["memory_temperature"] == 1
    assert heads["training_free_0.1_16"]["backbone"] == heads["backbone"]["backbone"] != heads["memtrm_16"]["backbone"]
    assert {file.name for file in tmp_path.iterdir()} == {
        "perplexity.json",
        "records.jsonl",
        "perplexity-by-position.png",
        "perplexity-by-memory-size.png",
    }
    assert command("eval", "perplexity", *given, "--json").json["protocols"] == result["protocols"]


@pytest.mark.parametrize(
    ("model", "options", "systems"),
    [
        ("backbone", [], ["backbone"]),
        ("memtrm", ["--dtype", "float16"], ["backbone", "memtrm_off", "memtrm_64"]),
        ("memtrm", ["--systems", "backbone,memtrm_64"], ["backbone", "memtrm_64"]),
        ("memtrm", ["--systems", "memtrm_6"], ["memtrm_64"]),
        ("memtrm", ["--training-free", "0.5"], ["backbone", "memtrm_off", "memtrm_64", "training_free_0.5_64"]),
        ("free", ["--memory-sizes", "8", "--dtype", "float16"], ["backbone", "training_free_0.25_8"]),
        ("backbone", ["--training-free", "0.5", "--memory-sizes", "8"], ["backbone", "training_free_0.5_8"]),
    ],
)
def test_a_baseline_or_a_backbone_is_measured_by_itself(
    model: str, options: list[str], systems: list[str], home: Path, command: Command
) -> None:
    data = ["--data", home / "texts", "--num-documents", 2, "--max-tokens", 30, "--protocol", "sliding"]
    given = ("--model", home / model, *data, "--resamples", 20, "--json", *options)
    result = command("eval", "perplexity", *given).json
    assert list(result["systems"]) == systems
    assert list(result["protocols"]) == ["sliding"]
    dtypes = {about["dtype"] for about in result["header"]["models"].values() if "dtype" in about}
    assert dtypes <= {"float16" if "float16" in options else "float32"}
    assert [(d["id"], d["tokens"]) for d in result["documents"]] == [("one__a.txt", 29), ("one__b.txt", 29)]


def test_a_memory_as_large_as_a_task_needs_is_of_whole_chunks(home: Path) -> None:
    found = load_systems(str(home / "side"), default_sizes=[8257])
    assert found[-1].name == "memory_8258"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--model side --include three*", "no document matches three*; there are one__a.txt, one__b.txt, two__a.txt"),
        ("--model ./nowhere", "./nowhere: no such folder; name a checkpoint folder, a run folder or a hub id"),
        ("--model texts", "no model here (no config.json in it or in its final/); is the training finished?"),
        ("--model no-object", "no-object/config.json: no JSON object ("),
        ("--model side --control foreign", "was made over backbone"),
        ("--model side --backbone other", "was made over backbone"),
        ("--model side --control backbone", "not a LongMem checkpoint; --control takes a SideNet trained without"),
        ("--model side --memtrm foreign-memtrm", "MemTRM was made from backbone"),
        ("--model side --memtrm side", "not a MemTRM checkpoint; --memtrm takes one trained with method = 'memtrm'"),
        ("--model memtrm --backbone other", "MemTRM was made from backbone"),
        (
            "--model memtrm --control side",
            "--control, --set, --memory-sizes and --backbone are of a LongMem checkpoint; ",
        ),
        ("--model side --training-free 1.5", "gate (1.5) must be between 0 (memory unread) and 1"),
        ("--model side --training-free backbone", "no training-free settings; --training-free takes a share"),
        ("--model side --training-free 0.1 --training-free 0.10", "training-free 0.1, 64 tokens: compared twice"),
        ("--model memtrm --memtrm memtrm/final", "MemTRM, memory off: compared twice; leave one of them away"),
        ("--model side --memory-sizes 64,17", "memory size (17) must be a multiple of chunk_size (2); try 16"),
        ("--model backbone --memory-sizes 64", "are of a LongMem checkpoint; backbone is none"),
        ("--model side --systems back,memory_1", "--systems (memory_1) begins no system's name; there are backbone, "),
        ("--model side --stride 40", "stride (40) must be between 1 and the window (16); try 8"),
        ("--model side --device meta", "device (meta) cannot be used ("),
        ("--model side --tokenizer larger", "it is another model's; name the right one with --tokenizer"),
        ("--model side --max-tokens 2 --data short.txt", "no text to measure: 1 documents read, none has two tokens"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(
    options: str, says: str, home: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    data = [] if "--data" in options else ["--data", "texts"]
    assert says in command("eval", "perplexity", *options.split(), *data).error


def test_without_the_extra_for_the_harness_one_line_says_so(
    home: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = command("eval", "harness", "--model", home / "side", "--tasks", "boolq")
    assert done.error == "lm-evaluation-harness is not installed; pip install 'longmem-lm[eval]'"


def test_systems_without_the_backbone_have_tables_and_pictures_too(
    home: Path, command: Command, tmp_path: Path
) -> None:
    given = ["--model", home / "side", "--systems", "memory_1,memory_off", "--memory-sizes", "16", "--resamples", 20]
    given += ["--data", home / "texts", "--group-by-prefix", "__", "--protocol", "sliding", "--out", tmp_path]
    shown = " ".join(command("eval", "perplexity", *given).out.split())
    assert "By group (documents)" in shown and "LongMem, 16 tokens, against SideNet, memory off" in shown
    assert (tmp_path / "perplexity-by-position.png").exists()
