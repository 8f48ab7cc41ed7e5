"""A small set of conversations over several sessions, with questions about the earlier ones, in the shape of LoCoMo.

Usage: python recipes/data/conversations.py --out data/conversations.json [--seed 0]

Made from templates: names, places and dates are drawn, so that an answer cannot be known without reading it. The file
is for ``longmem eval dialogue``.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import click

from longmem.files import write_whole

MULTI_HOP, TEMPORAL, OPEN_DOMAIN, SINGLE_HOP, ADVERSARIAL = 1, 2, 3, 4, 5

PEOPLE = (
    "Ada Bruno Carla Dmitri Elif Farid Greta Hugo Ines Jonas Kemal Lena Marta Nils Olga Pavel Rosa Sven Uwe".split()
)
POOLS = {
    "animals": "cat dog parrot rabbit tortoise hamster goat canary".split(),
    "pets": (
        "Biscuit Comet Domino Fig Juniper Maple Nutmeg Olive Pepper Quill Rocket Saffron Tango Velvet Waffle Ziggy"
    ).split(),
    "towns": (
        "Aarhus Bilbao Cork Dresden Evora Funchal Ghent Izmir Krakow Lecce Nantes Oulu Porto Riga Split Turku"
    ).split(),
    "jobs": "baker nurse plumber gardener librarian translator beekeeper carpenter pilot".split(),
    "kin": "sister brother cousin aunt".split(),
    "people": PEOPLE,
    "hobbies": "pottery rowing chess archery knitting fencing painting juggling sailing woodcarving".split(),
    "foods": "peanuts shellfish strawberries mushrooms walnuts sesame".split(),
    "things": "a red bicycle,a piano,a telescope,a green tent,a sewing machine,a canoe,a wool coat".split(","),
}

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


class Kind(NamedTuple):
    """A kind of fact: what a speaker says of herself, and what is asked of it.

    ``{0}`` and ``{1}`` are drawn from the pools, ``{who}`` is the speaker. What is asked of one fact is also asked of
    the other speaker, of whom it has no answer.
    """

    pools: tuple[str, ...]
    said: str
    question: str
    answer: str
    category: int = SINGLE_HOP


KINDS = (
    Kind(("animals", "pets"), "I have a {0} now, and I call it {1}.", "What is the name of {who}'s {0}?", "{1}"),
    Kind(("jobs", "towns"), "I started to work as a {0} in {1}.", "In which town does {who} work as a {0}?", "{1}"),
    Kind(("kin", "people"), "My {0} {1} is coming to see me.", "What is the name of {who}'s {0}?", "{1}"),
    Kind(("hobbies", "people"), "I take lessons in {0} now, {1} teaches me.", "Who teaches {who} {0}?", "{1}"),
    Kind(
        ("foods",), "The doctor says that I cannot eat {0} any more.", "Would {who} like a cake with {0}?",
        "No; {who} cannot eat {0}", OPEN_DOMAIN,
    ),
    Kind(("things",), "Yesterday I bought {0}.", "When did {who} buy {0}?", "{{before}}", TEMPORAL),
)  # fmt: skip


@dataclass
class _Fact:
    """What a speaker says, and questions about it; ``{on}`` in an answer is its day, ``{before}`` the day before."""

    said: str
    questions: list[dict[str, Any]] = field(default_factory=list)


def make_conversations(
    conversations: int = 10, sessions: int = 6, turns: int = 16, facts: int = 6, seed: int = 0
) -> list[dict[str, Any]]:
    """Samples with ``sample_id``, ``conversation`` and ``qa``, as in ``locomo10.json``.

    Questions are of LoCoMo's five categories: two facts of different sessions (1), dates (2), what follows from a fact
    (3), one fact (4), and what was said of the other speaker only (5, with ``adversarial_answer``).
    """
    return [_sample(number, sessions, turns, facts, seed) for number in range(conversations)]


def _sample(number: int, sessions: int, turns: int, facts: int, seed: int) -> dict[str, Any]:
    draw = random.Random(f"conversations {seed} {number}")
    speakers = draw.sample(PEOPLE, 2)
    told: list[list[tuple[int, _Fact]]] = [[] for _ in range(sessions)]
    qa: list[dict[str, Any]] = []
    pools = {name: draw.sample(values, len(values)) for name, values in POOLS.items()}
    pools["people"] = [name for name in pools["people"] if name not in speakers]
    for who, speaker in enumerate(speakers):
        for kind in draw.sample(KINDS, facts):
            told[draw.randrange(sessions - 1)].append((who, _fact(kind, speaker, speakers[1 - who], pools)))
        journeys = [pools["towns"].pop(), pools["towns"].pop()]
        earlier = range(sessions - 1)
        two = sorted(draw.sample(earlier, 2)) if len(earlier) > 1 else [0, 0]
        both = {
            "question": f"Which towns has {speaker} come back from?",
            "answer": ", ".join(journeys),
            "category": MULTI_HOP,
        }
        for session, town in zip(two, journeys, strict=True):
            when = {"question": f"When did {speaker} come back from {town}?", "answer": "{on}", "category": TEMPORAL}
            fact = _Fact(f"I came back from {town} this morning, the journey was long.", [when, both])
            told[session].append((who, fact))
    conversation: dict[str, Any] = {"speaker_a": speakers[0], "speaker_b": speakers[1]}
    day = date(2023, 1, 1) + timedelta(days=draw.randrange(200))
    for session, of_session in enumerate(told, 1):
        hour, minute = draw.randrange(1, 12), draw.randrange(60)
        conversation[f"session_{session}_date_time"] = (
            f"{hour}:{minute:02d} {draw.choice(['am', 'pm'])} on {_said(day)}"
        )
        conversation[f"session_{session}"] = _turns(session, day, speakers, of_session, turns, draw, qa)
        day += timedelta(days=draw.randrange(2, 30))
    return {"sample_id": f"made-{seed}-{number}", "conversation": conversation, "qa": qa}


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


def _fact(kind: Kind, speaker: str, other: str, pools: dict[str, list[str]]) -> _Fact:
    drawn = [pools[pool].pop() for pool in kind.pools]
    answer = kind.answer.format(*drawn, who=speaker)
    asked, of_other = (kind.question.format(*drawn, who=who) for who in (speaker, other))
    questions: list[dict[str, Any]] = [{"question": asked, "answer": answer, "category": kind.category}]
    if kind.category == SINGLE_HOP:
        questions.append({"question": of_other, "adversarial_answer": answer, "category": ADVERSARIAL})
    return _Fact(kind.said.format(*drawn), questions)


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON file to write.")
@click.option("--seed", default=0, help="Of everything that is drawn.")
@click.option("--conversations", default=10, type=click.IntRange(1), help="How many.")
@click.option("--sessions", default=6, type=click.IntRange(2), help="Of each; facts are told in all but the last.")
@click.option("--turns", default=16, type=click.IntRange(2), help="Of a session, at least.")
@click.option("--facts", default=6, type=click.IntRange(1, len(KINDS)), help="Of each speaker, besides two journeys.")
def main(out: Path, **settings: int) -> None:
    made = make_conversations(**settings)
    write_whole(out, [json.dumps(made, indent=1), "\n"])
    questions = sum(len(sample["qa"]) for sample in made)
    print(f"{out}: {len(made)} conversations, {questions} questions")


if __name__ == "__main__":
    main()
