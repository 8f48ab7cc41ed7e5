"""Dialogue and told facts: files as they are read, scores worked by hand, and what is in memory and window."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longmem.data.facts import ToldFact
from longmem.errors import ConfigError
from longmem.evaluation.asking import Answer, Asker, Scored
from longmem.evaluation.tasks.conversations import (
    NOTHING,
    DialogueTask,
    FactsTask,
    Question,
    bleu,
    names,
    read_dialogues,
    word_scores,
)

SAMPLE = {
    "sample_id": "conv-1",
    "conversation": {
        "speaker_a": "Ada",
        "speaker_b": "Bo",
        "session_1_date_time": "7:55 pm on 9 June, 2023",
        "session_1": [
            {"speaker": "Ada", "dia_id": "D1:1", "text": "I got a dog."},
            {"speaker": "Bo", "dia_id": "D1:2", "text": "Look!", "blip_caption": "a photo of a cat", "img_url": ["x"]},
        ],
        "session_2_date_time": "1:10 am on 1 July, 2023",
        "session_2": [],
        "session_10_date_time": "2:00 pm on 2 July, 2023",
        "session_10": [{"speaker": "Bo", "dia_id": "D10:1", "text": "Bye."}],
    },
    "qa": [
        {"question": "What did Ada get?", "answer": "a dog", "evidence": ["D1:1"], "category": 4},
        {"question": "When?", "answer": 2023, "evidence": [], "category": 2},
        {"question": "What did Bo get?", "adversarial_answer": "a dog", "evidence": ["D1:1"], "category": 5},
    ],
}
MSC = {
    "previous_dialogs": [
        {"dialog": [{"text": "Hi."}, {"text": "Hello  you."}], "personas": [], "time_num": 5, "time_unit": "days"},
        {"dialog": [{"text": "Again."}], "personas": []},
    ],
    "dialog": [{"id": "Speaker 1", "text": "How is the dog?"}, {"id": "Speaker 2", "text": "Fine."}],
    "metadata": {"initial_data_id": "valid_3"},
}


@pytest.fixture
def locomo(tmp_path: Path) -> Path:
    (tmp_path / "locomo10.json").write_text(json.dumps([SAMPLE]))
    return tmp_path / "locomo10.json"


@pytest.fixture
def asker(byte_tokenizer: Any) -> Asker:
    return Asker("backbone", "it", {}, None, tokenizer=byte_tokenizer, window=64)


def test_locomo_is_read_with_dates_speakers_and_pictures(locomo: Path) -> None:
    file = read_dialogues(locomo)
    assert (file.name, len(file.items)) == ("locomo10.json", 1)
    (conversation,) = file.items
    assert conversation.sessions == (
        """DATE: 7:55 pm on 9 June, 2023
CONVERSATION:
Ada said, "I got a dog."
Bo said, "Look!" [shares a photo of a cat]

