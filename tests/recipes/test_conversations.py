"""The small conversation set: its shape, and that its questions can be answered from it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from recipes.data.conversations import main, make_conversations

from longmem.evaluation.tasks.conversations import read_dialogues


@pytest.fixture(scope="module")
def samples() -> list[dict[str, Any]]:
    return make_conversations()


def test_every_answer_was_said_in_its_evidence_and_before_the_last_session(samples: list[dict[str, Any]]) -> None:
    counts: Counter[int] = Counter()
    for sample in samples:
        talk = sample["conversation"]
        spoken = {turn["dia_id"]: turn for part in talk.values() if isinstance(part, list) for turn in part}
        for question in sample["qa"]:
            category, evidence = question["category"], question["evidence"]
            counts[category] += 1
            said = " ".join(spoken[where]["text"] for where in evidence)
            sessions = [int(where[1:].split(":")[0]) for where in evidence]
            assert max(sessions) < 6
            if category in (1, 4):
                assert all(part in said for part in question["answer"].split(", "))
            if category == 1:  # two journeys
                assert len(set(sessions)) == 2
            if category == 2:  # the day of the session, or the day before
                on = talk[f"session_{sessions[0]}_date_time"].split(" on ")[1]
                assert (question["answer"] == on) == ("come back" in question["question"])
            if category == 5:
                assert question["adversarial_answer"] in said and "answer" not in question
                assert all(spoken[where]["speaker"] not in question["question"] for where in evidence)
    assert counts == {4: 80, 5: 80, 2: 60, 1: 20, 3: 20}


def test_the_script_writes_the_set_of_its_seed(
    samples: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_conversations(seed=0) == samples != make_conversations(seed=1)
    out = tmp_path / "made" / "talk.json"
    main(["--out", str(out), "--seed", "3", "--conversations", "2"], standalone_mode=False)
    assert "2 conversations, 52 questions" in capsys.readouterr().out
    assert json.loads(out.read_text()) == make_conversations(conversations=2, seed=3)
    assert [len(made.sessions) for made in read_dialogues(out).items] == [6, 6]
