"""Pieces of text that can only be predicted well with a memory: the training data of models/smollm2-135m-longmem.

A piece is eight segments of one document. In some, things are told in the early segments and asked for in later ones:
made-up facts and sentences of a book told in a conversation, hidden codes, and what stands after a quoted line; half of
the questions about a conversation have passages that text search finds in their window, as chat and server put them
there. In others small stories are hidden in two to eight segments, each in another document, and asked about at their
end, or short texts stand with labels that only earlier ones explain. Each asked token has a weight, and most a link to
the tokens that hold its answer. A piece also says which of its segments begin with nothing in memory.

    python recipes/smollm2/pieces.py --tokenizer DIR --books DIR --latex DIR --python FILE --babi DIR --out DIR
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from longmem.chat import PlainTexts, Recall
from longmem.data.facts import (
    KINDS,
    Session,
    ToldFact,
    asked_ids,
    changed_session,
    draw_facts,
    question_ids,
    session_of,
    told_session,
)
from longmem.data.text import read_documents
from longmem.data.tokens import Message, chat_text

WINDOW, SEGMENTS = 1024, 8
PIECE = WINDOW * SEGMENTS
TEXT, DULL, SAID, ANSWER = 4, 1, 8, 16
"""Weights, in quarters: of text and replies to what is told, of what surrounds an answer, its words, its value."""
ABOUT = (
    "What did I tell you about {}?",
    "What did I say about {}?",
    "Do you remember what I said about {}?",
    "Remind me of what I told you about {}.",
)
TURNED = {
    "i was": "you were", "was i": "were you", "i'm": "you're", "i": "you", "me": "you", "my": "your", "mine": "yours",
    "myself": "yourself", "am": "are", "we": "you", "us": "you", "our": "your", "ours": "yours",
    "ourselves": "yourselves",
}  # fmt: skip
LABELLED = (("Text: {}\nLabel:", "\n\n"), (" Input: {} Class:", ""), (" Sentence: {} Topic:", ""), ("{} ->", "\n"))


@dataclass
class Asked:
    """Token ids of a question and its answer; ``links`` are (place of an answer's token, place of the told token)."""

    ids: list[int]
    about: str = ""  # the question, where another conversation may answer it otherwise
    links: list[tuple[int, int, int]] = field(default_factory=list)  # (place, group's part, place in that part)
    answers: list[tuple[int, int]] = field(default_factory=list)
    said: tuple[int, int] = (0, 0)  # the whole reply
    noted: Callable[[str], Asked] | None = None  # the same question with these notes in its window


@dataclass
class Group:
    """What is told, in parts that may lie apart, and what can be asked once the last of them was told."""

    parts: list[list[int]]
    asked: list[Asked]
    replies: list[tuple[int, int, int]] = field(default_factory=list)  # part, from, to
    apart: bool = False  # each part in a segment of its own


Story = tuple[list[str], str, str, list[int]]
Piece = tuple[NDArray[np.uint16], NDArray[np.uint8], list[tuple[int, int]], list[bool]]
"""Token ids (PIECE + 1), weights (PIECE), links, and which segments begin with nothing in memory."""


class Maker:
    """Draws pieces from documents.

    Args:
        tokenizer: of the backbone.
        documents: token ids by kind.
        stories: of bAbI, for each task: (sentences, question, answer, sentences that hold it).
        words: that stand for values of facts beside their own, and for labels.
        sentences: that people say of themselves, and what of them can be asked about; see ``own_words``.
        seed: decides everything.
        held_out: facts of kinds and values that training never sees.
    """

    def __init__(
        self,
        tokenizer: Any,
        documents: dict[str, list[NDArray[np.uint16]]],
        stories: Sequence[Sequence[Story]],
        words: Sequence[str],
        sentences: Sequence[tuple[str, str]],
        seed: int,
        *,
        held_out: bool = False,
    ) -> None:
        self.tokenizer, self.documents, self.stories, self.words = tokenizer, documents, stories, words
        self.sentences = sentences
        self.short = [sorted(task, key=lambda story: len(story[0]))[: 1 + len(task) // 4] for task in stories]
        self.draw, self.random, self.held_out = random.Random(seed), np.random.default_rng(seed), held_out

    def text(self, kind: str) -> NDArray[np.uint16]:
        """Consecutive tokens of a document, one more than a piece."""
        long = [each for each in self.documents[kind] if len(each) > PIECE + 1]
        document = self.draw.choices(long, weights=[len(each) for each in long])[0]
        start = self.draw.randrange(len(document) - PIECE)
        return document[start : start + PIECE + 1]

    def plain(self, kind: str) -> Piece:
        """A piece of text as it is; a quarter of them is read without memory."""
        fresh = self.draw.choices(([True] * SEGMENTS, _first(True), _first(False)), weights=(5, 6, 9))[0]
        return self.text(kind), np.full(PIECE, TEXT, np.uint8), [], fresh

    def asking(self, kind: str) -> Piece:
        """A piece in which things are told and asked for."""
        text = self.text(kind).astype(np.int64).tolist()
        makers = (*[self.told] * 3, self.hidden, self.hidden)
        groups = [make() for make in self.draw.sample(makers, 4)]
        times = Counter(asked.about for group in groups for asked in group.asked)
        for group in groups:  # which of two conversations is the newer one is left to chance
            group.asked = [asked for asked in group.asked if not asked.about or times[asked.about] == 1]
        first = self.draw.randrange(1, SEGMENTS)
        asking = sorted({first, SEGMENTS - 1})
        inserts: dict[int, list[tuple[int, int]]] = {segment: [] for segment in range(SEGMENTS)}
        told_at: list[int] = []
        for number, group in enumerate(groups):
            last = asking[-1] if group.apart else self.draw.choice(asking)
            free = [s for s in range(last) if s not in asking] or [0]
            draw = self.draw.sample if group.apart else self.draw.choices
            homes = sorted(draw(free, k=len(group.parts)))
            told_at.append(homes[-1])
            for part, home in enumerate(homes):
                inserts[home].append((number, part))
        ids: list[int] = []
        weights: list[int] = []
        links: list[tuple[int, int]] = []
        places: dict[tuple[int, int], int] = {}
        heard: list[int] = []  # what text search searches
        for segment in range(SEGMENTS):
            if segment in asking:
                self._ask(segment, groups, told_at, places, text, ids, weights, links, heard)
                continue
            room = WINDOW - sum(len(groups[g].parts[p]) for g, p in inserts[segment])
            cuts = sorted(self.draw.randrange(max(1, room)) for _ in inserts[segment])
            taken, at = text[segment * WINDOW :], 0
            for (number, part), cut in zip(inserts[segment], cuts, strict=True):
                if len(ids) + cut - at + len(groups[number].parts[part]) > (segment + 1) * WINDOW:
                    continue  # what was not told whole is not asked for
                ids += taken[at:cut]
                weights += [TEXT // 2] * max(0, cut - at)
                at = max(at, cut)
                places[number, part] = len(ids)
                ids += groups[number].parts[part]
                weights += [DULL] * len(groups[number].parts[part])
                for of, first, last in groups[number].replies:
                    if of == part:
                        weights[places[number, part] + first : places[number, part] + last] = [TEXT] * (last - first)
            missing = (segment + 1) * WINDOW - len(ids)
            ids += taken[at : at + missing]
            weights += [TEXT // 2] * missing
            heard += ids[-WINDOW:]
        ids.append(text[-1])
        return _piece(ids, weights, links, _first(self.draw.random() < 0.4))

    def story(self, kind: str) -> Piece:
        """Stories of bAbI, each hidden in text of its own, which begins with nothing in memory, and asked about at the
        end of it: as BABILong is made.

        Before the question stand up to two short stories with their answers, behind it more questions.
        """
        ids: list[int] = []
        weights: list[int] = []
        links: list[tuple[int, int]] = []
        fresh: list[bool] = []
        for span in self.draw.choice(((2, 2, 2, 2), (2, 2, 2, 2), (2, 3, 3), (4, 4), (8,))):
            text = self.text(kind).astype(np.int64).tolist()
            begin, end = len(ids), len(ids) + span * WINDOW
            fresh += [segment == 0 for segment in range(span)]
            task = self.draw.randrange(len(self.stories))
            sentences, *question = self.draw.choice(self.stories[task])
            around = self.draw.choice(("\n{}\n", " {}", " {}", " {}"))  # a line of its own, or among those of the text
            parts = [self._ids(around.format(sentence)) for sentence in sentences]
            shown = [self.draw.choice(self.short[task]) for _ in range(self.draw.choice((0, 1, 2, 2)))]
            before = "".join(f"Story: {' '.join(s[0])}\nQuestion: {s[1]}\nAnswer: {s[2]}\n\n" for s in shown)
            more = [each for each in more_questions(sentences) if each[0] != question[0]]
            tail: list[int] = []
            answers: list[tuple[int, int, list[int]]] = []
            for asked, answer, evidence in (question, *self.draw.sample(more, min(4, len(more)))):
                tail += self._ids(f"\n\n{before}Question: {asked}\nAnswer:")
                answers.append((len(tail), len(tail) + len(said := self._ids(f" {answer}")), evidence))
                tail, before = tail + said, ""
            tail += self._ids("\n\n")
            room = end - begin - len(tail) - sum(map(len, parts))
            cuts = sorted(self.draw.randrange(room) for _ in parts)
            at, places = 0, []
            for part, cut in zip(parts, cuts, strict=True):
                ids += text[at:cut]
                weights += [TEXT // 2] * (cut - at) + [DULL] * len(part)
                places.append(len(ids))
                ids, at = ids + part, cut
            ids += text[at:room]
            weights += [TEXT // 2] * (room - at) + [DULL] * len(tail)
            for first, last, evidence in answers:
                said = tail[first:last]
                weights[len(ids) + first : len(ids) + last] = [ANSWER] * (last - first)
                found = [(part, _find(parts[part], said)) for part in evidence]
                links += [(len(ids) + first, places[part] + offset) for part, offset in found if offset is not None]
            ids += tail
        ids.append(text[-1])
        return _piece(ids, weights, links, fresh)

    def labelled(self, kind: str) -> Piece:
        """Short texts of some documents with labels: those of a document have one word, which says nothing of it."""
        long = [each for each in self.documents[kind] if len(each) > 48]
        documents = self.draw.sample(long, min(self.draw.choice((2, 3, 5, 10, 20, 40, 60)), len(long)))
        labels = self.draw.sample(self.words, len(documents))
        asked, after = self.draw.choice(LABELLED)
        longest = self.draw.choice((12, 24, 48))
        ids: list[int] = []
        weights: list[int] = []
        seen = set[int]()
        while len(ids) <= PIECE:
            number = self.draw.randrange(len(documents))
            start = self.draw.randrange(len(documents[number]) - longest)
            text = self.tokenizer.decode(documents[number][start : start + self.draw.randrange(5, longest)])
            before = self._ids(asked.format(" ".join(text.split())))
            label = self._ids(f" {labels[number]}")
            ids += before + label + self._ids(after)
            weights += [DULL] * len(before) + [SAID if number in seen else 0] * len(label)
            weights += [0] * (len(ids) - len(weights))
            seen.add(number)
        return _piece(ids[: PIECE + 1], weights[:PIECE], [], _first(self.draw.random() < 0.5))

    def _ask(
        self,
        segment: int,
        groups: list[Group],
        told_at: list[int],
        places: dict[tuple[int, int], int],
        text: list[int],
        ids: list[int],
        weights: list[int],
        links: list[tuple[int, int]],
        heard: list[int],
    ) -> None:
        ready = [
            g
            for g in range(len(groups))
            if told_at[g] < segment and all((g, p) in places for p in range(len(groups[g].parts)))
        ]
        questions = [(g, asked) for g in ready for asked in groups[g].asked]
        quotes = [(-1, self.quote(ids, segment)) for _ in range(3)]
        self.draw.shuffle(questions)
        end = (segment + 1) * WINDOW
        recall = Recall(PlainTexts({"": self._heard(heard)}), "")
        for group, asked in self.draw.sample(questions + quotes, len(questions) + len(quotes)):
            filler = self.draw.choice((0, 0, 8, 40))
            if asked.noted and self.draw.random() < 0.5:
                top, budget = self.draw.choice(((1, 100), (3, 200), (5, 200), (5, 400)))
                # notes may lack the answer: then memory has to have it
                others = [each.about for _, each in questions if each.about]
                about = asked.about if self.draw.random() < 0.8 else self.draw.choice(others)
                asked = asked.noted(recall.notes(about, self.tokenizer, top, budget=budget)[0])
            if len(ids) + filler + len(asked.ids) > end:
                continue
            start = len(text) - self.draw.randrange(100, 2 * WINDOW)
            ids += text[start : start + filler]
            weights += [DULL] * (len(ids) - len(weights))
            here = len(ids)
            ids += asked.ids
            weights += [DULL] * len(asked.ids)
            first, last = asked.said
            weights[here + first : here + last] = [SAID] * (last - first)
            for first, last in asked.answers:
                weights[here + first : here + last] = [ANSWER] * (last - first)
            for place, part, offset in asked.links:
                links.append((here + place, offset if group < 0 else places[group, part] + offset))
        missing = end - len(ids)
        ids += text[end - missing : end]
        weights += [TEXT // 2] * missing

    # what can be told

    def told(self) -> Group:
        """A conversation, and others that ask about it; in some of them a second one tells some of it anew."""
        if self.draw.random() < 0.3:
            sessions = [session_of([self._sentence() for _ in range(self.draw.randrange(3, 9))], self.draw)]
        else:
            sessions = [told_session(self.draw, self.draw.randrange(3, 11), held_out=self.held_out)]
            if self.draw.random() < 0.5:
                some = self.draw.sample(sessions[0].facts, self.draw.randrange(1, 1 + len(sessions[0].facts)))
                sessions.append(changed_session(session_of(some, self.draw), self.draw, held_out=self.held_out))
            sessions = list(map(self._other_values, sessions))
        parts, replies = list[list[int]](), []
        newest = dict[str, tuple[int, ToldFact]]()
        for part, session in enumerate(sessions):
            told, spoken = self._conversation(session.messages)
            parts.append(told)
            replies += [(part, first, last) for first, last in spoken]
            newest |= {fact.asked: (part, fact) for fact in session.facts[: len(spoken)]}
        left, asked = list(newest.values()), list[Asked]()
        self.draw.shuffle(left)
        for part, fact in left:
            asked.append(self._asked(fact, part, parts[part], ""))
        return Group(parts, asked, replies, apart=True)

    def _asked(self, fact: ToldFact, part: int, told: list[int], notes: str) -> Asked:
        """The conversation that asks for it, with these notes in its window; ``told`` are the tokens of the part."""
        before = [{"role": "system", "content": notes}] if notes else []
        ids, values = asked_ids([fact], self.tokenizer, before)
        one = Asked(ids, fact.asked, noted=partial(self._asked, fact, part, told))
        one.said = len(question_ids(fact, self.tokenizer, before)), len(ids)
        for first, last in values:
            value = ids[first:last]
            if len(fact.value.split()) > 4:  # a sentence: learned as words, not as a value
                same = SequenceMatcher(None, value, told, autojunk=False).get_matching_blocks()
                one.links += [(first + a + n, part, b + n) for a, b, size in same if size > 1 for n in range(size)]
            else:
                one.answers.append((first, last))
                if (at := _find(told, value)) is not None:
                    one.links += [(first + n, part, at + n) for n in range(last - first)]
        return one

    def _sentence(self) -> ToldFact:
        """A sentence of a book as a fact: asked about by one thing in it, answered by the whole of it."""
        said, about = self.draw.choice(self.sentences)
        return ToldFact(said, self.draw.choice(ABOUT).format(about), "", turned(said), "")

    def _heard(self, ids: list[int]) -> str:
        """What was read as a store keeps it: a line for each message, without those of the system."""
        lines = re.sub(
            r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", r"\1: \2", self.tokenizer.decode(ids), flags=re.DOTALL
        )
        return re.sub(r"^system: .*?(?=\n(?:user|assistant): )", "", lines, flags=re.DOTALL | re.MULTILINE)

    def _conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[tuple[int, int]]]:
        """Its token ids, as far as a segment has room for them, and where its replies are."""
        told: list[int] = []
        replies = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before = len(self._ids(chat_text(self.tokenizer, messages[:number], answer=True)))
                told = self._ids(chat_text(self.tokenizer, messages[: number + 1], answer=False))
                replies.append((before, len(told)))
            if len(told) > WINDOW - 128:
                break
        return told, replies

    def _other_values(self, session: Session) -> Session:
        """Another word or number in place of the value of most facts: what is told need not make sense."""
        facts, messages = [], list(session.messages)
        for old in session.facts:
            new, kind = old, self.draw.random()
            if not self.held_out and kind >= 0.4:
                value = self.draw.choice(self.words) if kind < 0.85 else str(self.draw.randrange(10, 10000))
                new = old._replace(said=old.said.replace(old.value, value), value=value)
            facts.append(new)
            messages = [{**one, "content": one["content"].replace(old.said, new.said)} for one in messages]
        return Session(tuple(facts), tuple(messages))

    def hidden(self) -> Group:
        """Codes of things."""
        facts = draw_facts(self.draw.choice(list(KINDS)), self.random)
        parts = [self._ids(sentence) for sentence in (*facts.asked, *facts.others)]
        question, answer = self._ids(facts.question), self._ids(facts.answer)
        one = Asked(question + answer + self._ids(".\n"), answers=[(len(question), len(question) + len(answer))])
        code = self._ids(facts.answer.rsplit(" ", 1)[1])
        for part in range(len(facts.asked)):
            at = _find(parts[part], code)
            if at is not None:
                first = len(question) + len(answer) - len(code)
                one.links += [(first + n, part, at + n) for n in range(len(code))]
        return Group(parts, [one])

    def quote(self, ids: list[int], segment: int) -> Asked:
        """What stands after some words of an earlier segment."""
        known, told = self.draw.randrange(8, 17), self.draw.randrange(8, 25)
        start = self.draw.randrange(segment * WINDOW - known - told)
        words = self.tokenizer.decode(ids[start : start + known])
        prompt = chat_text(self.tokenizer, [{"role": "user", "content": f'What comes after "{words}"?'}], answer=True)
        asked = self._ids(prompt)
        answer = ids[start + known : start + known + told]
        one = Asked(asked + answer + self._ids("<|im_end|>\n"), answers=[(len(asked), len(asked) + told)])
        one.links = [(len(asked) + n, 0, start + known + n) for n in range(told)]
        return one

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _find(ids: list[int], wanted: list[int]) -> int | None:
    """Where ``wanted`` begins in ``ids``, its first token with or without a space before it."""
    for tail in (wanted, wanted[1:]):
        for at in range(len(ids) - len(tail) + 1) if tail else ():
            if ids[at : at + len(tail)] == tail:
                return max(0, at - (len(wanted) - len(tail)))
    return None


def _piece(ids: list[int], weights: list[int], links: list[tuple[int, int]], fresh: list[bool]) -> Piece:
    """A weight, and the place of a link, belong to the token that is predicted, which is one further on."""
    shifted = [*weights[1:], 0]
    return np.array(ids, np.uint16), np.array(shifted, np.uint8), [(t - 1, s) for t, s in links], fresh


def _first(empty: bool) -> list[bool]:
    return [empty] + [False] * (SEGMENTS - 1)


def more_questions(sentences: Sequence[str]) -> list[tuple[str, str, list[int]]]:
    """What else a story of bAbI tells of people and things: questions, answers and the sentences that hold them."""
    at: dict[str, tuple[str, int]] = {}  # where everybody is, and the sentence that said so
    held: dict[str, tuple[str, int]] = {}  # who has each thing
    was: dict[str, list[tuple[str, list[int]]]] = {}  # where each thing has been
    given: dict[str, tuple[str, str, int]] = {}  # who gave each thing to whom, last

    def moved(thing: str, evidence: list[int]) -> None:
        person = held[thing][0]
        if person in at and (thing not in was or was[thing][-1][0] != at[person][0]):
            was.setdefault(thing, []).append((at[person][0], [*evidence, at[person][1]]))

    for number, sentence in enumerate(sentences):
        if found := re.fullmatch(r"(\w+) (?:went|moved|journeyed|travelled)(?: back)? to the (\w+)\.", sentence):
            at[found[1]] = found[2], number
            for thing in [thing for thing, (person, _) in held.items() if person == found[1]]:
                moved(thing, [held[thing][1]])
        elif found := re.fullmatch(r"(\w+) (?:got|grabbed|took|picked up) the (\w+)(?: there)?\.", sentence):
            held[found[2]] = found[1], number
            moved(found[2], [number])
        elif found := re.fullmatch(r"(\w+) (?:dropped|left|discarded|put down) the (\w+)(?: there)?\.", sentence):
            held.pop(found[2], None)
        elif found := re.fullmatch(r"(\w+) (?:gave|passed|handed) the (\w+) to (\w+)\.", sentence):
            held[found[2]], given[found[2]] = (found[3], number), (found[1], found[3], number)
            moved(found[2], [number])
    asked = [(f"Where is {person}?", place, [number]) for person, (place, number) in at.items()]
    for thing, places in was.items():
        asked.append((f"Where is the {thing}?", *places[-1]))
        if len(places) > 1:
            here, there = places[-1][0], places[-2]
            asked.append((f"Where was the {thing} before the {here}?", there[0], [*there[1], *places[-1][1]]))
    for thing, (giver, taker, number) in given.items():
        asked += [(f"Who gave the {thing}?", giver, [number]), (f"Who received the {thing}?", taker, [number])]
    return asked


def turned(said: str) -> str:
    """What people say of themselves, as said to them."""
    words = "|".join(TURNED)  # longer ones first
    found = re.sub(rf"\b(?:{words})\b", lambda word: TURNED[word[0].lower()], said, flags=re.IGNORECASE)
    return found[0].upper() + found[1:]


def own_words(text: str) -> list[tuple[str, str]]:
    """Sentences of a text that people say of themselves, and of each the rarest thing that it names."""
    found, line = [], " ".join(text.replace("’", "'").split())
    for sentence in re.findall(r"(?<=[.!?] )(?:I|My|We|Our) [^.!?\"“”:;_\[\]]{25,140}\.", line):
        things = re.findall(
            r"\b(the|my|our|a|an) ([a-z]{4,})\b(?=[,.]| (?:of|in|on|at|to|was|is|had|and|with|from|for|by|as) )",
            sentence,
        )
        if things and not re.search(r"\b(?:you|your|thou|thee|thy)\b", sentence, re.IGNORECASE):
            found.append((sentence, things))
    times = Counter(thing for _, things in found for _, thing in things)
    rare = ((said, min(things, key=lambda thing: times[thing[1]])) for said, things in found)
    return [(said, f"{before if before in ('my', 'our') else 'the'} {thing}") for said, (before, thing) in rare]


def stories(folder: Path, pattern: str, most: int) -> Iterator[Story]:
    """bAbI: sentences before a question, the question, its answer, and which sentences hold it."""
    for file in sorted(folder.rglob(pattern)):
        sentences: list[str] = []
        numbers: list[int] = []
        for line in file.read_text(encoding="utf-8").splitlines():
            number, _, rest = line.partition(" ")
            if number == "1":
                sentences, numbers = [], []
            if "?" in rest:
                question, answer, support = re.split(r"[\t|]", rest)  # as published; some copies have bars
                if len(sentences) <= most:
                    evidence = [numbers.index(int(n)) for n in support.split()]
                    yield list(sentences), question.strip(), answer, evidence
            else:
                sentences.append(rest.strip())
                numbers.append(int(number))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("tokenizer", "books", "latex", "python", "babi", "out", "split"):
        parser.add_argument(f"--{name}", required=name != "split", default="train")
    parser.add_argument("--plain", default="books=600,latex=500,python=500")
    parser.add_argument("--asking", default="books=450,latex=225,python=225")
    parser.add_argument("--story", default="books=500,latex=50,python=50")
    parser.add_argument("--labelled", default="books=0", help="may have cost in-context learning: docs/experiments.md")
    parser.add_argument("--tokens", type=int, default=12_000_000, help="of each kind of document, at most")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    documents: dict[str, list[NDArray[np.uint16]]] = {}
    for kind in ("books", "latex", "python"):
        texts = [document.text for document in read_documents([getattr(given, kind)])]
        random.Random(given.seed).shuffle(texts)
        documents[kind], total = [], 0
        for text in texts:
            ids = np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.uint16)
            documents[kind].append(ids)
            total += len(ids)
            if total > given.tokens:
                break
        print(kind, len(documents[kind]), "documents", total, "tokens", flush=True)
        if kind == "books":
            names = re.findall(r"(?<=[a-z,;] )[A-Z][a-z]{3,11}\b", " ".join(texts)[:20_000_000])
            common = re.findall(r"\b(?:a|the) ([a-z]{3,11})\b", " ".join(texts)[:4_000_000])
            words = sorted(set(names))[::2] + sorted(set(common))[::3]
            sentences = own_words(" ".join(texts)[:40_000_000])
    told = [list(stories(Path(given.babi), f"qa{task}_*_{given.split}.txt", 60)) for task in range(1, 6)]
    print(len(words), "words", len(sentences), "sentences", list(map(len, told)), "stories", flush=True)
    maker = Maker(tokenizer, documents, told, words, sentences, given.seed, held_out=given.split != "train")
    ids, weights, links, fresh, kinds = [], [], [], [], []
    for make in ("plain", "asking", "story", "labelled"):
        for kind, count in (each.split("=") for each in getattr(given, make).split(",")):
            for _ in range(int(count)):
                piece = getattr(maker, make)(kind)
                links += [(len(ids), *link) for link in piece[2]]
                ids.append(piece[0])
                weights.append(piece[1])
                fresh.append(piece[3])
                kinds.append(kind if make == "plain" else make)
    out = Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "ids.npy", np.stack(ids))
    np.save(out / "weights.npy", np.stack(weights))
    np.save(out / "fresh.npy", np.array(fresh))
    np.save(out / "links.npy", np.array(links, np.int32))
    (out / "kinds.json").write_text(json.dumps(kinds))
    print(len(ids), "pieces", len(links), "links", flush=True)


if __name__ == "__main__":
    main()
