"""The small conversation set: its shape, and that its questions can be answered from it."""

from __future__ import annotations

import json
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from recipes.data.conversations import ConversationSettings, main, make_conversations

from longmem.errors import ConfigError


@pytest.fixture(scope="module")
def samples() -> list[dict[str, Any]]:
    return make_conversations()


def turns(sample: dict[str, Any]) -> dict[str, dict[str, Any]]:
    spoken = sample["conversation"].values()
    return {turn["dia_id"]: turn for session in spoken if isinstance(session, list) for turn in session}


def test_samples_have_the_shape_of_locomo(samples: list[dict[str, Any]]) -> None:
    assert len(samples) == 10
    for sample in samples:
        assert set(sample) == {"sample_id", "conversation", "qa"}
        talk = sample["conversation"]
        for session in range(1, 7):
            assert " on " in talk[f"session_{session}_date_time"]
            speakers = [turn["speaker"] for turn in talk[f"session_{session}"]]
            assert set(speakers) == {talk["speaker_a"], talk["speaker_b"]}
            assert all(one != other for one, other in pairwise(speakers))
        assert {question["category"] for question in sample["qa"]} == {1, 2, 3, 4, 5}


def test_every_answer_was_said_in_its_evidence_and_before_the_last_session(samples: list[dict[str, Any]]) -> None:
    counts: Counter[int] = Counter()
    for sample in samples:
        spoken = turns(sample)
        for question in sample["qa"]:
            counts[question["category"]] += 1
            said = " ".join(spoken[where]["text"] for where in question["evidence"])
            assert all(int(where[1:].split(":")[0]) < 6 for where in question["evidence"])
            if question["category"] in (1, 4):
                assert all(part in said for part in question["answer"].split(", "))
            if question["category"] == 5:
                assert question["adversarial_answer"] in said
                assert "answer" not in question
                assert all(spoken[where]["speaker"] not in question["question"] for where in question["evidence"])
    assert counts == {4: 80, 5: 80, 2: 60, 1: 20, 3: 20}


def test_dates_are_those_of_the_session_or_the_day_before(samples: list[dict[str, Any]]) -> None:
    for sample in samples:
        for question in sample["qa"]:
            if question["category"] == 2:
                session = question["evidence"][0][1:].split(":")[0]
                on = sample["conversation"][f"session_{session}_date_time"].split(" on ")[1]
                assert (question["answer"] == on) == ("come back" in question["question"])


def test_two_journeys_are_told_in_different_sessions(samples: list[dict[str, Any]]) -> None:
    for sample in samples:
        for question in sample["qa"]:
            if question["category"] == 1:
                assert len({where.split(":")[0] for where in question["evidence"]}) == 2


def test_equal_seeds_make_equal_sets(samples: list[dict[str, Any]]) -> None:
    assert make_conversations(ConversationSettings(seed=0)) == samples
    assert make_conversations(ConversationSettings(seed=1)) != samples


def test_wrong_settings_are_listed() -> None:
    with pytest.raises(ConfigError, match=r"sessions \(1\) must be at least 2; facts \(7\) must be at most 6"):
        ConversationSettings(sessions=1, facts=7)


def test_the_script_writes_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "talk.json"
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(out), "--seed", "3", "--conversations", "2"])
    main()
    assert "2 conversations, 52 questions" in capsys.readouterr().out
    assert json.loads(out.read_text()) == make_conversations(ConversationSettings(conversations=2, seed=3))
