"""Needle: what is hidden where, memory of cached segments, and the numbers of hand-made answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import PreTrainedTokenizerFast

from longmem import AlibiGPTForCausalLM, LongMem
from longmem.cli.tasks.needle import needle as command
from longmem.errors import ConfigError, DataError
from longmem.evaluation.asking import Choice, Scored, askers
from longmem.evaluation.runner import run_task
from longmem.evaluation.systems import Comparison
from longmem.evaluation.tasks.needle import Needle, values
from longmem.evaluation.tasks.needle_plot import cells, heat_map
from longmem.evaluation.tasks.needle_text import Haystack, Trial, make_trials, read_haystack
from longmem.memory import MemoryBank
from longmem.memory.encoded import EncodedText

WINDOW = 16


@pytest.fixture
def model(tiny_backbone: AlibiGPTForCausalLM) -> LongMem:
    torch.manual_seed(1)
    made = LongMem.from_backbone(tiny_backbone, chunk_size=4, num_retrieved=8, memory_size=4096)
    made.sidenet.memory_gate.data.fill_(2.0)
    return made.eval()


@pytest.fixture
def haystack(byte_tokenizer: PreTrainedTokenizerFast, made_text: Callable[..., str], tmp_path: Path) -> Haystack:
    path = tmp_path / "text.txt"
    path.write_text(made_text(600))
    return read_haystack([str(path)], byte_tokenizer, 2048, WINDOW)


def _task(haystack: Haystack, tokenizer: Any, **settings: Any) -> Needle:
    wanted: dict[str, Any] = {"kinds": ["passkey"], "lengths": [512], "depths": [0, 50, 100], "trials": 2} | settings
    return Needle(haystack, tokenizer, **wanted)


def _trials(haystack: Haystack, tokenizer: Any, **settings: Any) -> list[Trial]:
    return _task(haystack, tokenizer, **settings).examples()


def _plain_bank(model: LongMem, ids: list[int], capacity: int) -> MemoryBank:
    """The text read as a user would: segment by segment."""
    bank = MemoryBank.for_model(model, 1, capacity)
    for start in range(0, len(ids), WINDOW):
        bank.add(model.encode(torch.tensor([ids[start : start + WINDOW]])))
    bank.end_document()
    return bank


# what is hidden


@pytest.mark.parametrize("kind", ["passkey", "pair", "multi", "twohop"])
def test_what_is_hidden_stands_in_the_text_and_nothing_else_changes(
    haystack: Haystack, byte_tokenizer: PreTrainedTokenizerFast, kind: str
) -> None:
    for trial in _trials(haystack, byte_tokenizer, kinds=[kind], lengths=[2048]):
        text = np.array(trial.text(haystack))
        before = haystack.ids[trial.first : trial.first + 128].flatten()
        for position, tokens in trial.hidden:
            assert text[position : position + len(tokens)].tolist() == list(tokens)
            before[position : position + len(tokens)] = tokens
        assert text.tolist() == before.tolist()
        assert trial.text(haystack, 100) == text[-100:].tolist()


def test_the_answer_is_in_the_text_and_the_other_options_of_a_pass_key_are_not(
    haystack: Haystack, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    for trial in _trials(haystack, byte_tokenizer):
        text = byte_tokenizer.decode(trial.text(haystack))
        right, *wrong = (byte_tokenizer.decode(option) for option in trial.options)
        assert f"The pass key is{right}." in text
        assert len({right, *wrong}) == 4
        assert not any(option.strip() in text for option in wrong)


def test_the_fact_is_within_half_a_segment_of_its_depth(
    haystack: Haystack, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    for trial in _trials(haystack, byte_tokenizer, depths=[0, 30, 100], trials=20, lengths=[1024]):
        position, tokens = trial.hidden[0]
        assert abs(position - trial.depth / 100 * (1024 - len(tokens))) <= WINDOW / 2 + 1
        assert 0 <= position <= 1024 - len(tokens)


def test_two_hops_are_hidden_apart_among_others_and_answered_in_two_steps(
    haystack: Haystack, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    (trial, *_) = _trials(haystack, byte_tokenizer, kinds=["twohop"], lengths=[2048], depths=[10])
    sentences = [byte_tokenizer.decode(tokens) for _, tokens in trial.hidden]
    answer = byte_tokenizer.decode(trial.options[0])
    who, code = answer.split(".")[0].strip(), answer.split()[-1]
    thing = byte_tokenizer.decode(trial.question).removeprefix("\nThe keeper of the ").removesuffix(" is")
    assert f"\nThe keeper of the {thing} is {who}. " in sentences[0]
    assert f"The code of {who} is {code}." in sentences[1]
    assert len(sentences) == 8
    places = sorted((position, position + len(tokens)) for position, tokens in trial.hidden)
    assert all(end <= start for (_, end), (start, _) in pairwise(places))


def test_trials_are_drawn_by_their_seed_alone(haystack: Haystack, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    first, second, other = (_trials(haystack, byte_tokenizer, seed=seed) for seed in (0, 0, 1))
    assert first == second
    assert not {trial.digest for trial in first} & {trial.digest for trial in other}
    # a trial does not depend on which others are made beside it
    alone = make_trials(haystack, byte_tokenizer, kinds=["passkey"], lengths=[512], depths=[50], trials=1, seed=0)
    assert alone[0] in first


def test_the_default_text_is_the_source_of_the_standard_library(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    found = read_haystack([], byte_tokenizer, 5000, WINDOW)
    assert found.ids.shape == (313, WINDOW)
    assert byte_tokenizer.decode(found.ids[0]).startswith("# file: email")


def test_too_little_text_is_refused(byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(DataError, match="11 tokens of text, the longest of --lengths needs 1,024"):
        read_haystack([str(tmp_path / "short.txt")], byte_tokenizer, 1024, WINDOW)


def test_settings_that_break_rules_are_reported_together(
    haystack: Haystack, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ConfigError) as error:
        _task(haystack, byte_tokenizer, kinds=["riddle"], lengths=[100], depths=[120], trials=0)
    for rule in ("kind ('riddle') must be one of passkey", "length (100) must be a multiple", "depth (120)", "trials"):
        assert rule in str(error.value)
    with pytest.raises(ConfigError) as error:
        _task(haystack, byte_tokenizer, kinds=[], lengths=[512, 512], depths=[50.0, 0.0, 50.0])
    for rule in ("kinds (none) must be one or more", "lengths (512, 512) must", "depths (50.0, 0.0, 50.0) must"):
        assert rule in str(error.value)  # a trial that comes twice would count twice
    with pytest.raises(DataError, match="too short to hide"):
        _trials(haystack, byte_tokenizer, lengths=[64])


# memory of cached segments


def _same(one: Any, two: Any, *names: str) -> None:
    for name in names:
        assert torch.equal(getattr(one, name), getattr(two, name)), name


@pytest.mark.parametrize("most", [None, 128])
def test_cached_segments_are_bit_for_bit_the_memory_of_the_text_read_as_a_whole(
    model: LongMem, haystack: Haystack, byte_tokenizer: PreTrainedTokenizerFast, most: int | None
) -> None:
    text = EncodedText(model, torch.from_numpy(haystack.ids))
    torch.manual_seed(3)
    queries = torch.randn(2, model.num_heads, 5, model.memory_head_dim)
    for trial in _trials(haystack, byte_tokenizer, kinds=["passkey", "multi"], lengths=[1024]):
        plain = _plain_bank(model, trial.text(haystack), most or trial.length)
        with text.holding(trial.first, trial.length // WINDOW, trial.changed(haystack), most) as memory:
            mine = memory.search(queries, 3)
            theirs = plain.search(queries, 3, torch.tensor([0, 0]))
            _same(mine, theirs, "scores", "keys", "values", "mask")
            ids = torch.tensor([trial.question])
            assert torch.equal(model(ids, memory=memory).logits, model(ids, memory=plain).logits)


def test_what_a_question_hid_is_gone_afterwards(
    model: LongMem, haystack: Haystack, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    text = EncodedText(model, torch.from_numpy(haystack.ids))
    before = (text.storage.clone(), text.keys.clone())
    trial = _trials(haystack, byte_tokenizer)[1]

    def ask() -> None:
        with text.holding(trial.first, 32, trial.changed(haystack)):
            assert not torch.equal(text.storage, before[0])
            raise KeyError

    with pytest.raises(KeyError):
        ask()
    assert torch.equal(text.storage, before[0])
    assert torch.equal(text.keys, before[1])


def test_what_a_text_left_in_memory_is_kept_for_other_runs_of_the_same_backbone(
    model: LongMem, haystack: Haystack, byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    task = _task(haystack, byte_tokenizer, cache=tmp_path / "cache")
    asker = next(a for a in askers(Comparison.of_longmem(model, [512]), byte_tokenizer, window=32) if a.reads_memory)
    first = dict(task.answer(asker, task.examples()))
    (file,) = (tmp_path / "cache").iterdir()
    told: list[int] = []
    again = _task(haystack, byte_tokenizer, cache=tmp_path / "cache", encoding=lambda done, total: told.append(done))
    assert dict(again.answer(asker, again.examples())) == first
    assert told == []
    # a damaged file is not read, and made again
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    mended = _task(haystack, byte_tokenizer, cache=tmp_path / "cache")
    assert dict(mended.answer(asker, mended.examples())) == first
    assert file.read_bytes() == whole
    # other text is another file
    other = Haystack(haystack.ids[1:], haystack.source)
    third = _task(other, byte_tokenizer, cache=tmp_path / "cache")
    dict(third.answer(asker, third.examples()))
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert file.exists()


def test_chunks_that_would_straddle_segments_are_refused(model: LongMem) -> None:
    with pytest.raises(ConfigError, match="window \\(18\\) must be a multiple of chunk_size \\(4\\)"):
        EncodedText(model, torch.zeros(2, 18, dtype=torch.long))


# answers


def test_an_answer_is_exact_when_it_is_what_greedy_decoding_writes() -> None:
    right = Scored((-1.0, -2.0, -3.0, -4.0), (True, False, False, False), 7)
    likeliest = Scored((-1.0, -2.0, -3.0, -4.0), (False, False, False, False), 7)
    wrong = Scored((-2.5, -2.0, -3.0, -4.0), (False, True, False, False), 7)
    assert values(right) == {"exact": 100.0, "choice": 100.0}
    assert values(likeliest) == {"exact": 0.0, "choice": 100.0}
    assert values(wrong) == {"exact": 0.0, "choice": 0.0}


def test_the_task_answers_as_the_same_systems_do_with_a_bank_read_by_themselves(
    model: LongMem, haystack: Haystack, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    task = _task(haystack, byte_tokenizer)
    trials = task.examples()
    for asker in askers(Comparison.of_longmem(model, [256]), byte_tokenizer, window=WINDOW * 4):
        found = dict(task.answer(asker, trials))
        assert sorted(found) == list(range(len(trials)))
        for number, trial in enumerate(trials):
            text = tuple(trial.text(haystack))
            if asker.reads_memory:
                bank = _plain_bank(model, list(text), 256)
                (answer,) = asker.score([Choice(trial.question, trial.options)], bank)
            else:
                (answer,) = asker.score([Choice((*text, *trial.question), trial.options)])
            assert found[number] == values(answer[1])


def test_a_system_without_memory_finds_what_lies_in_its_window(
    haystack: Haystack, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Its context ends with the text and the question."""
    trial = _trials(haystack, byte_tokenizer, depths=[100])[0]
    window = 150
    seen = (trial.text(haystack, window) + list(trial.question))[-window:]
    assert byte_tokenizer.decode(trial.options[0]).strip() in byte_tokenizer.decode(seen)
    far = _trials(haystack, byte_tokenizer, depths=[0])[0]
    assert byte_tokenizer.decode(far.options[0]) not in byte_tokenizer.decode(far.text(haystack, window))


