"""ChapterBreak: files as they are read, prefixes and suffixes as they are cut, and accuracies worked by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from longmem import AlibiGPTForCausalLM, LongMem
from longmem.cli.main import main
from longmem.errors import ConfigError, DataError
from longmem.evaluation.asking import Scored, askers
from longmem.evaluation.bootstrap import Bootstrap
from longmem.evaluation.runner import run_task
from longmem.evaluation.systems import Comparison
from longmem.evaluation.tasks.chapterbreak import ChapterBreakSettings, ChapterBreakTask, measure
from longmem.evaluation.tasks.chapterbreak_data import files_for, read_chapterbreak

Write = Callable[..., Path]
SETTINGS = ChapterBreakSettings(prefixes=(20, 60), suffix=10)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write(name, works, text)``: a file of the official form; two examples of each work."""

    def make(name: str = "chapterbreak_ctx_64.json", works: int = 2, text: str = "so it ended. ") -> Path:
        examples = [
            {"ctx": f"{text * 8}{n}\n", "pos": f"The {n}th day.", "negs": [f"Then {k} came, {n}." for k in "abcde"]}
            for n in range(2)
        ]
        splits = {split: {f"{split}{w}": examples for w in range(works)} for split in ("pg19", "ao3")}
        (tmp_path / name).write_text(json.dumps(splits))
        return tmp_path / name

    return make


def test_accuracy_of_scores_worked_by_hand() -> None:
    options = [[1] * 4, [1] * 2, [1] * 8, [1], [1], [1]]
    # per token: -1, -1.5, -0.375, -9, -9, -9: summed the second wins, per token the third
    wrong = Scored((-4.0, -3.0, -3.0, -9.0, -9.0, -9.0), (False,) * 6, 0)
    assert measure(wrong, options) == {"accuracy": 0.0, "accuracy_per_token": 0.0, "gold_nats": 1.0}
    # per token: -1, -2, -0.625: summed the first wins
    mixed = Scored((-4.0, -4.5, -5.0, -9.0, -9.0, -9.0), (False,) * 6, 0)
    assert measure(mixed, options) == {"accuracy": 100.0, "accuracy_per_token": 0.0, "gold_nats": 1.0}
    # the published script calls an example right unless a negative scores more
    tied = Scored((-4.0, -4.0, -8.0, -9.0, -9.0, -9.0), (False,) * 6, 0)
    assert measure(tied, options) == {"accuracy": 100.0, "accuracy_per_token": 100.0, "gold_nats": 1.0}


def test_files_of_the_official_form_are_read(write: Write) -> None:
    file = read_chapterbreak(write())
    assert (file.name, file.prefix, len(file.items)) == ("chapterbreak_ctx_64.json", 64, 8)
    first = file.items[0]
    assert (first.split, first.work, first.number, len(first.options)) == ("pg19", "pg190", 0, 6)
    assert first.options[:2] == ("The 0th day.", "Then a came, 0.")


def test_for_a_prefix_the_shortest_file_that_is_long_enough_is_taken(write: Write) -> None:
    files = [read_chapterbreak(write(f"chapterbreak_ctx_{n}.json")) for n in (128, 64, 512)]
    assert [file.prefix for length in (10, 64, 65, 512) for file in files_for(files, length)] == [64, 64, 128, 512]
    with pytest.raises(ConfigError, match=r"--prefix 513 is longer than the prefixes of the files \(512 tokens"):
        files_for(files, 513)
    unnamed = read_chapterbreak(write("mine.json"))
    assert files_for([unnamed], 9000) == [unnamed]
    assert files_for([unnamed, *files], 65) == [unnamed, files[0]]
    assert files_for([*files, unnamed], 513) == [unnamed]


def test_a_work_that_two_files_have_for_one_prefix_is_refused(
    write: Write, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    files = [read_chapterbreak(write(name)) for name in ("chapterbreak_ctx_64.json", "chapterbreak_ctx_128.json")]
    ChapterBreakTask(files, byte_tokenizer, SETTINGS)  # the same works behind longer prefixes
    with pytest.raises(ConfigError, match=r"a.json and b.json are both taken for a prefix .* \(pg19, pg190\)"):
        ChapterBreakTask([read_chapterbreak(write(name)) for name in ("a.json", "b.json")], byte_tokenizer, SETTINGS)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ("[]", "the file is a list, not an object"),
        ('{"pg19": {"7": {}}}', "pg19, work 7 is a dict, not a list"),
        ('{"pg19": {"7": [{"ctx": "a", "pos": "b", "negs": []}]}}', "pg19, work 7, example 1 must have the texts"),
        ('{"pg19": {"7": [{"ctx": "a", "pos": " ", "negs": ["c"]}]}}', "none of them empty"),
        ("{}", "no examples in it"),
    ],
)
def test_other_files_are_refused_by_what_is_wrong(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=said):
        read_chapterbreak(tmp_path / "x.json")
    with pytest.raises(DataError, match="No such file"):
        read_chapterbreak(tmp_path / "no.json")


