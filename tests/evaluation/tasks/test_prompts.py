"""What is in the window and what in memory when a task asks: sessions, facts, demonstrations, hidden sentences."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.calling import Command
from tests.evaluation.pairs import by_hand, remembered

from longmem import LongMem
from longmem.errors import ConfigError, DataError
from longmem.evaluation.asking import Answer, Asker, Scored
from longmem.evaluation.systems import systems_of
from longmem.evaluation.tasks.comprehension import SquadTask
from longmem.evaluation.tasks.conversations import DialogueTask, FactsTask
from longmem.evaluation.tasks.hidden import NeedleTask
from longmem.evaluation.tasks.icl import Asked, IclTask, lay_out

HOME = Path(__file__).parents[1] / "home"
SMALL = HOME / "small"
SAID = Scored((-12.0,), (False,), 0)


@pytest.fixture
def asker(byte_tokenizer: Any) -> Asker:
    return Asker("backbone", "it", {}, None, tokenizer=byte_tokenizer, window=64)


@pytest.fixture
def text(made_text: Callable[..., str], tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(made_text(600))
    return str(tmp_path / "text.txt")


# conversations


def test_sessions_are_in_memory_and_their_newest_tokens_in_the_window(asker: Asker) -> None:
    decode, data = asker.tokenizer.decode, [str(SMALL / "locomo10.json")]
    task = DialogueTask(data=data, recent=20, with_bleu=False)
    task.begin([asker])
    example = task.examples()[0]
    whole, prompt = "".join(example.item[0].sessions), task.prompt(example, asker)
    assert decode(prompt.memory) == whole[:-20]
    assert decode(prompt.contexts[0]) == f"{whole[-20:]}Question: What did Ada get? Short answer:"
    found = decode(task.prompt(example, replace(asker, recall=1)).contexts[0])
    assert found.endswith(decode(prompt.contexts[0])) and 'Ada said, "I got a dog."' in found  # a passage in front
    assert [decode(option) for option in prompt.options] == [" a dog"]
    assert prompt.new_tokens == 16  # a quarter of the window
    # an answer ends at its line
    said = tuple(asker.tokenizer("\n a dog \nQuestion: what")["input_ids"])
    assert task.measure(example, prompt, Answer((SAID,), said)) == {"f1": 100, "answer_nats": 12.0 / len(" a dog")}
    everything = DialogueTask(data=data, recent=10_000, with_bleu=False)
    everything.begin([asker])
    assert everything.prompt(everything.examples()[0], asker).memory == ()


def test_a_conversation_whose_sessions_are_in_several_files_is_drawn_as_one(asker: Asker) -> None:
    task = DialogueTask(data=[str(SMALL / "test.txt")] * 2, with_bleu=False)
    task.begin([asker])
    assert [example.unit for example in task.examples()] == ["valid_3", "valid_3", "small/test.txt/line:2"] * 2


def test_a_changed_fact_is_told_again_later_and_the_newer_value_is_the_answer(text: str, asker: Asker) -> None:
    decode, memory = asker.tokenizer.decode, replace(asker, name="memory_4096", memory_size=4096)
    plain = FactsTask(text=[text], between=[64], sessions=2, facts=2, recall=2, new_tokens=4)
    changed = replace(plain, changed=True)
    *_, in_window = changed.begin([memory, asker])
    assert [metric.name for metric in changed.metrics][-2:] == ["named", "older"]
    for example in changed.examples():
        number, fact, _ = example.item
        (older,) = (each for each in changed.telling[number][0].facts if each.asked == fact.asked)
        assert older.value != fact.value and older in plain.telling[number][0].facts
        prompt = changed.prompt(example, memory)
        for read in (decode(prompt.memory), decode(changed.prompt(example, in_window).contexts[0])):
            assert 0 <= read.index(older.said) < read.index(fact.said)
        for value, wanted in ((fact.value, (100.0, 0.0)), (older.value, (0.0, 100.0))):
            said = tuple(asker.tokenizer(f"It is {value}.")["input_ids"])
            found = changed.measure(example, prompt, Answer((SAID, SAID), said))
            assert (found["named"], found["older"]) == wanted
    with pytest.raises(ConfigError, match="leave one away"):
        replace(changed, told="own.jsonl")


# demonstrations

ASKED = Asked(((1, 1, 1), (2, 2), (3, 3)), ((10, 10, 10), (11, 11), (12, 12)), [(7, 8)], new_tokens=2)


@pytest.mark.parametrize(
    ("window", "whole", "asked", "expected"),
    [
        (12, False, ASKED, (((0, 1, 1, 1, 2, 2, 3, 3, 7, 8),), 3, 0, 0)),
        # a token short of the farthest demonstration: all of it is gone
        (11, False, ASKED, (((0, 2, 2, 3, 3, 7, 8),), 2, 0, 0)),
        (8, False, ASKED, (((0, 3, 3, 7, 8),), 1, 0, 0)),
        (6, False, ASKED, (((0, 7, 8),), 0, 0, 0)),
        (16, True, ASKED, (((0, 11, 11, 12, 12, 1, 1, 1, 2, 2, 3, 3, 7, 8),), 3, 2, 0)),  # those of memory in front
        (11, True, ASKED, (((0, 2, 2, 3, 3, 7, 8),), 2, 0, 0)),  # not even all of the window's fit
        # every query fits behind the demonstrations, and loses its beginning where it must
        (
            13,
            False,
            ASKED._replace(queries=[(7, 8), (9,) * 4]),
            (((0, 2, 2, 3, 3, 7, 8), (0, 2, 2, 3, 3, 9, 9, 9, 9)), 2, 0, 0),
        ),
        (5, False, ASKED._replace(queries=[(5, 6, 7, 8)]), (((0, 7, 8),), 0, 0, 2)),
    ],
)
def test_demonstrations_are_kept_whole_from_the_right(
    window: int, whole: bool, asked: Asked, expected: Any, asker: Asker
) -> None:
    assert lay_out(asked, replace(asker, window=window, whole=whole), (0,)) == expected
    with pytest.raises(ConfigError, match=r"window \(3\) has no room for a question beside 2 tokens"):
        lay_out(ASKED, replace(asker, window=3), (0,))


def test_text_search_puts_demonstrations_of_memory_next_to_the_question(
    asker: Asker, tmp_path: Path, command: Command
) -> None:
    shown = ["a red boat", "the red boat of an old man", "green hills", "blue seas and the end"]
    (tmp_path / "mr").mkdir()
    (tmp_path / "mr" / "train.csv").write_text("".join(f"{n % 2},{text}\n" for n, text in enumerate(shown)))
    (tmp_path / "mr" / "test.csv").write_text("0,an old red boat\n")
    given: dict[str, Any] = {"data": str(tmp_path), "datasets": ["mr"], "local_shots": [1], "memory_shots": [0, 3]}
    task = IclTask(**given, draws=1, limit=None, recall=2)
    plain, recalled = task.begin([replace(asker, window=400)])
    nothing, example = task.examples()
    assert task.prompt(nothing, recalled) == task.prompt(nothing, plain)
    local, found = (asker.tokenizer.decode(task.prompt(example, each).contexts[0]) for each in (plain, recalled))
    asked = " Review: an old red boat Sentiment:"
    best = " Review: a red boat Sentiment: negative. Review: the red boat of an old man Sentiment: positive."
    assert local.endswith(asked) and found == local.removesuffix(asked) + best + asked
    task.prompt(example, replace(recalled, window=130))
    (note,) = task.notes({})
    assert note.startswith("mr, 1 + 3, backbone+recall: on average 2 demonstrations fit the window")
    options = ("--data", tmp_path, "--datasets", "mr", "--memory-shots", "3", "--recall", "2")
    assert "nowhere" in command("eval", "icl", "--model", "nowhere", *options).error


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ("train.json", r"train.json: 1 demonstrations .* 200 in memory need 201 different ones, there are 15"),
        ("dev.json", "there are 0"),  # a passage that is asked about is not shown
    ],
)
def test_no_passage_is_shown_twice_and_none_that_is_asked(train: str, said: str, asker: Asker) -> None:
    shots: dict[str, Any] = {"local_shots": 1, "memory_shots": (200,), "draws": 1, "limit": None}
    task = SquadTask(train=str(HOME / train), data=str(HOME / "dev.json"), **shots, max_answer_tokens=6)
    task.begin([replace(asker, window=2000)])
    with pytest.raises(DataError, match=said):
        task.examples()


# hidden sentences


@pytest.fixture
def needles(text: str, asker: Asker) -> Callable[..., NeedleTask]:
    def make(**settings: Any) -> NeedleTask:
        usual = {"kinds": ["passkey"], "lengths": [512], "depths": [0, 50, 100], "trials": 2}
        task = NeedleTask(text=[text], **usual | settings)
        task.begin([replace(asker, window=16)])
        return task

    return make


def test_trials_are_drawn_by_their_seed_alone(needles: Callable[..., NeedleTask]) -> None:
    """A trial does not depend on which others are made beside it."""
    settings = ({"seed": 0}, {"seed": 0}, {"seed": 1}, {"depths": [50], "trials": 1})
    first, second, other, one = ({example.item.digest for example in needles(**each).examples()} for each in settings)
    assert first == second and not first & other and one < first


def test_settings_that_break_rules_are_reported_together(needles: Callable[..., NeedleTask], command: Command) -> None:
    with pytest.raises(ConfigError) as error:
        needles(kinds=["riddle"], depths=[120, 0])
    assert "kind ('riddle') must be one of passkey" in str(error.value) and "depth (120)" in str(error.value)
    with pytest.raises(ConfigError, match=r"length \(100\) must be a multiple of the window \(16\); try 96"):
        needles(lengths=[100])
    with pytest.raises(DataError, match="too short to hide"):
        needles(lengths=[64]).examples()
    for wrong in ("nan", "0", "50,nan"):
        done = command("eval", "needle", "--model", "nowhere", "--depths", wrong)
        assert f"'{wrong}' is not a list of numbers; try 0,50,100 or 11" in done.err


@pytest.mark.parametrize("most", [1024, 128])
def test_what_is_hidden_is_in_memory_as_if_the_whole_text_were_read(
    most: int, needles: Callable[..., NeedleTask], home: Path, asker: Asker
) -> None:
    model, task = LongMem.from_pretrained("side/final").eval(), needles(kinds=["multi"], lengths=[1024], trials=1)
    remembering = systems_of(model, [most], tokenizer=asker.tokenizer, window=64)[-1]
    examples = task.examples()
    prompts = [task.prompt(example, remembering) for example in examples]
    answers = dict(remembering.ask(prompts))
    for number, example in enumerate(examples):
        trial = example.item
        bank = remembered(model, trial.text(), size=most)  # in segments of the haystack, as a user would
        expected = by_hand(model, bank, trial.question, trial.options[0])
        assert answers[number].scored[0].logprobs[0] == pytest.approx(expected, abs=1e-5)
    # a second time: what was hidden for one trial is gone afterwards
    assert dict(remembering.ask(prompts)) == answers
