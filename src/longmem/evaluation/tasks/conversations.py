"""What is asked after conversations: questions of LoCoMo, replies of MSC, and facts told in an earlier conversation."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from longmem.chat import transcript
from longmem.data.facts import ToldFact, asked_ids, changed_session, question_ids, session_of, told_ids, told_session
from longmem.data.tokens import start_tokens
from longmem.errors import ConfigError
from longmem.evaluation.asking import Answer, Asker, Prompt, Tokens, encode_after
from longmem.evaluation.results import Json
from longmem.evaluation.systems import BACKBONE
from longmem.evaluation.tasks import Example, Metric, Source, Task, digest_of, drawn, lines_of, read_source
from longmem.evaluation.tasks.comprehension import f1_score
from longmem.evaluation.tasks.hidden import notes_on, read_haystack

CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}
MULTI_HOP, TEMPORAL, OPEN_DOMAIN, ADVERSARIAL = 1, 2, 3, 5
# the words of LoCoMo's own evaluation, but for ASKED
ASKED = "Question: {} Short answer:"
OFFERED = " (a) {a} (b) {b}. Select the correct answer by writing (a) or (b)."
WITH_DATE = " Use DATE of CONVERSATION to answer with an approximate date."
NOTHING = "No information available"
REFUSALS = ("no information available", "not mentioned")


class Question(NamedTuple):
    """What is asked after the sessions.

    Attributes:
        group: LoCoMo's category, or MSC's session.
        before: text of the session that goes on; empty where all sessions are over.
        text: the question, or the name before a reply.
        answer: the reference; of an adversarial question the wrong answer that it lures to.
        category: of LoCoMo; None for a reply.
        offered: the two answers, ``a`` and ``b``, that an adversarial question offers.
    """

    id: str
    group: str
    before: str
    text: str
    answer: str
    category: int | None = None
    offered: dict[str, str] | None = None

    @property
    def words(self) -> str:
        """What comes before the answer."""
        offer = "" if self.offered is None else OFFERED.format(**self.offered)
        return self.text if self.category is None else ASKED.format(self.text + offer)

    @property
    def expected(self) -> str:
        """The text whose likelihood is measured; of an adversarial question the letter of the right choice."""
        if self.offered is not None:
            return f"({'b' if self.offered['a'] == self.answer else 'a'})"
        # an open-domain answer is followed by its reason
        return self.answer.split(";")[0].strip() if self.category == OPEN_DOMAIN else self.answer


class Conversation(NamedTuple):
    """Sessions, oldest first, each a text with its date and a line for each turn, and what is asked about them.

    ``of`` names the conversation where other files have other parts of it: MSC's sessions.
    """

    id: str
    sessions: tuple[str, ...]
    questions: tuple[Question, ...]
    of: str | None = None


def read_dialogues(path: str | Path) -> Source:
    """Read ``locomo10.json``, or ``session_N/test.txt`` of MSC, whose files are named with their folder.

    Raises:
        DataError: no such file, or something in it is not of either form.
    """
    forms = "LoCoMo's form (conversation, qa) or MSC's (dialog, previous_dialogs)"
    found = read_source(path, forms, "name a locomo10.json or an MSC session_N/test.txt", _conversations)
    msc = any(question.category is None for each in found.items for question in each.questions)
    return found._replace(name=f"{Path(path).absolute().parent.name}/{found.name}") if msc else found


def _conversations(raw: bytes, where: list[str]) -> Iterator[Conversation]:
    """LoCoMo is one list of samples, MSC is lines."""
    text = raw.decode("utf-8-sig")
    if text.lstrip().startswith("["):
        for number, sample in enumerate(json.loads(text)):
            where.append(f"sample {number}")
            yield _locomo(number, sample)
        return
    for number, line in enumerate(lines_of(raw), 1):
        where.append(f"line {number}")
        if line.strip():
            yield _msc(number, json.loads(line))


def _locomo(number: int, sample: dict[str, Any]) -> Conversation:
    spoken, sessions, questions = sample["conversation"], [], []
    numbers = (key.removeprefix("session_") for key in spoken if key.startswith("session_"))
    for at in sorted(int(number) for number in numbers if number.isdecimal()):
        lines = [f"DATE: {spoken.get(f'session_{at}_date_time', 'unknown')}", "CONVERSATION:"]
        for turn in spoken[f"session_{at}"]:
            # of a picture, what LoCoMo's own evaluation shows of it
            picture = f" [shares {turn['blip_caption']}]" if turn.get("blip_caption") else ""
            lines.append(f'{turn["speaker"]} said, "{_text(turn["text"])}"{picture}')
        if len(lines) > 2:
            sessions.append("\n".join(lines) + "\n\n")
    for at, qa in enumerate(sample["qa"]):
        category = int(qa["category"])
        named = "adversarial_answer" if category == ADVERSARIAL and "adversarial_answer" in qa else "answer"
        if qa[named] is None:
            raise TypeError(f"the answer of question {at} is null")
        text = qa["question"] + (WITH_DATE if category == TEMPORAL else "")
        questions.append(Question(str(at), CATEGORIES[category], "", text, str(qa[named]).strip(), category))
    return Conversation(str(sample.get("sample_id", number)), tuple(sessions), tuple(questions))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a text is a {type(value).__name__}")
    return value


def _msc(number: int, record: dict[str, Any]) -> Conversation:
    """Earlier sessions, with the time that passed after each; every turn of the last one is a reply to those before."""
    sessions, questions, before = [], [], ""
    for past in record["previous_dialogs"]:
        spoken = "".join(f"{speaker}: {text}\n" for speaker, text in _speakers(past["dialog"]))
        gap = f"({past['time_num']} {past['time_unit']} later)\n" if past.get("time_num") else ""
        sessions.append(f"{spoken}{gap}\n")
    for at, (speaker, text) in enumerate(_speakers(record["dialog"])):
        if text:
            questions.append(Question(str(at), f"session {len(sessions) + 1}", before, f"{speaker}:", text))
        before += f"{speaker}: {text}\n"
    of = (record.get("metadata") or {}).get("initial_data_id")
    return Conversation(f"{of or 'line'}:{number}", tuple(sessions), tuple(questions), None if of is None else str(of))


def _speakers(dialog: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Names and texts; speakers alternate where a turn does not say whose it is."""
    for at, turn in enumerate(dialog):
        yield str(turn.get("id") or f"Speaker {at % 2 + 1}"), " ".join(turn["text"].split())


