"""Dialogue: files of LoCoMo and MSC as they are read, scores worked by hand, and what is in memory and window."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longmem.evaluation.asking import Answer, Asker, Scored
from longmem.evaluation.tasks.dialogue import NOTHING, DialogueTask, read_dialogues, word_scores

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
    "personas": [["a"], ["b"]],
    "init_personas": [["a"], ["b"]],
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
def msc(tmp_path: Path) -> Path:
    (tmp_path / "test.txt").write_text(json.dumps(MSC) + "\n" + json.dumps(MSC | {"metadata": {}}) + "\n")
    return tmp_path / "test.txt"


def test_locomo_is_read_with_dates_speakers_and_pictures(locomo: Path) -> None:
    file = read_dialogues(locomo)
    assert (file.name, file.kind, len(file.conversations)) == ("locomo10.json", "locomo", 1)
    (conversation,) = file.conversations
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


def test_msc_is_read_with_earlier_sessions_and_every_turn_as_a_reply(msc: Path) -> None:
    file = read_dialogues(msc)
    assert (file.kind, [conversation.id for conversation in file.conversations]) == ("msc", ["valid_3:1", "line:2"])
    conversation = file.conversations[0]
    assert conversation.sessions == (
        "Speaker 1: Hi.\nSpeaker 2: Hello you.\n(5 days later)\n\n",
        "Speaker 1: Again.\n\n",
    )
    assert [(q.group, q.before, q.text, q.answer) for q in conversation.questions] == [
        ("session 3", "", "Speaker 1:", "How is the dog?"),
        ("session 3", "Speaker 1: How is the dog?\n", "Speaker 2:", "Fine."),
    ]


def test_only_a_line_end_parts_conversations_of_msc(tmp_path: Path) -> None:
    spoken = [{"text": "one\u2028two\x85three"}]
    line = json.dumps(MSC | {"dialog": spoken}, ensure_ascii=False)
    (tmp_path / "test.txt").write_text(f"{line}\r\n{line}\n", encoding="utf-8-sig", newline="")
    file = read_dialogues(tmp_path / "test.txt")
    assert [conversation.questions[0].answer for conversation in file.conversations] == ["one two three"] * 2


def f1(said: str, answer: str, category: int | None) -> float:
    return word_scores(said, answer, category, None)["f1"]


def test_f1_of_words_worked_by_hand() -> None:
    pytest.importorskip("sacrebleu")
    # said: came back in june (4 words), answer: in june 2023 (3); 2 shared: P 1/2, R 2/3, F1 4/7
    assert f1("Came back in June!", "in June, 2023", 2) == pytest.approx(100 * 4 / 7)
    assert f1("the dog", "A dog.", 4) == 100
    assert f1("", "a dog", 4) == 0
    # of several answers: oslo is there (1), of "new york" half of the words (P 1, R 1/2: 2/3)
    assert f1("York, Oslo", "Oslo, New York", 1) == pytest.approx(100 * (1 + 2 / 3) / 2)
    # an open-domain answer ends before its reason
    assert f1("No", "No; she cannot eat nuts", 3) == 100
    assert f1("No", "No; she cannot eat nuts", 4) == pytest.approx(100 * 2 / 6)


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        *(("a", True), ("(a)", True), ("(A)", True), ("b", False), ("(b)", False), ("x", False)),  # other letters are b
        *(("There is No Information Available.", True), ("it is not mentioned", True), ("The dog is Ada's", False)),
    ],
)
def test_adversarial_questions_follow_locomos_rules(said: str, refused: bool) -> None:
    pytest.importorskip("sacrebleu")
    assert word_scores(said, "a dog", 5, {"a": NOTHING, "b": "a dog"})["f1"] == 100 * refused


# what is asked


def test_sessions_are_in_memory_and_their_newest_tokens_in_the_window(locomo: Path, byte_tokenizer: Any) -> None:
    asker = Asker("it", "it", {}, None, byte_tokenizer, 64)
    task = DialogueTask([read_dialogues(locomo)], byte_tokenizer, recent=20, answer_tokens=4)
    example = task.examples()[0]
    whole = "".join(example.item.conversation.sessions)
    prompt = task.prompt(example, asker)
    assert byte_tokenizer.decode(prompt.memory) == whole[:-20]
    assert byte_tokenizer.decode(prompt.contexts[0]) == f"{whole[-20:]}Question: What did Ada get? Short answer:"
    assert [byte_tokenizer.decode(option) for option in prompt.options] == [" a d"]
    assert prompt.new_tokens == 50
    everything = DialogueTask([read_dialogues(locomo)], byte_tokenizer, recent=10_000)
    assert everything.prompt(everything.examples()[0], asker).memory == ()
    assert DialogueTask.sizes(64) == {"recent": 32, "new_tokens": 16, "answer_tokens": 16}
    assert DialogueTask.sizes(1024) == {"recent": 512, "new_tokens": 50, "answer_tokens": 128}


def test_an_answer_ends_at_its_line(locomo: Path, byte_tokenizer: Any) -> None:
    pytest.importorskip("sacrebleu")
    task = DialogueTask([read_dialogues(locomo)], byte_tokenizer)
    example, asker = task.examples()[0], Asker("it", "it", {}, None, byte_tokenizer, 64)
    said = tuple(byte_tokenizer("\n a dog \nQuestion: what")["input_ids"])
    scored = Scored((-12.0,), (False,), 0)
    found = task.measure(example, task.prompt(example, asker), Answer((scored,), said))
    assert found["f1"] == 100 and found["answer_nats"] == 12.0 / len(" a dog")
