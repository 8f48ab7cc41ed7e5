"""``longmem eval`` from files to numbers, table, JSON and pictures, and its one-line errors."""

import json
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from tests.calling import Command

from longmem.cli.eval import command as group
from longmem.evaluation.systems import load_systems
from longmem.progress import EVERY

SYSTEMS = "--control control --memtrm memtrm --training-free 0.3 --memory-sizes 256 --window 128 --resamples 20"
ASKED = {
    "chapterbreak": "--data chapters_ctx_300.json --prefix 20,100,300 --suffix-tokens 16",
    "icl": "--data icl --datasets mr,subj --local-shots 1,3 --memory-shots 0,10 --seeds 2 --limit 6 --full-context 384",
    "squad": "--train train.json --data dev.json --local-shots 1 --memory-shots 0,4 --seeds 2 --limit 12 "
             "--max-answer-tokens 6",
    "needle": "--data text.txt --kinds passkey,multi --lengths 1k,2k --depths 3 --trials 2",
    "dialogue": "--data locomo.json --data msc.txt --new-tokens 6 --full-context 384",
    "facts": "--data text.txt --between 64,512 --sessions 2 --facts 5 --recall 2 --new-tokens 8",
    "babi": "--data babi --text text.txt --tasks 1,2 --lengths 512,1k --trials 2 --recall 1",
}  # fmt: skip
"""Arguments of ``longmem eval TASK`` beside the systems; some tens of examples of each."""
TEXTS = "--data texts --window 16 --batch 2 --resamples 20 --group-by-prefix __"


def measured(out: Path, task: str) -> dict[str, Any]:
    """Values of every example, means and differences of every group; how much was asked, and what was said."""
    result = json.loads((out / f"{task}.json").read_text())
    metrics = [metric["name"] for metric in result["metrics"]]
    return {
        "systems": list(result["systems"]),
        "metrics": metrics,
        "examples": {
            example["id"]: [[value[name] for name in metrics] for value in example["values"].values()]
            for example in result["examples"]
        },
        "groups": {
            group["group"]: {f"{one['system']} {one['metric']}": with_interval(one) for one in group["scores"]}
            | {"size": [group["examples"], group["units"]]}
            for group in result["groups"]
        },
        "differences": {
            f"{one['system']} - {one['against']}, {one['metric']}": with_interval(one)
            for one in result["groups"][-1]["differences"]
        },
        "extra": result["extra"],
        "said": [
            next((one.strip() for one in line["said"].splitlines() if one.strip()), "")
            for line in sorted(lines_of(out / "answers.jsonl"), key=lambda line: (line["system"], line["example"]))
        ],
        "records": len(lines_of(out / "records.jsonl")),  # what is equal is asked once, also under another name
    }


def lines_of(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().split("\n") if line] if file.exists() else []


def with_interval(score: dict[str, Any]) -> list[float]:
    edges = score["interval"]
    return [score["value"], *([] if edges is None else [edges["low"], edges["high"]])]


@pytest.mark.parametrize("task", ASKED)
def test_every_number_is_that_of_the_tagged_commit(task: str, home: Path, tmp_path: Path, command: Command) -> None:
    """``golden.json`` is what ``measured`` returned at the tag ``house-before``, for each task, on the same files.

    Facts with passages in the window are newer: passages stand in the order of their age now.
    """
    known = json.loads(Path(__file__).with_name("golden.json").read_text())[task]
    done = command("eval", task, "--model", "side", *SYSTEMS.split(), *ASKED[task].split(), "--out", tmp_path)
    assert done.status == 0, done.err
    found = measured(tmp_path, task)
    assert found["systems"] == known["systems"] and found["examples"].keys() == known["examples"].keys()
    leaves = leaves_of(found)
    for at, leaf in leaves_of(known).items():
        assert leaves[at] == (leaf if isinstance(leaf, str) else pytest.approx(leaf, abs=1e-4)), at