def test_prefixes_lose_their_left_end_and_suffixes_their_right(
    write: Write, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    task = ChapterBreakTask([read_chapterbreak(write())], byte_tokenizer, SETTINGS)
    by_prefix = {example.prefix: task.question(example) for example in task.examples() if example.item.work == "ao30"}
    text = "so it ended. " * 8 + "1\n\n"
    for prefix, question in by_prefix.items():
        assert byte_tokenizer.decode(question.context) == text[-prefix:]
        decoded = [byte_tokenizer.decode(option) for option in question.options]
        assert decoded == ["The 1th da", *(f"Then {k} cam" for k in "abcde")]
        assert question.memory == ()


def test_groups_are_splits_and_prefixes_and_units_are_works(
    write: Write, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = ChapterBreakSettings(prefixes=(20, 1024), suffix=10)
    task = ChapterBreakTask([read_chapterbreak(write("any.json"))], byte_tokenizer, settings)
    examples = task.examples()
    assert {example.group for example in examples} == {"pg19, 20", "pg19, 1k", "ao3, 20", "ao3, 1k"}
    assert {example.unit for example in examples} == {"pg19/pg190", "pg19/pg191", "ao3/ao30", "ao3/ao31"}
    assert len({example.digest for example in examples}) == 4  # equal examples of different works are asked alike
    assert [metric.chance for metric in task.metrics] == [pytest.approx(100 / 6), pytest.approx(100 / 6), None]


def test_a_limit_draws_the_same_examples_for_every_prefix(
    write: Write, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = ChapterBreakSettings(prefixes=(20, 30), suffix=10, limit=5)
    task = ChapterBreakTask([read_chapterbreak(write(works=6))], byte_tokenizer, settings)
    drawn: dict[str, list[tuple[str, int]]] = {}
    for example in task.examples():
        drawn.setdefault(example.group, []).append((example.item.work, example.item.number))
    assert drawn["pg19, 20"] == drawn["pg19, 30"]
    assert {len(found) for found in drawn.values()} == {5}


def test_what_lies_beyond_the_window_changes_systems_with_memory_only(
    write: Write, byte_tokenizer: PreTrainedTokenizerFast, tiny_backbone: AlibiGPTForCausalLM
) -> None:
    torch.manual_seed(0)
    model = LongMem.from_backbone(tiny_backbone, chunk_size=4, num_retrieved=8, memory_size=64).eval()
    file = read_chapterbreak(write())
    task = ChapterBreakTask([file], byte_tokenizer, SETTINGS)
    systems = askers(Comparison.of_longmem(model, [64]), byte_tokenizer, window=16)
    result = run_task(task, systems, bootstrap=Bootstrap(resamples=20))
    nats = {
        (group.group, system.name): group.score(system.name, "gold_nats").value
        for group in result.groups
        for system in systems
    }
    assert nats["ao3, 20", "backbone"] == nats["ao3, 60", "backbone"]
    assert nats["ao3, 20", "memory_off"] == nats["ao3, 60", "memory_off"]
    assert nats["ao3, 20", "memory_64"] != nats["ao3, 60", "memory_64"]
    assert {group.units for group in result.groups[1:]} == {2}


def test_wrong_settings_are_listed() -> None:
    with pytest.raises(ConfigError, match=r"prefix \(5,5\) must be different.*suffix tokens \(0\).*limit \(0\)"):
        ChapterBreakSettings((5, 5), 0, 0)


def test_the_command_runs_from_files_to_table_and_json(
    write: Write,
    byte_tokenizer: Any,
    tiny_backbone: AlibiGPTForCausalLM,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    tiny_backbone.save_pretrained(tmp_path / "backbone")
    byte_tokenizer.save_pretrained(tmp_path / "backbone")
    side = LongMem.from_backbone(tmp_path / "backbone", chunk_size=4, num_retrieved=8, memory_size=64)
    side.save_pretrained(tmp_path / "side")
    asked = ["--model", tmp_path / "side", "--data", write(), "--suffix-tokens", 8, "--resamples", 20]

    def run(*more: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            main(["eval", "chapterbreak", *map(str, [*asked, *more])])
        captured = capsys.readouterr()
        return int(done.value.code or 0), captured.out, captured.err

    status, table, errors = run("--prefix", "20,60", "--out", tmp_path / "out")
    assert status == 0, errors
    assert "pg19, 60" in table
    result = json.loads((tmp_path / "out" / "chapterbreak.json").read_text())
    assert result["header"]["config"]["prefixes"] == [20, 60]
    assert [group["group"] for group in result["groups"]] == ["all", "pg19, 20", "ao3, 20", "pg19, 60", "ao3, 60"]
    status, _, errors = run()
    assert status == 1
    assert "error: --prefix 4096 is longer than the prefixes of the files (64 tokens" in errors
