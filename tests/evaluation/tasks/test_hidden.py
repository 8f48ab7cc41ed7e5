"""Needles and bAbI: what is hidden where, what is in memory as if the whole text were read, and rules for answers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.calling import Command

from longmem import AlibiGPTForCausalLM, LongMem
from longmem.errors import ConfigError, DataError
from longmem.evaluation.asking import Asker
from longmem.evaluation.systems import systems_of
from longmem.evaluation.tasks.hidden import NeedleTask, Story, Trial, answered, read_babi, read_haystack
from longmem.memory import MemoryBank

WINDOW = 16
FILE = (
    "1 Ann went to the attic.\n2 Bob went to the barn.\n3 Where is Ann? \tattic\t1\n4 Ann went to the cave.\n"
    "5 Where is Ann? |cave|4\n1 Bob went to the attic.\n2 Where is Bob? \tattic\t1\n"
)
Begun = Callable[..., NeedleTask]


@pytest.fixture
def model(tiny_backbone: AlibiGPTForCausalLM) -> LongMem:
    torch.manual_seed(1)
    made = LongMem.from_backbone(tiny_backbone, chunk_size=4, num_retrieved=8, memory_size=4096)
    made.sidenet.memory_gate.data.fill_(2.0)
    return made.eval()


@pytest.fixture
def text(made_text: Callable[..., str], tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(made_text(600))
    return str(tmp_path / "text.txt")


@pytest.fixture
def needles(text: str, byte_tokenizer: Any) -> Begun:
    def make(**settings: Any) -> NeedleTask:
        wanted: dict[str, Any] = {
            "kinds": ["passkey"],
            "lengths": [512],
            "depths": [0, 50, 100],
            "trials": 2,
        } | settings
        task = NeedleTask(text=[text], **wanted)
        task.begin([Asker("it", "it", {}, None, tokenizer=byte_tokenizer, window=WINDOW)])
        return task

    return make


def trials(task: NeedleTask) -> list[Trial]:
    return [example.item for example in task.examples()]


def test_trials_are_drawn_by_their_seed_alone(needles: Begun) -> None:
    first, second, other = ([trial.digest for trial in trials(needles(seed=seed))] for seed in (0, 0, 1))
    assert first == second
    assert not set(first) & set(other)
    # a trial does not depend on which others are made beside it
    assert trials(needles(depths=[50], trials=1))[0].digest in first


def test_the_default_text_is_the_source_of_the_standard_library(byte_tokenizer: Any) -> None:
    found = read_haystack([], byte_tokenizer, 5000, WINDOW)
    assert found.ids.shape == (313, WINDOW)
    assert byte_tokenizer.decode(found.ids[0]).startswith("# file: email")


def test_settings_that_break_rules_are_reported_together(needles: Begun, command: Command) -> None:
    with pytest.raises(ConfigError) as error:
        needles(kinds=["riddle"], depths=[120, 0])
    assert "kind ('riddle') must be one of passkey" in str(error.value) and "depth (120)" in str(error.value)
    with pytest.raises(ConfigError, match=r"length \(100\) must be a multiple of the window \(16\); try 96"):
        needles(lengths=[100])
    assert "depth (120)" in command("eval", "needle", "--model", "nowhere", "--depths", "120,0").error
    for wrong in ("nan", "inf", "0", "50,nan"):
        done = command("eval", "needle", "--model", "nowhere", "--depths", wrong)
        assert f"'{wrong}' is not a list of numbers; try 0,50,100 or 11" in done.err
    with pytest.raises(DataError, match="too short to hide"):
        needles(lengths=[64]).examples()


@pytest.mark.parametrize("most", [1024, 128])
def test_what_is_hidden_is_in_memory_as_if_the_whole_text_were_read(
    model: LongMem, needles: Begun, byte_tokenizer: Any, most: int
) -> None:
    task = needles(kinds=["multi"], lengths=[1024], trials=1)
    asker = systems_of(model, [most], tokenizer=byte_tokenizer, window=64)[-1]
    examples = task.examples()
    prompts = [task.prompt(example, asker) for example in examples]
    for number, answer in asker.ask(prompts):
        trial, bank = examples[number].item, MemoryBank.for_model(model, 1, most)
        for segment in torch.tensor([trial.text()]).split(WINDOW, dim=1):  # as a user would
            bank.add(model.encode(segment))
        bank.end_document()
        ids = torch.tensor([[*trial.question, *trial.options[0][:-1]]])
        with torch.no_grad():
            logits = model(ids, memory=bank).logits[0, len(trial.question) - 1 :].log_softmax(-1)
        expected = logits.gather(1, torch.tensor(trial.options[0])[:, None]).sum().item()
        assert answer.scored[0].logprobs[0] == pytest.approx(expected, abs=1e-5)
    # a second time: what was hidden for one trial is gone afterwards
    assert dict(asker.ask(prompts[:2])) == dict(asker.ask(prompts[:2]))


# bAbI


def test_a_story_has_all_facts_before_its_question(tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / f"qa1_single-supporting-fact_{part}.txt").write_text(FILE)
    (task,) = read_babi(str(tmp_path), [1])
    first, second, third = task.test
    assert first == Story(("Ann went to the attic.", "Bob went to the barn."), "Where is Ann?", "attic")
    assert second.facts == (*first.facts, "Ann went to the cave.") and second.answer == "cave"
    assert third.facts == ("Bob went to the attic.",)
    assert task.labels == ["attic", "cave"]
    with pytest.raises(DataError, match=r"qa2_\*_train.txt"):
        read_babi(str(tmp_path), [2])


def test_an_answer_names_the_right_label_alone() -> None:
    asked = ("Where is Ann?", "attic", ("attic", "cave", "Ann"))
    assert answered(" The Attic. Not the cave.", *asked) and answered("Ann is in the attic", *asked)
    assert not answered("the attic or the cave", *asked) and not answered("nowhere", *asked)
