"""A small set of conversations over several sessions, with questions about the earlier ones, in the shape of LoCoMo.

Usage: python recipes/data/conversations.py --out data/conversations.json [--seed 0]

Made from templates: names, places and dates are drawn, so that an answer cannot be known without reading it. The file
is for ``longmem eval dialogue``.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from longmem.errors import ConfigError, LongMemError
from longmem.files import write_whole

MULTI_HOP, TEMPORAL, OPEN_DOMAIN, SINGLE_HOP, ADVERSARIAL = 1, 2, 3, 4, 5


def _words(text: str) -> list[str]:
    return text.split()


PEOPLE = _words(
    "Ada Bruno Carla Dmitri Elif Farid Greta Hugo Ines Jonas Kemal Lena Marta Nils Olga Pavel Rosa Sven Uwe"
)
ANIMALS = _words("cat dog parrot rabbit tortoise hamster goat canary")
PETS = _words(
    "Biscuit Comet Domino Fig Juniper Maple Nutmeg Olive Pepper Quill Rocket Saffron Tango Velvet Waffle Ziggy"
)
TOWNS = _words("Aarhus Bilbao Cork Dresden Evora Funchal Ghent Izmir Krakow Lecce Nantes Oulu Porto Riga Split Turku")
JOBS = _words("baker nurse plumber gardener librarian translator beekeeper carpenter pilot")
HOBBIES = _words("pottery rowing chess archery knitting fencing painting juggling sailing woodcarving")
FOODS = _words("peanuts shellfish strawberries mushrooms walnuts sesame")
KIN = _words("sister brother cousin aunt")
THINGS = ["a red bicycle", "a piano", "a telescope", "a green tent", "a sewing machine", "a canoe", "a wool coat"]

SMALL_TALK = (
    "How has your week been so far?",
    "It has been raining here since the morning.",
    "I slept badly, the neighbours had a party.",
    "I am still thinking about what you told me last time.",
    "My kitchen is a mess, I tried a new soup.",
    "Work was slow, so I went for a walk.",
    "I watched a film about the sea, it was too long.",
    "The bus was late again, can you believe it?",
    "I should call my parents this evening.",
    "I read half of that book you lent me.",
    "They are building something in front of my window.",
    "I have been drinking far too much coffee.",
    "The garden needs water, everything is dry.",
    "I found my old photos and laughed a lot.",
    "My phone keeps losing its battery.",
    "I want to cook for everybody soon.",
)
REPLIES = (
    "That sounds wonderful, tell me more!",
    "Oh, I did not know that.",
    "Really? I am happy for you.",
    "I see. I hope it goes well.",
    "You never said so before!",
    "That is good to hear.",
)


@dataclass(frozen=True)
class ConversationSettings:
    """How much is made.

    Attributes:
        conversations: samples.
        sessions: of each; facts are told in all but the last.
        turns: of a session, at least: facts and the answers to them come on top.
        facts: told by each speaker, besides two journeys.
        seed: of everything that is drawn.

    Raises:
        ConfigError: lists every setting that breaks a rule.
    """

    conversations: int = 10
    sessions: int = 6
    turns: int = 16
    facts: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"conversations": 1, "sessions": 2, "turns": 2, "facts": 1}
        wrong = [
            f"{name} ({value}) must be at least {least[name]}"
            for name, value in asdict(self).items()
            if value < least.get(name, value)
        ]
        if self.facts > len(KINDS):
            wrong.append(f"facts ({self.facts}) must be at most {len(KINDS)}, the kinds there are; try {len(KINDS)}")
        if wrong:
            raise ConfigError(wrong)


@dataclass
class _Fact:
    """What a speaker says, and questions about it; ``{on}`` in an answer is its day, ``{before}`` the day before."""

    said: str
    questions: list[dict[str, Any]] = field(default_factory=list)


def make_conversations(settings: ConversationSettings | None = None) -> list[dict[str, Any]]:
    """Samples with ``sample_id``, ``conversation`` and ``qa``, as in ``locomo10.json``.

    Questions are of LoCoMo's five categories: two facts of different sessions (1), dates (2), what follows from a fact
    (3), one fact (4), and what was said of the other speaker only (5, with ``adversarial_answer``).
    """
    settings = settings or ConversationSettings()
    return [_sample(number, settings) for number in range(settings.conversations)]


def _sample(number: int, settings: ConversationSettings) -> dict[str, Any]:
    draw = random.Random(f"conversations {settings.seed} {number}")
    speakers = draw.sample(PEOPLE, 2)
    told: list[list[tuple[int, _Fact]]] = [[] for _ in range(settings.sessions)]
    qa: list[dict[str, Any]] = []
    pools = {name: draw.sample(values, len(values)) for name, values in POOLS.items()}
    pools["people"] = [name for name in pools["people"] if name not in speakers]
    for who, speaker in enumerate(speakers):
        for kind in draw.sample(KINDS, settings.facts):
            told[draw.randrange(settings.sessions - 1)].append((who, kind(speaker, speakers[1 - who], pools)))
        journeys = [pools["towns"].pop(), pools["towns"].pop()]
        earlier = range(settings.sessions - 1)
        sessions = sorted(draw.sample(earlier, 2)) if len(earlier) > 1 else [0, 0]
        both = {
            "question": f"Which towns has {speaker} come back from?",
            "answer": ", ".join(journeys),
            "category": MULTI_HOP,
        }
        for session, town in zip(sessions, journeys, strict=True):
            when = {"question": f"When did {speaker} come back from {town}?", "answer": "{on}", "category": TEMPORAL}
            fact = _Fact(f"I came back from {town} this morning, the journey was long.", [when, both])
            told[session].append((who, fact))
    conversation: dict[str, Any] = {"speaker_a": speakers[0], "speaker_b": speakers[1]}
    day = date(2023, 1, 1) + timedelta(days=draw.randrange(200))
    for session, facts in enumerate(told, 1):
        hour, minute = draw.randrange(1, 12), draw.randrange(60)
        conversation[f"session_{session}_date_time"] = (
            f"{hour}:{minute:02d} {draw.choice(['am', 'pm'])} on {_said(day)}"
        )
        conversation[f"session_{session}"] = _turns(session, day, speakers, facts, settings.turns, draw, qa)
        day += timedelta(days=draw.randrange(2, 30))
    return {"sample_id": f"made-{settings.seed}-{number}", "conversation": conversation, "qa": qa}


def _turns(
    session: int,
    day: date,
    speakers: list[str],
    facts: list[tuple[int, _Fact]],
    turns: int,
    draw: random.Random,
    qa: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """The session's turns, speakers in alternation; questions about its facts are added to ``qa``."""
    spoken: list[dict[str, Any]] = []

    def say(text: str) -> str:
        name = f"D{session}:{len(spoken) + 1}"
        spoken.append({"speaker": speakers[len(spoken) % 2], "dia_id": name, "text": text})
        return name

    draw.shuffle(facts)
    at = sorted(draw.randrange(turns) for _ in facts)
    for turn in range(turns):
        while at and at[0] <= turn:
            at.pop(0)
            who, fact = facts.pop()
            if len(spoken) % 2 != who:
                say(draw.choice(SMALL_TALK))
            where = say(fact.said)
            say(draw.choice(REPLIES))
            for question in fact.questions:
                if "evidence" not in question:
                    if "answer" in question:
                        question["answer"] = question["answer"].format(
                            on=_said(day), before=_said(day - timedelta(days=1))
                        )
                    question["evidence"] = []
                    qa.append(question)
                question["evidence"].append(where)
        say(draw.choice(SMALL_TALK))
    return spoken


