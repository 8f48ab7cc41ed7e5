"""Made-up facts that a user tells in one conversation and asks for in a later one: to calibrate on, to measure with.

A kind of fact says how it is told, asked and answered, and where its value is drawn from; ``told_facts.tsv`` lists
105 kinds. Every fifth kind and every fourth value are held out: what is measured on was never trained on, neither its
wording nor its value.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from longmem.errors import ConfigError

_POOLS = {
    "names": "Ada Bruno Carla Dmitri Elif Farid Greta Hugo Ines Jonas Kemal Lena Marta Nils Olga Pavel Rosa Sven Uwe "
    "Wanda Yusuf Zoe Amara Basil Celeste Duncan Esther Felix Gloria Hector Imogen Jasper Keiko Lionel Miriam Noel "
    "Ottilie Priya Quentin Rashid Selma Tobias Ursula Vikram Wesley Xenia Yara Zachary Beatrice Cornelius",
    "pet names": "Biscuit Comet Domino Fig Juniper Maple Nutmeg Olive Pepper Quill Rocket Saffron Tango Velvet Waffle "
    "Ziggy Bramble Clover Dusty Ember Fudge Ginger Hazel Icicle Jigsaw Kipper Lentil Marble Noodle Pickle Rascal",
    "towns": "Aarhus Bilbao Cork Dresden Evora Funchal Ghent Izmir Krakow Lecce Nantes Oulu Porto Riga Split Turku "
    "Lyon Bergen Seville Gdansk Toledo Malmo Bruges Siena Graz Tampere Cadiz Trieste Leipzig Utrecht Kyoto Quito Boise",
    "colours": "turquoise crimson purple orange green yellow silver maroon beige lavender scarlet navy olive pink "
    "golden brown ivory teal magenta white",
    "animals": "otter badger parrot tortoise hamster goat canary hedgehog llama ferret pigeon iguana donkey rabbit "
    "peacock lizard gecko pony falcon beaver",
    "dishes": "lasagna pancakes dumplings risotto goulash ramen paella tacos falafel moussaka gnocchi curry pierogi "
    "sushi couscous stew waffles chili polenta kimchi",
    "fruits": "mango papaya apricot fig quince cherry plum raspberry lychee pear kiwi melon grapefruit pomegranate",
    "instruments": "cello trumpet banjo harp oboe accordion clarinet violin ukulele tuba flute mandolin trombone piano",
    "sports": "fencing rowing archery badminton judo sailing climbing handball curling squash volleyball wrestling "
    "surfing karate hockey skiing",
    "jobs": "baker nurse plumber gardener librarian translator beekeeper carpenter pilot dentist florist welder tailor "
    "surveyor butcher chemist sculptor juggler",
    "days": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "months": "January February March April May June July August September October November December",
    "things": "telescope canoe piano typewriter bicycle tent lantern drum kite microscope camera toolbox globe compass "
    "teapot rug chessboard sled hammock",
    "languages": "Finnish Basque Swahili Welsh Hungarian Icelandic Korean Maltese Tamil Turkish Estonian Greek Danish",
    "materials": "copper oak marble bamboo slate wool bronze granite leather silk walnut concrete cork glass pine",
    "countries": "Norway Peru Kenya Vietnam Iceland Morocco Chile Nepal Cuba Latvia Ghana Malta Oman Samoa Bolivia",
    "flowers": "tulips orchids dahlias lilies roses poppies irises daisies peonies sunflowers violets marigolds",
}
_ALWAYS = ("days", "months")  # too few of them to hold any out
_BEFORE = ("", "By the way: ", "Something else. ", "Please remember this. ", "I wanted to tell you something. ")
_AFTER = ("", " I am quite happy about it.", " That is how it is.", " Just so you know.", " Keep it in mind.")
_REPLIES = (
    "Thank you for telling me!",
    "I see. I will remember that.",
    "That is good to know.",
    "Noted.",
    "Oh, that is interesting!",
    "All right, I will keep it in mind.",
    "Thanks for sharing that with me.",
)

Message = dict[str, str]
"""``{"role": "user" or "assistant", "content": text}``, as chat templates take them."""


@dataclass(frozen=True)
class ToldFact:
    """One fact.

    Attributes:
        said: what the user tells.
        asked: the question, in a later conversation.
        before: the answer up to its value, and what follows it.
        value: what has to be remembered.
        after: the rest of the answer.
    """

    said: str
    asked: str
    before: str
    value: str
    after: str


@dataclass(frozen=True)
class Session:
    """A conversation in which facts were told.

    Attributes:
        facts: in the order told.
        messages: the conversation.
    """

    facts: tuple[ToldFact, ...]
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class AskedIds:
    """A later conversation as token ids.

    Attributes:
        ids: of questions and answers, one conversation.
        values: for each question asked, ``(first, end)``: where in ``ids`` the tokens of the answer's value are.
    """

    ids: list[int]
    values: list[tuple[int, int]]


def told_session(draw: random.Random, count: int, *, held_out: bool = False) -> Session:
    """A conversation that tells ``count`` facts of different kinds.

    Args:
        draw: decides everything.
        count: facts.
        held_out: draw kinds and values that are kept for measuring.

    Raises:
        ConfigError: there are not as many kinds.
    """
    kinds = [kind for number, kind in enumerate(_kinds()) if (number % 5 == 4) == held_out]
    if not 1 <= count <= len(kinds):
        raise ConfigError(f"facts of a session ({count}) must be 1 to {len(kinds)}, the kinds there are to draw from")
    facts, used = [], set[str]()
    for said, asked, answer, pool in draw.sample(kinds, count):
        values = _values(pool, held_out)
        value = draw.choice([value for value in values if value not in used] or values)
        used.add(value)
        before, after = answer.split("{}")
        facts.append(ToldFact(said.format(value), asked, before, value, after))
    return Session(tuple(facts), tuple(_messages(facts, draw)))


def told_ids(session: Session, tokenizer: Any) -> list[int]:
    """The conversation that told the facts, through the tokenizer's chat template where it has one."""
    return _ids(tokenizer, _chat(tokenizer, session.messages, answer=False))