def leaves_of(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {at: leaf for name, inner in pairs for at, leaf in leaves_of(inner, f"{path}/{name}").items()}
    return {path: value}


def test_an_interrupted_task_goes_on_where_it_stopped(
    home: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EVERY, False, 0.0)
    asked = (
        "--model side --memory-sizes 256 --window 128 --data babi --text text.txt --tasks 1 --lengths 512 --recall 1"
    )
    given = [*asked.split(), "--trials", 4, "--resamples", 20, "--json", "--out", tmp_path]
    whole, records = command("eval", "babi", *given), tmp_path / "records.jsonl"
    assert "babi, LongMem, 256 tokens and LongMem, 256 tokens, 1 passages: 1 of 8" in whole.err, (
        "memory is read for both"
    )
    lines = [line for line in records.read_text().splitlines() if line]
    records.write_bytes("\n".join(lines[:9]).encode() + b'\n\xff\x00\n{"key": "cut sh')
    again = leaves_of(command("eval", "babi", *given).json["examples"])
    assert {at: pytest.approx(leaf) for at, leaf in leaves_of(whole.json["examples"]).items()} == again
    assert len([line for line in records.read_text(errors="replace").splitlines() if line]) == len(lines) + 2


def test_all_systems_to_table_json_and_pictures(home: Path, command: Command, tmp_path: Path) -> None:
    given = (
        "--model side --control control --memtrm memtrm --training-free 0.1 --training-free free --memory-sizes 16,64"
    )
    asked = [*given.split(), *TEXTS.split(), "--set", "memory_temperature=0.5", "--out", tmp_path]
    shown = " ".join(command("eval", "perplexity", *asked).out.split())
    for words in (
        "backbone alone", "SideNet, memory off", "SideNet trained without memory", "LongMem, 16 tokens",
        "MemTRM, 64 tokens", "training-free 0.1, 16 tokens", "training-free 0.25, 64", "segments of 16",
        "sliding window, 16 by 8", "two (1)", "3 documents of 2 projects", "2 projects say little about another one",
    ):  # fmt: skip
        assert words in shown, words
    result = json.loads((tmp_path / "perplexity.json").read_text())
    assert {"memory_16", "control", "memtrm_off", "training_free_0.25_64"} <= set(result["systems"])
    assert result["header"]["samples"]["documents"] == 3 and result["header"]["samples"]["projects"] == 2
    heads = result["header"]["models"]
    assert heads["memory_16"]["memory_temperature"] == 0.5 and heads["memtrm_16"]["memory_temperature"] == 1
    assert heads["training_free_0.1_16"]["backbone"] == heads["backbone"]["backbone"] != heads["memtrm_16"]["backbone"]
    pictures = {"perplexity-by-position.png", "perplexity-by-memory-size.png"}
    assert {file.name for file in tmp_path.iterdir()} == {"perplexity.json", "records.jsonl", *pictures}
    assert command("eval", "perplexity", *asked, "--json").json["protocols"] == result["protocols"]


@pytest.mark.parametrize(
    ("options", "systems"),
    [
        ("--model backbone", ["backbone"]),
        ("--model memtrm --dtype float16", ["backbone", "memtrm_off", "memtrm_512"]),
        ("--model memtrm --systems backbone,memtrm_5", ["backbone", "memtrm_512"]),
        ("--model memtrm --training-free 0.5", ["backbone", "memtrm_off", "memtrm_512", "training_free_0.5_512"]),
        ("--model free --memory-sizes 8 --dtype float16", ["backbone", "training_free_0.25_8"]),
        ("--model backbone --training-free 0.5 --memory-sizes 8", ["backbone", "training_free_0.5_8"]),
        ("--model side --systems memory_1,memory_off --memory-sizes 16", ["memory_off", "memory_16"]),
    ],
)
def test_a_baseline_a_backbone_or_a_choice_of_systems_is_measured_by_itself(
    options: str, systems: list[str], home: Path, command: Command, tmp_path: Path
) -> None:
    given = [*options.split(), *TEXTS.split(), "--num-documents", 2, "--max-tokens", 30, "--protocol", "sliding"]
    result = command("eval", "perplexity", *given, "--json", "--out", tmp_path).json
    assert list(result["systems"]) == systems and list(result["protocols"]) == ["sliding"]
    dtypes = {about["dtype"] for about in result["header"]["models"].values() if "dtype" in about}
    assert dtypes <= {"float16" if "float16" in options else "float32"}
    assert [(d["id"], d["tokens"]) for d in result["documents"]] == [("one__a.txt", 29), ("one__b.txt", 29)]
    assert (tmp_path / "perplexity-by-position.png").exists()


def test_a_memory_as_large_as_a_task_needs_is_of_whole_chunks(home: Path) -> None:
    assert load_systems("side", default_sizes=[8257])[-1].name == "memory_8260"


@pytest.mark.parametrize("task", group.commands.values(), ids=lambda task: task.name)
def test_no_two_options_of_a_command_are_one(task: click.Command) -> None:
    """As ``--changed`` of facts was with ``--set``."""
    assert len({each.name for each in task.params}) == len(task.params)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--model ./nowhere", "./nowhere: no such folder; name a checkpoint folder, a run folder or a hub id"),
        ("--model texts", "no model here (no config.json in it or in its final/); is the training finished?"),
        ("--model side --control foreign", "was made over backbone"),
        ("--model side --control backbone", "not a LongMem checkpoint; --control takes a SideNet trained without"),
        ("--model side --memtrm foreign-memtrm", "MemTRM was made from backbone"),
        ("--model side --memtrm side", "not a MemTRM checkpoint; --memtrm takes one trained with method = 'memtrm'"),
        ("--model memtrm --backbone other", "MemTRM was made from backbone"),
        (
            "--model memtrm --control side",
            "--set, --memory-sizes and --backbone are of a LongMem checkpoint; memtrm is",
        ),
        ("--model side --training-free backbone", "no training-free settings; --training-free takes a share"),
        ("--model side --training-free 0.1 --training-free 0.10", "training-free 0.1, 512 tokens: compared twice"),
        ("--model memtrm --memtrm memtrm", "MemTRM, memory off: compared twice; leave one of them away"),
        ("--model side --memory-sizes 64,17", "memory size (17) must be a multiple of chunk_size (4); try 16 or 20"),
        ("--model backbone --memory-sizes 64", "are of a LongMem checkpoint; backbone is none"),
        ("--model side --systems back,memory_1", "--systems (memory_1) begins no system's name; there are backbone, "),
        ("--model side --stride 600", "stride (600) must be between 1 and the window (512); try 256"),
        ("--model side --device meta", "device (meta) cannot be used ("),
        ("--model side --max-tokens 2 --data short/a.txt", "no text to measure: 1 documents read, none has two tokens"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(options: str, says: str, home: Path, command: Command) -> None:
    data = [] if "--data" in options else ["--data", "texts"]
    assert says in command("eval", "perplexity", *options.split(), *data).error


def test_without_the_extra_for_the_harness_one_line_says_so(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = command("eval", "harness", "--model", "nowhere", "--tasks", "boolq")
    assert done.error == "lm-evaluation-harness is not installed; pip install 'longmem-lm[eval]'"