""",
        'DATE: 2:00 pm on 2 July, 2023\nCONVERSATION:\nBo said, "Bye."\n\n',
    )
    assert [(q.group, q.answer) for q in conversation.questions] == [
        ("single-hop", "a dog"),
        ("temporal", "2023"),
        ("adversarial", "a dog"),
    ]
    assert conversation.questions[1].text == "When? Use DATE of CONVERSATION to answer with an approximate date."


def test_msc_is_read_with_earlier_sessions_and_every_turn_as_a_reply(tmp_path: Path, asker: Asker) -> None:
    path = tmp_path / "test.txt"
    path.write_text(json.dumps(MSC) + "\n" + json.dumps(MSC | {"metadata": {}}) + "\n")
    file = read_dialogues(path)
    assert [conversation.id for conversation in file.items] == ["valid_3:1", "line:2"]
    conversation = file.items[0]
    assert conversation.sessions == (
        "Speaker 1: Hi.\nSpeaker 2: Hello you.\n(5 days later)\n\n",
        "Speaker 1: Again.\n\n",
    )
    assert [(q.group, q.before, q.text, q.answer) for q in conversation.questions] == [
        ("session 3", "", "Speaker 1:", "How is the dog?"),
        ("session 3", "Speaker 1: How is the dog?\n", "Speaker 2:", "Fine."),
    ]
    # a conversation whose sessions are in several files is drawn as one
    task = DialogueTask(data=[path, path], with_bleu=False)
    task.begin([asker])
    own = f"{tmp_path.name}/test.txt/line:2"
    assert [example.unit for example in task.examples()] == ["valid_3", "valid_3", own, own] * 2
    # only a line end parts conversations
    line = json.dumps(MSC | {"dialog": [{"text": "one\u2028two\x85three"}]}, ensure_ascii=False)
    path.write_text(f"{line}\r\n{line}\n", encoding="utf-8-sig", newline="")
    assert [found.questions[0].answer for found in read_dialogues(path).items] == ["one two three"] * 2


@pytest.mark.parametrize(
    ("said", "answer", "category", "f1"),
    [
        # said: came back in june (4 words), answer: in june 2023 (3); 2 shared: P 1/2, R 2/3
        ("Came back in June!", "in June, 2023", 2, 4 / 7),
        ("the dog", "A dog.", 4, 1),
        ("", "a dog", 4, 0),
        # of several answers: oslo is there (1), of "new york" half of the words (P 1, R 1/2: 2/3)
        ("York, Oslo", "Oslo, New York", 1, (1 + 2 / 3) / 2),
        # an open-domain answer ends before its reason
        ("No", "No; she cannot eat nuts", 3, 1),
        ("No", "No; she cannot eat nuts", 4, 2 / 6),
        # adversarial questions follow LoCoMo's rules: other letters are b
        *((said, "a dog", 5, 1) for said in ("a", "(a)", "(A)", "There is No Information Available.")),
        *((said, "a dog", 5, 0) for said in ("b", "(b)", "x", "The dog is Ada's")),
        ("it is not mentioned", "a dog", 5, 1),
    ],
)
def test_f1_of_words_worked_by_hand(said: str, answer: str, category: int, f1: float) -> None:
    offered = {"a": NOTHING, "b": answer} if category == 5 else None
    question = Question("0", "", "", "?", answer, category, offered)
    assert word_scores(said, question, with_bleu=False)["f1"] == pytest.approx(100 * f1)


def test_bleu_is_worked_by_hand_and_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # of the orders 1 to 4: 6/7, 5/6, 4/5, 3/4, whose product is 3/7; two words have no more than two orders
    assert bleu("a cat sat on the mat today", "a cat sat on the mat") == pytest.approx(100 * (3 / 7) ** 0.25)
    assert bleu("a dog", "a dog") == 100 and bleu("", "a dog") == 0
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ConfigError, match="longmem-lm\\[eval\\]"):
        DialogueTask(data=[])


def test_sessions_are_in_memory_and_their_newest_tokens_in_the_window(locomo: Path, asker: Asker) -> None:
    task, decode = DialogueTask(data=[locomo], recent=20, with_bleu=False), asker.tokenizer.decode
    task.begin([asker])
    example = task.examples()[0]
    whole = "".join(example.item[0].sessions)
    prompt = task.prompt(example, asker)
    assert decode(prompt.memory) == whole[:-20]
    assert decode(prompt.contexts[0]) == f"{whole[-20:]}Question: What did Ada get? Short answer:"
    found = decode(task.prompt(example, replace(asker, recall=1)).contexts[0])
    assert found.endswith(decode(prompt.contexts[0])) and 'Ada said, "I got a dog."' in found  # a passage in front
    assert [decode(option) for option in prompt.options] == [" a dog"]
    assert prompt.new_tokens == 16  # a quarter of the window
    # an answer ends at its line
    said = tuple(asker.tokenizer("\n a dog \nQuestion: what")["input_ids"])
    found = task.measure(example, prompt, Answer((Scored((-12.0,), (False,), 0),), said))
    assert found == {"f1": 100, "answer_nats": 12.0 / len(" a dog")}
    everything = DialogueTask(data=[locomo], recent=10_000, with_bleu=False)
    everything.begin([asker])
    assert everything.prompt(everything.examples()[0], asker).memory == ()


# facts


@pytest.fixture
def facts(made_text: Callable[..., str], tmp_path: Path) -> FactsTask:
    (tmp_path / "text.txt").write_text(made_text(300))
    return FactsTask(text=[str(tmp_path / "text.txt")], between=[64, 256], sessions=2, facts=2, recall=2, new_tokens=4)


def test_a_value_is_named_by_whole_words_in_any_case() -> None:
    assert names("in ROME.", "Rome") and not names("Romeo", "Rome") and not names("130", "30")


def test_a_changed_fact_is_told_again_later_and_the_newer_value_is_the_answer(facts: FactsTask, asker: Asker) -> None:
    changed = replace(facts, changed=True, between=[64])
    decode, memory = asker.tokenizer.decode, replace(asker, name="memory_4096", memory_size=4096)
    *_, in_window = changed.begin([memory, asker])
    for example in changed.examples():
        number, fact, _ = example.item
        (older,) = (each for each in changed.telling[number][0].facts if each.asked == fact.asked)
        assert older.value != fact.value and older in facts.telling[number][0].facts
        prompt = changed.prompt(example, memory)
        for text in (decode(prompt.memory), decode(changed.prompt(example, in_window).contexts[0])):
            assert 0 <= text.index(older.said) < text.index(fact.said)
        said = {value: changed.tokenizer(f"It is {value}.")["input_ids"] for value in (older.value, fact.value)}
        scored = Scored((-1.0,), (False,), 0)
        for value, wanted in ((fact.value, (100.0, 0.0)), (older.value, (0.0, 100.0))):
            found = changed.measure(example, prompt, Answer((scored, scored), tuple(said[value])))
            assert (found["named"], found["older"]) == wanted
    assert [metric.name for metric in changed.metrics][-2:] == ["named", "older"]
    with pytest.raises(ConfigError, match="leave one away"):
        replace(facts, changed=True, told="own.jsonl")


def test_facts_of_ones_own_are_told(made_text: Callable[..., str], tmp_path: Path, asker: Asker) -> None:
    text, own = tmp_path / "text.txt", tmp_path / "own.jsonl"
    text.write_text(made_text(300))
    lines = [
        {"said": f"Boat {n} is\u2028the Heron.", "asked": f"Which is boat {n}?", "answer": "It is the {Heron}."}
        for n in range(3)
    ]
    # only a line end parts facts
    own.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8-sig")
    task = FactsTask(text=[str(text)], told=str(own), between=[64], sessions=1, facts=2, recall=2, new_tokens=4)
    task.begin([asker])
    assert [example.item[:2] for example in task.examples()] == [
        (session, ToldFact(line["said"], line["asked"], "It is the ", "Heron", "."))
        for session, line in zip((0, 0, 1), lines, strict=True)
    ]