def test_a_result_has_a_cell_for_every_depth_and_length_and_is_drawn(
    model: LongMem, haystack: Haystack, byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    task = _task(haystack, byte_tokenizer, kinds=["passkey", "pair"], lengths=[512, 1024], trials=1)
    records = tmp_path / "records.jsonl"
    result = run_task(
        task, askers(Comparison.of_longmem(model, [1024]), byte_tokenizer, window=WINDOW * 4), records=records
    )
    found = cells(result, "choice")
    assert len(found) == 2 * 2 * 3 * 3
    assert {cell.length for cell in found} == {512, 1024}
    figure = heat_map(result, "choice")
    assert len(figure.axes) == 2 * 3 + 1
    again = run_task(
        task, askers(Comparison.of_longmem(model, [1024]), byte_tokenizer, window=WINDOW * 4), records=records
    )
    assert again.examples == result.examples
    assert again.header.config["text_digest"] == haystack.digest


def test_the_command_writes_result_and_heat_maps(
    model: LongMem, tiny_backbone: AlibiGPTForCausalLM, byte_tokenizer: PreTrainedTokenizerFast,
    made_text: Callable[..., str], tmp_path: Path,
) -> None:  # fmt: skip
    tiny_backbone.save_pretrained(tmp_path / "backbone")
    saved = LongMem.from_backbone(str(tmp_path / "backbone"), chunk_size=4, num_retrieved=8, memory_size=64)
    saved.save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(str(tmp_path / "model"))
    (tmp_path / "text.txt").write_text(made_text(600))
    common = ["--data", str(tmp_path / "text.txt"), "--lengths", "512,1k", "--depths", "2", "--trials", "1"]
    out = tmp_path / "out"
    ran = CliRunner().invoke(command, ["--model", str(tmp_path / "model"), *common, "--out", str(out)])
    assert ran.exit_code == 0, ran.output
    result = json.loads((out / "needle.json").read_text())
    # memory for the longest text unless sizes are named
    assert list(result["systems"]) == ["backbone", "memory_off", "memory_1024"]
    assert len(result["examples"]) == 4
    assert (out / "needle-exact.png").stat().st_size > 0
    assert (out / "needle-choice.png").stat().st_size > 0
    alone = CliRunner().invoke(
        command, ["--model", str(tmp_path / "backbone"), "--tokenizer", str(tmp_path / "model"), *common, "--json"]
    )
    assert alone.exit_code == 0, alone.output
    few = CliRunner().invoke(
        command, ["--model", str(tmp_path / "model"), *common, "--systems", "memory_10", "--out", str(tmp_path / "few")]
    )
    assert few.exit_code == 0, few.output
    assert list(json.loads((tmp_path / "few" / "needle.json").read_text())["systems"]) == ["memory_1024"]
    wrong = CliRunner().invoke(command, ["--model", str(tmp_path / "model"), "--depths", "here"])
    assert "'here' is not a list of depths" in wrong.output
    for count in ("nan", "inf", "0", "2.5"):
        wrong = CliRunner().invoke(command, ["--model", str(tmp_path / "model"), "--depths", count])
        assert wrong.exit_code == 2
        assert "one number says how many depths there are" in wrong.output
    none = CliRunner().invoke(command, ["--model", str(tmp_path / "model"), "--lengths", ""])
    assert "--lengths (none) must name at least one length" in str(none.exception)