def asked_ids(facts: Sequence[ToldFact], tokenizer: Any) -> AskedIds:
    """A later conversation that asks for the given facts, one question after the other, with their answers."""
    messages: list[Message] = []
    ids: list[int] = []
    values = []
    done = ""
    for fact in facts:
        messages.append({"role": "user", "content": fact.asked})
        prompt = _chat(tokenizer, messages, answer=True)
        before = prompt[len(done) :] + fact.before
        value = fact.value
        if before.endswith(" ") and not value[0].isdigit():
            before, value = before[:-1], " " + value  # the space belongs to the word's token
        ids += _ids(tokenizer, before)
        first = len(ids)
        ids += _ids(tokenizer, value)
        values.append((first, len(ids)))
        messages.append({"role": "assistant", "content": fact.before + fact.value + fact.after})
        whole = _chat(tokenizer, messages, answer=False)
        ids += _ids(tokenizer, whole[len(prompt) + len(fact.before + fact.value) :])
        done = whole
    return AskedIds(ids, values)


def _messages(facts: Sequence[ToldFact], draw: random.Random) -> Iterator[Message]:
    for fact in facts:
        yield {"role": "user", "content": draw.choice(_BEFORE) + fact.said + draw.choice(_AFTER)}
        yield {"role": "assistant", "content": draw.choice(_REPLIES)}


def _chat(tokenizer: Any, messages: Sequence[Message], *, answer: bool) -> str:
    """The text of a conversation; with ``answer`` it ends where the assistant begins to speak."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer)
        return str(text)
    lines = "".join(f"{message['role'].capitalize()}: {message['content']}\n" for message in messages)
    return lines + "Assistant: " * answer


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@lru_cache(maxsize=1)
def _kinds() -> list[tuple[str, ...]]:
    """(said, asked, answer, values) of every kind."""
    lines = files(__package__).joinpath("told_facts.tsv").read_text(encoding="utf-8").splitlines()
    return [tuple(line.split("\t")) for line in lines[1:]]


@lru_cache(maxsize=64)
def _values(pool: str, held_out: bool) -> list[str]:
    if pool == "times":
        values = [f"{hour}:{minute:02d}" for hour in range(1, 13) for minute in (5, 10, 20, 25, 35, 40, 50, 55)]
    elif pool in _POOLS:
        values = _POOLS[pool].split()
    else:
        first, last = map(int, pool.split("-"))
        values = [str(number) for number in range(first, last + 1)]
    if pool in _ALWAYS:
        return values
    values = random.Random(pool).sample(values, len(values))  # lists of neighbours are not held out in a pattern
    return [value for number, value in enumerate(values) if (number % 4 == 3) == held_out]