def _said(day: date) -> str:
    return f"{day.day} {day:%B}, {day.year}"


# kinds of facts: what a speaker says of herself; what is asked of the other speaker has no answer

Pools = dict[str, list[str]]


def _questions(question: str, answer: str, speaker: str, other: str) -> Iterator[dict[str, Any]]:
    yield {"question": question.format(speaker), "answer": answer, "category": SINGLE_HOP}
    yield {"question": question.format(other), "adversarial_answer": answer, "category": ADVERSARIAL}


def _pet(speaker: str, other: str, pools: Pools) -> _Fact:
    animal, name = pools["animals"].pop(), pools["pets"].pop()
    question = f"What is the name of {{}}'s {animal}?"
    return _Fact(f"I have a {animal} now, and I call it {name}.", list(_questions(question, name, speaker, other)))


def _job(speaker: str, other: str, pools: Pools) -> _Fact:
    job, town = pools["jobs"].pop(), pools["towns"].pop()
    question = f"In which town does {{}} work as a {job}?"
    return _Fact(f"I started to work as a {job} in {town}.", list(_questions(question, town, speaker, other)))


def _kin(speaker: str, other: str, pools: Pools) -> _Fact:
    kin, name = pools["kin"].pop(), pools["people"].pop()
    question = f"What is the name of {{}}'s {kin}?"
    return _Fact(f"My {kin} {name} is coming to see me.", list(_questions(question, name, speaker, other)))


def _hobby(speaker: str, other: str, pools: Pools) -> _Fact:
    hobby, name = pools["hobbies"].pop(), pools["people"].pop()
    question = f"Who teaches {{}} {hobby}?"
    return _Fact(f"I take lessons in {hobby} now, {name} teaches me.", list(_questions(question, name, speaker, other)))


def _food(speaker: str, other: str, pools: Pools) -> _Fact:
    food = pools["foods"].pop()
    follows = {
        "question": f"Would {speaker} like a cake with {food}?",
        "answer": f"No; {speaker} cannot eat {food}",
        "category": OPEN_DOMAIN,
    }
    return _Fact(f"The doctor says that I cannot eat {food} any more.", [follows])


def _thing(speaker: str, other: str, pools: Pools) -> _Fact:
    thing = pools["things"].pop()
    when = {"question": f"When did {speaker} buy {thing}?", "answer": "{before}", "category": TEMPORAL}
    return _Fact(f"Yesterday I bought {thing}.", [when])


KINDS = (_pet, _job, _kin, _hobby, _food, _thing)
POOLS = {
    "animals": ANIMALS,
    "pets": PETS,
    "towns": TOWNS,
    "jobs": JOBS,
    "kin": KIN,
    "people": PEOPLE,
    "hobbies": HOBBIES,
    "foods": FOODS,
    "things": THINGS,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write.")
    parser.add_argument("--seed", type=int, default=0, help="Of everything that is drawn.")
    parser.add_argument("--conversations", type=int, default=10, help="How many.")
    parser.add_argument("--sessions", type=int, default=6, help="Of each.")
    parser.add_argument("--turns", type=int, default=16, help="Of each session, at least.")
    parser.add_argument("--facts", type=int, default=6, help="Told by each speaker, besides two journeys.")
    given = parser.parse_args()
    try:
        made = make_conversations(
            ConversationSettings(given.conversations, given.sessions, given.turns, given.facts, given.seed)
        )
    except LongMemError as error:
        sys.exit(f"error: {error}")
    write_whole(given.out, [json.dumps(made, indent=1), "\n"])
    questions = sum(len(sample["qa"]) for sample in made)
    print(f"{given.out}: {len(made)} conversations, {questions} questions")


if __name__ == "__main__":
    main()
