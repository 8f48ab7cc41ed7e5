"""Readers of conversations over several sessions: LoCoMo (Maharana et al. 2024) and MSC (Xu, Szlam and Weston 2022)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longmem.errors import DataError

CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}
MULTI_HOP, TEMPORAL, OPEN_DOMAIN, ADVERSARIAL = 1, 2, 3, 5
WITH_DATE = " Use DATE of CONVERSATION to answer with an approximate date."  # the words of LoCoMo's own evaluation


@dataclass(frozen=True)
class Question:
    """What is asked after the sessions.

    Attributes:
        id: inside the conversation.
        group: LoCoMo's category, or MSC's session.
        before: text of the session that goes on; empty where all sessions are over.
        text: the question, or the name before a reply.
        answer: the reference; of an adversarial question the wrong answer that it lures to.
        category: of LoCoMo; None for a reply.
    """

    id: str
    group: str
    before: str
    text: str
    answer: str
    category: int | None = None


@dataclass(frozen=True)
class Conversation:
    """Sessions, oldest first, each a text with its date and a line for each turn, and what is asked about them.

    ``of`` names the conversation where other files have other parts of it: MSC's sessions.
    """

    id: str
    sessions: tuple[str, ...]
    questions: tuple[Question, ...]
    of: str | None = None


@dataclass(frozen=True)
class DialogueFile:
    """A file; ``kind`` is ``locomo`` or ``msc``, whose files are all called alike and are named with their folder."""

    name: str
    kind: str
    sha256: str
    conversations: list[Conversation]


def read_dialogues(path: str | Path) -> DialogueFile:
    """Read ``locomo10.json``, or ``session_N/test.txt`` of MSC.

    Raises:
        DataError: no such file, or something in it is not of either form; says what and where.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable ({error}); name a locomo10.json or an MSC session_N/test.txt") from error
    try:
        content = json.loads(text)
    except ValueError:  # more than one JSON object: lines
        content = None
    if content is None or (isinstance(content, dict) and "previous_dialogs" in content):
        # only \n ends a line: people's texts hold other signs that str.splitlines would take for one
        lines = [(f"line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        kind, found = "msc", [_msc(path, where, line) for where, line in lines]
    elif isinstance(content, list | dict):
        samples = content if isinstance(content, list) else [content]
        kind, found = "locomo", [_locomo(path, number, sample) for number, sample in enumerate(samples)]
    else:
        raise DataError(f"{path}: neither a list of LoCoMo samples nor lines of MSC; see the docs of dialogue")
    found = [conversation for conversation in found if conversation.questions]
    if not found:
        raise DataError(f"{path}: no questions in it; name a locomo10.json or an MSC session_N/test.txt")
    name = f"{path.absolute().parent.name}/{path.name}" if kind == "msc" else path.name
    return DialogueFile(name, kind, hashlib.sha256(raw).hexdigest(), found)


def _locomo(path: Path, number: int, sample: Any) -> Conversation:
    name = str(number)
    try:
        name, spoken = str(sample.get("sample_id", number)), sample["conversation"]
        numbers = sorted(
            int(at) for key in spoken if key.startswith("session_") and (at := key.removeprefix("session_")).isdecimal()
        )
        sessions = []
        for at in numbers:
            if turns := [_turn(turn) for turn in spoken[f"session_{at}"]]:
                heading = f"DATE: {spoken.get(f'session_{at}_date_time', 'unknown')}"
                sessions.append("\n".join([heading, "CONVERSATION:", *turns]) + "\n\n")
        return Conversation(name, tuple(sessions), tuple(_question(at, qa) for at, qa in enumerate(sample["qa"])))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: sample {name!r} is not as LoCoMo's are ({type(error).__name__}: {error}); it needs conversation "
            "and qa, turns need speaker and text, questions need question, category (1 to 5) and answer (category 5: "
            "adversarial_answer)"
        ) from error


def _turn(turn: dict[str, Any]) -> str:
    said = f'{turn["speaker"]} said, "{_text(turn)}"'
    # of a picture, what LoCoMo's own evaluation shows of it
    return f"{said} [shares {turn['blip_caption']}]" if turn.get("blip_caption") else said


def _text(turn: dict[str, Any]) -> str:
    text = turn["text"]
    if not isinstance(text, str):
        raise TypeError(f"the text of a turn is a {type(text).__name__}")
    return text


def _question(number: int, qa: dict[str, Any]) -> Question:
    category = int(qa["category"])
    named = "adversarial_answer" if category == ADVERSARIAL and "adversarial_answer" in qa else "answer"
    if qa[named] is None or qa["question"] is None:
        raise TypeError(f"question {number} or its answer is null")
    text = str(qa["question"]) + (WITH_DATE if category == TEMPORAL else "")
    return Question(str(number), CATEGORIES[category], "", text, str(qa[named]).strip(), category)


def _msc(path: Path, where: str, line: str) -> Conversation:
    """Earlier sessions, with the time that passed after each; every turn of the last one is a reply to those before."""
    try:
        record = json.loads(line)
        sessions = []
        for past in record["previous_dialogs"]:
            spoken = "".join(f"{speaker}: {text}\n" for speaker, text in _speakers(past["dialog"]))
            gap = f"({past['time_num']} {past['time_unit']} later)\n" if past.get("time_num") else ""
            sessions.append(f"{spoken}{gap}\n")
        questions, before = [], ""
        for at, (speaker, text) in enumerate(_speakers(record["dialog"])):
            if text:
                questions.append(Question(str(at), f"session {len(sessions) + 1}", before, f"{speaker}:", text))
            before += f"{speaker}: {text}\n"
        of = (record.get("metadata") or {}).get("initial_data_id")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}, {where}: no conversation of MSC ({type(error).__name__}: {error}); a line has dialog and "
            "previous_dialogs, and every turn a text"
        ) from error
    name = f"{of or 'line'}:{where.removeprefix('line ')}"
    return Conversation(name, tuple(sessions), tuple(questions), None if of is None else str(of))


def _speakers(dialog: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Names and texts; speakers alternate where a turn does not say whose it is."""
    for at, turn in enumerate(dialog):
        yield str(turn.get("id") or f"Speaker {at % 2 + 1}"), " ".join(_text(turn).split())
