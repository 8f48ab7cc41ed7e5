"""Needle: what is hidden where, memory of cached segments, and the numbers of hand-made answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longmem import AlibiGPTForCausalLM, LongMem
from longmem.errors import ConfigError, DataError
from longmem.evaluation.asking import Answer, Prompt, Scored, askers
from longmem.evaluation.systems import Comparison
from longmem.evaluation.tasks.needle import Haystack, NeedleTask, Trial, read_haystack
from longmem.memory import MemoryBank

WINDOW = 16


@pytest.fixture
def model(tiny_backbone: AlibiGPTForCausalLM) -> LongMem:
    torch.manual_seed(1)
    made = LongMem.from_backbone(tiny_backbone, chunk_size=4, num_retrieved=8, memory_size=4096)
    made.sidenet.memory_gate.data.fill_(2.0)
    return made.eval()


@pytest.fixture
def haystack(byte_tokenizer: Any, made_text: Callable[..., str], tmp_path: Path) -> Haystack:
    path = tmp_path / "text.txt"
    path.write_text(made_text(600))
    return read_haystack([str(path)], byte_tokenizer, 2048, WINDOW)


def _task(haystack: Haystack, tokenizer: Any, **settings: Any) -> NeedleTask:
    wanted: dict[str, Any] = {"kinds": ["passkey"], "lengths": [512], "depths": [0, 50, 100], "trials": 2} | settings
    return NeedleTask(haystack, tokenizer, **wanted)


def _trials(haystack: Haystack, tokenizer: Any, **settings: Any) -> list[Trial]:
    return [example.item for example in _task(haystack, tokenizer, **settings).examples()]


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
    haystack: Haystack, byte_tokenizer: Any, kind: str
) -> None:
    for trial in _trials(haystack, byte_tokenizer, kinds=[kind], lengths=[2048]):
        text = np.array(trial.text(haystack))
        before = haystack.ids[trial.first : trial.first + 128].flatten()
        for position, tokens in trial.hidden:
            assert text[position : position + len(tokens)].tolist() == list(tokens)
            before[position : position + len(tokens)] = tokens
        assert text.tolist() == before.tolist()
        assert trial.text(haystack, 100) == text[-100:].tolist()


def test_the_fact_is_within_half_a_segment_of_its_depth(haystack: Haystack, byte_tokenizer: Any) -> None:
    for at, trial in enumerate(_trials(haystack, byte_tokenizer, depths=[0, 30, 100], trials=20, lengths=[1024])):
        position, tokens = trial.hidden[0]
        assert abs(position - (0, 30, 100)[at // 20] / 100 * (1024 - len(tokens))) <= WINDOW / 2 + 1
        assert 0 <= position <= 1024 - len(tokens)


def test_trials_are_drawn_by_their_seed_alone(haystack: Haystack, byte_tokenizer: Any) -> None:
    first, second, other = (_trials(haystack, byte_tokenizer, seed=seed) for seed in (0, 0, 1))
    assert first == second
    assert not set(first) & set(other)
    # a trial does not depend on which others are made beside it
    assert _trials(haystack, byte_tokenizer, depths=[50], trials=1)[0] in first


def test_the_default_text_is_the_source_of_the_standard_library(byte_tokenizer: Any) -> None:
    found = read_haystack([], byte_tokenizer, 5000, WINDOW)
    assert found.ids.shape == (313, WINDOW)
    assert byte_tokenizer.decode(found.ids[0]).startswith("# file: email")


def test_settings_that_break_rules_are_reported_together(haystack: Haystack, byte_tokenizer: Any) -> None:
    with pytest.raises(ConfigError) as error:
        _task(haystack, byte_tokenizer, kinds=["riddle"], lengths=[100], depths=[120])
    for rule in ("kind ('riddle') must be one of passkey", "length (100) must be a multiple", "depth (120)"):
        assert rule in str(error.value)
    with pytest.raises(ConfigError) as error:
        _task(haystack, byte_tokenizer, kinds=[], lengths=[512, 512], depths=[50.0, 0.0, 50.0])
    for rule in ("kinds (none) must be one or more", "lengths (512,512) must", "depths (50,0,50) must"):
        assert rule in str(error.value)  # a trial that comes twice would count twice
    with pytest.raises(DataError, match="too short to hide"):
        _trials(haystack, byte_tokenizer, lengths=[64])


# memory of cached segments


@pytest.mark.parametrize("most", [1024, 128])
def test_what_is_hidden_is_in_memory_as_if_the_whole_text_were_read(
    model: LongMem, haystack: Haystack, byte_tokenizer: Any, most: int
) -> None:
    task = _task(haystack, byte_tokenizer, kinds=["passkey", "multi"], lengths=[1024])
    (asker,) = (a for a in askers(Comparison.of_longmem(model, [most]), byte_tokenizer, window=64) if a.reads_memory)
    examples = task.examples()
    prompts = [task.prompt(example, asker) for example in examples]
    for number, answer in asker.ask(prompts):
        trial = examples[number].item
        plain = _plain_bank(model, trial.text(haystack), most)
        ids = torch.tensor([[*trial.question, *trial.options[0][:-1]]])
        with torch.no_grad():
            logits = model(ids, memory=plain).logits[0, len(trial.question) - 1 :].log_softmax(-1)
        expected = logits.gather(1, torch.tensor(trial.options[0])[:, None]).sum().item()
        assert answer.scored[0].logprobs[0] == pytest.approx(expected, abs=1e-5)
    # a second time: what was hidden for one trial is gone afterwards
    assert dict(asker.ask(prompts[:2])) == dict(asker.ask(prompts[:2]))


# answers


def test_an_answer_is_exact_when_it_is_what_greedy_decoding_writes(haystack: Haystack, byte_tokenizer: Any) -> None:
    task = _task(haystack, byte_tokenizer)
    for first, greedy, exact, choice in ((-1.0, True, 100, 100), (-1.0, False, 0, 100), (-2.5, False, 0, 0)):
        answer = Answer((Scored((first, -2.0, -3.0, -4.0), (greedy, False, False, False), 7),))
        assert task.measure(task.examples()[0], Prompt(((1,),)), answer) == {"exact": exact, "choice": choice}