@dataclass(eq=False, kw_only=True)
class DialogueTask(Task):
    """Questions of LoCoMo, replies of MSC. Groups are LoCoMo's categories and MSC's sessions, units conversations.

    In the window are the newest tokens of the sessions, the session that goes on (MSC), and the question; what of that
    does not fit goes to memory too. A system without memory sees the window alone, the full-context backbone the
    sessions in front of it, as far as they fit.
    """

    name = "dialogue"
    data: Sequence[str]
    recent: int | None = None
    new_tokens: int | None = None
    conversations: int | None = None
    questions: int | None = None
    seed: int = 0
    recall: int = 0
    with_bleu: bool = True

    def __post_init__(self) -> None:
        if self.with_bleu:
            bleu("", "")  # an extra that is missing shows at once
        self.files = [read_dialogues(path) for path in self.data]

    @property
    def metrics(self) -> Sequence[Metric]:
        return (
            Metric("f1", "F1 of words", "%"),
            *([Metric("bleu", "BLEU-4", "%")] if self.with_bleu else []),
            Metric("answer_nats", "reference answer, per token", "nats", "lower"),
        )

    def begin(self, askers: Sequence[Asker]) -> Sequence[Asker]:
        found = super().begin(askers)
        most = max(1, self.window // 4)
        self.near = self.window // 2 if self.recent is None else self.recent
        self.most = self.new_tokens or min(50, most)
        self.answer_tokens = min(128, most)  # of a reference whose likelihood is measured, the first ones
        return found

    def source(self) -> Json:
        rules: Json = {"prompt": ASKED, "adversarial": OFFERED}
        if self.with_bleu:
            rules["bleu"] = f"case:mixed|eff:yes|tok:13a|smooth:exp|version:{metadata.version('sacrebleu')}"
        sizes = {"recent": self.near, "new_tokens": self.most, "answer_tokens": self.answer_tokens}
        return {"files": [file.about() for file in self.files]} | sizes | rules

    def examples(self) -> list[Example]:
        """Items are a conversation, its tokens for memory and for the window, and a question."""
        found = []
        for file in self.files:
            for conversation in file.items[: self.conversations]:
                name = f"{file.name}/{conversation.id}"
                # a conversation whose sessions are in several files is drawn as one
                unit, parts = conversation.of or name, self._parts(conversation)
                for n in drawn(f"{self.seed} {name}", len(conversation.questions), self.questions):
                    question = conversation.questions[n]
                    if question.category == ADVERSARIAL:
                        swapped = random.Random(f"{self.seed} {name} {question.id}").random() < 0.5
                        pair = (question.answer, NOTHING) if swapped else (NOTHING, question.answer)
                        question = question._replace(offered=dict(zip("ab", pair, strict=True)))
                    gold = {"asked": question.words, "expected": question.expected}
                    gold |= {"answer": question.answer, "category": question.category}
                    item = (conversation, *parts, question)
                    found.append(Example(f"{name}/{question.id}", question.group, unit, item, gold))
        return found

    def prompt(self, example: Example, asker: Asker) -> Prompt:
        """To score the reference answer, and to have one generated."""
        conversation, memory, recent, question = example.item
        if notes := notes_on(question.text, "".join(conversation.sessions), self.tokenizer, asker.recall):
            recent = (*encode_after(self.tokenizer, "\n", [f"{notes}\n\n"])[0], *recent)
        (words,) = encode_after(self.tokenizer, "\n", [question.before + question.words])
        (answer,) = encode_after(self.tokenizer, "x:", [f" {question.expected}"])
        context = (*(() if memory else start_tokens(self.tokenizer)), *recent, *words)
        return Prompt((context,), (answer[: self.answer_tokens],), self.most, memory)

    def _parts(self, conversation: Conversation) -> tuple[Tokens, Tokens]:
        """The sessions' tokens: those that only memory holds, and the newest ones, which are in the window."""
        parts = encode_after(self.tokenizer, "\n", list(conversation.sessions))
        tokens = tuple(token for part in parts for token in part)
        cut = max(0, len(tokens) - self.near)
        return (*start_tokens(self.tokenizer), *tokens[:cut]) if cut else (), tokens[cut:]

    def measure(self, example: Example, prompt: Prompt, answer: Answer) -> dict[str, float]:
        (*_, question), (scored,) = example.item, answer.scored
        # an answer ends with the first line that has something on it
        said = next((line.strip() for line in self.said(answer).splitlines() if line.strip()), "")
        words = word_scores(said, question, self.with_bleu)
        return {**words, "answer_nats": -scored.logprobs[0] / len(prompt.options[0])}


def word_scores(said: str, question: Question, with_bleu: bool = True) -> dict[str, float]:
    """``f1`` and ``bleu`` of an answer in %; of an adversarial question ``f1`` is 100 if it was refused, else 0.

    A multi-hop answer is a list by commas: F1 is the mean over its parts of the best part of what was said. LoCoMo's
    own script also stems words and drops ``and``; this does not.
    """
    expected = question.expected
    if question.offered is not None:
        # LoCoMo's rule: a letter, with or without brackets, stands for what it offers
        said, expected = said.strip().lower(), NOTHING
        if len(said) in (1, 3):
            said = question.offered["a" if said in ("a", "(a)") else "b"]
        f1 = float(any(words in said.lower() for words in REFUSALS))
    elif question.category == MULTI_HOP:
        parts, truths = (text.split(",") for text in (said, question.answer))
        f1 = sum(max(f1_score(part, [truth]) for part in parts) for truth in truths) / len(truths)
    else:
        f1 = f1_score(said, [expected])
    return {"f1": 100 * f1} | ({"bleu": bleu(said, expected)} if with_bleu else {})


def bleu(prediction: str, answer: str) -> float:
    """Sentence BLEU-4 (0 to 100) as sacrebleu defines it: 13a tokens, exponential smoothing, effective order.

    Raises:
        ConfigError: sacrebleu is not installed.
    """
    try:
        from sacrebleu import sentence_bleu
    except ImportError as problem:
        raise ConfigError("sacrebleu is not installed; pip install 'longmem-lm[eval]'") from problem
    # a short answer has no four words in a row: orders that cannot occur do not count
    return min(100.0, float(sentence_bleu(prediction, [answer], use_effective_order=True).score))


# facts told in another conversation

IN_WINDOW = "in_window"
TOLD = '{"said": "My boat is the Heron.", "asked": "What is my boat called?", "answer": "It is called the {Heron}."}'
TELLING = 8192  # tokens that a session takes at most, for the size of memory


def read_told(path: str | Path) -> list[ToldFact]:
    """Facts of one's own: JSON lines of the form ``TOLD``, the value in braces.

    Raises:
        DataError: no such file, nothing in it, or a line is not of that form; names it.
    """

    def parse(raw: bytes, where: list[str]) -> Iterator[ToldFact]:
        for number, line in enumerate(lines_of(raw), 1):
            where.append(f"line {number}")
            if not line.strip():
                continue
            fact = json.loads(line)
            parts = re.fullmatch(r"([^{}]*)\{([^{}]+)\}([^{}]*)", fact["answer"])
            if parts is None:
                raise ValueError("the answer has no value in braces")
            yield ToldFact(_text(fact["said"]), _text(fact["asked"]), *parts.groups())

    return read_source(path, f"the form {TOLD}", "name a file of such lines", parse).items


@dataclass(eq=False, kw_only=True)
class FactsTask(Task):
    """Facts of earlier conversations. Groups are tokens of other text between, units are conversations.

    A system with memory reads the conversation that tells ten facts, and then the text between. In a new conversation
    it is asked for each fact by itself. ``in_window`` is the backbone with the telling conversation in its window, and
    no text between: what the model could know at best. Systems named ``+recall`` also have passages in their window
    that text search finds for the question, in the conversation and in the text between. ``told`` is a file of one's
    own facts, ``facts`` of them in each conversation.

    With ``changed``, a second conversation and as much text again follow: it tells every fact with another value, and
    that one is the answer.
    """

    name = "facts"
    text: Sequence[str] = ()
    told: str | None = None
    changed: bool = False
    between: Sequence[int]
    sessions: int
    facts: int
    recall: int
    new_tokens: int
    seed: int = 0

    def __post_init__(self) -> None:
        draw = random.Random(f"{self.seed} facts")
        if self.told is not None and self.changed:
            raise ConfigError("--changed draws another value for each fact, --told has one of its own; leave one away")
        if self.told is not None:
            own = read_told(self.told)
            first = [session_of(own[n : n + self.facts], draw) for n in range(0, len(own), self.facts)]
        else:
            first = [told_session(draw, self.facts, held_out=True) for _ in range(self.sessions)]
        # for each trial the conversations that tell its facts, the newest last
        self.telling = [[each] for each in first]
        for sessions in self.telling if self.changed else ():
            sessions.append(changed_session(sessions[0], draw, held_out=True))

    @property
    def metrics(self) -> Sequence[Metric]:
        older = Metric("older", "greedy answer names the older value", "%", "lower")
        return (
            Metric("value_nats", "value", "nats", "lower"),
            Metric("first_token", "first token of the value is the first choice", "%"),
            Metric("exact", "every token of the value is the first choice", "%"),
            Metric("named", "greedy answer names the value", "%"),
            *([older] if self.changed else []),
        )

    @property
    def remembered(self) -> int:
        return (max(self.between) + TELLING) * (1 + self.changed)

    def begin(self, askers: Sequence[Asker]) -> Sequence[Asker]:
        found, label = super().begin(askers), "backbone, the conversation in its window"
        self.haystack = read_haystack(self.text, self.tokenizer, max(self.between), 1024)
        return [*found, *(replace(a, name=IN_WINDOW, label=label, whole=True) for a in askers if a.name == BACKBONE)]

    def source(self) -> Json:
        told = [session.messages for sessions in self.telling for session in sessions]
        return self.haystack.source() | {"told_digest": digest_of(told)}

    def examples(self) -> list[Example]:
        """Items are the number of a session, one of its facts, and the tokens between."""
        return [
            Example(f"{length}-conversation {at}-{number}", f"{length:,} tokens between", f"conversation {at}",
                    (at - 1, fact, length), {"asked": fact.asked, "expected": fact.value})
            for length in self.between
            for at, sessions in enumerate(self.telling, 1)
            for number, fact in enumerate(sessions[-1].facts)
        ]  # fmt: skip

    def prompt(self, example: Example, asker: Asker) -> Prompt:
        """To score the value where it stands in the answer, and to have the whole answer generated."""
        number, fact, between = example.item
        sessions = self.telling[number]
        books = [self._between(number, between, part) for part in range(len(sessions))]
        before: Sequence[dict[str, str]] = ()
        if asker.name == IN_WINDOW:
            before = [message for session in sessions for message in session.messages]
        elif asker.recall:
            text = ""
            for session, book in zip(sessions, books, strict=True):
                text += transcript(session.messages) + self.tokenizer.decode(book)
                text += "\n" if self.changed else ""  # another conversation may follow
            notes = notes_on(fact.asked, text, self.tokenizer, asker.recall)
            before = ({"role": "system", "content": notes},) if notes else ()
        whole = asked_ids([fact], self.tokenizer, before)
        (first, end), question = whole.values[0], question_ids(fact, self.tokenizer, before)
        contexts, value = (tuple(question), tuple(whole.ids[:first])), tuple(whole.ids[first:end])
        pairs = zip(sessions, books, strict=True)
        read = [token for session, book in pairs for token in (*told_ids(session, self.tokenizer), *book)]
        return Prompt(contexts, (value,), self.new_tokens, () if asker.name == IN_WINDOW else tuple(read))

    def _between(self, session: int, tokens: int, part: int) -> Tokens:
        text = self.haystack.ids.reshape(-1)
        # the first text is the same with ``changed`` and without
        start = random.Random(f"{self.seed} {session} {tokens}{part or ''}").randrange(len(text) - tokens + 1)
        return tuple(text[start : start + tokens].tolist())

    def measure(self, example: Example, prompt: Prompt, answer: Answer) -> dict[str, float]:
        scored, (number, fact, _), said = answer.scored[1], example.item, self.said(answer)
        found = {
            "value_nats": -scored.logprobs[0],
            "first_token": 100.0 * (scored.next_token == prompt.options[0][0]),
            "exact": 100.0 * scored.greedy[0],
            "named": 100.0 * names(said, fact.value),
        }
        if self.changed:
            (older,) = (each.value for each in self.telling[number][0].facts if each.asked == fact.asked)
            found["older"] = 100.0 * names(said, older)
        return found


def names(said: str, value: str) -> bool:
    """Whether an answer has the value in it, as whole words in any case."""
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", said, re.IGNORECASE) is not None
