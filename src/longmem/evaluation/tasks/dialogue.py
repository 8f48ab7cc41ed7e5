"""Conversations over several sessions: older sessions are in memory, questions and replies come after them.

Scored by F1 of words, BLEU-4, LoCoMo's rules for its five categories, and the likelihood of the reference answer.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from longmem.errors import ConfigError, DataError
from longmem.evaluation.asking import Answer, Asker, Prompt, Tokens, rereading
from longmem.evaluation.documents import start_tokens
from longmem.evaluation.task import Example, Json, Metric, Task, drawn, numbered, of_form
from longmem.evaluation.tasks.shots import encode_after
from longmem.evaluation.tasks.squad import f1_score
from longmem.store.recall import PlainTexts, Recall

ASKED = "Question: {} Short answer:"
# the words of LoCoMo's own evaluation
OFFERED = " (a) {a} (b) {b}. Select the correct answer by writing (a) or (b)."
NOTHING = "No information available"
REFUSALS = ("no information available", "not mentioned")


CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}
MULTI_HOP, TEMPORAL, OPEN_DOMAIN, ADVERSARIAL = 1, 2, 3, 5
LOCOMO = (
    "LoCoMo's form: conversation and qa, turns with speaker and text, questions with question, category (1 to 5) and "
    "answer (category 5: adversarial_answer)"
)
MSC = "MSC's form: lines with dialog and previous_dialogs, and a text in every turn"
WAY_OUT = "name a locomo10.json or an MSC session_N/test.txt"
WITH_DATE = " Use DATE of CONVERSATION to answer with an approximate date."  # the words of LoCoMo's own evaluation


class Question(NamedTuple):
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


class Conversation(NamedTuple):
    """Sessions, oldest first, each a text with its date and a line for each turn, and what is asked about them.

    ``of`` names the conversation where other files have other parts of it: MSC's sessions.
    """

    id: str
    sessions: tuple[str, ...]
    questions: tuple[Question, ...]
    of: str | None = None


class DialogueFile(NamedTuple):
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
    path, found = Path(path), list[Conversation]()
    with of_form(path, "UTF-8", WAY_OUT):
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    try:
        content = json.loads(text)
    except ValueError:  # more than one JSON object: lines
        content = None
    msc = content is None or (isinstance(content, dict) and "previous_dialogs" in content)
    with of_form(path, MSC if msc else LOCOMO, WAY_OUT) as where:
        if msc:
            # only \n ends a line: people's texts hold other signs that str.splitlines would take for one
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    where.append(f"line {number}")
                    found.append(_msc(number, json.loads(line)))
        else:
            for number, sample in enumerate(content if isinstance(content, list) else [content]):
                where.append(f"sample {number}")
                found.append(_locomo(number, sample))
    found = [conversation for conversation in found if conversation.questions]
    if not found:
        raise DataError(f"{path}: no questions in it; {WAY_OUT}")
    name = f"{path.absolute().parent.name}/{path.name}" if msc else path.name
    return DialogueFile(name, "msc" if msc else "locomo", hashlib.sha256(raw).hexdigest(), found)


def _locomo(number: int, sample: dict[str, Any]) -> Conversation:
    spoken, sessions = sample["conversation"], []
    numbers = (key.removeprefix("session_") for key in spoken if key.startswith("session_"))
    for at in sorted(int(number) for number in numbers if number.isdecimal()):
        if turns := [_turn(turn) for turn in spoken[f"session_{at}"]]:
            heading = f"DATE: {spoken.get(f'session_{at}_date_time', 'unknown')}"
            sessions.append("\n".join([heading, "CONVERSATION:", *turns]) + "\n\n")
    questions = tuple(_question(at, qa) for at, qa in enumerate(sample["qa"]))
    return Conversation(str(sample.get("sample_id", number)), tuple(sessions), questions)


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
        yield str(turn.get("id") or f"Speaker {at % 2 + 1}"), " ".join(_text(turn).split())


class Asked(NamedTuple):
    """A question about a conversation; ``offered``: the two answers that an adversarial one offers."""

    conversation: Conversation
    question: Question
    offered: dict[str, str] | None = None

    @property
    def words(self) -> str:
        """What comes before the answer."""
        if self.question.category is None:
            return self.question.text
        return ASKED.format(self.question.text + ("" if self.offered is None else OFFERED.format(**self.offered)))

    @property
    def expected(self) -> str:
        """The text whose likelihood is measured; of an adversarial question the letter of the right choice."""
        if self.offered is None:
            return reference(self.question.answer, self.question.category)
        return f"({'b' if self.offered['a'] == self.question.answer else 'a'})"


class DialogueTask(Task):
    """Questions of LoCoMo, replies of MSC. Groups are LoCoMo's categories and MSC's sessions, units conversations.

    In the window are the newest tokens of the sessions, the session that goes on (MSC), and the question; what of that
    does not fit goes to memory too. A system without memory sees the window alone, the full-context backbone the
    sessions in front of it, as far as they fit.

    Args:
        files: from ``read_dialogues``.
        recent: tokens of the newest session that are in the window in front of what is asked, for every system.
        new_tokens: of an answer; it also ends at a line end.
        answer_tokens: of a reference whose likelihood is measured, the first ones.
        conversations: of each file, the first ones; None is all.
        questions: of each conversation, drawn with ``seed``; None is all.
        seed: of that draw, and of the order in which adversarial questions offer their answers.
        with_bleu: measure BLEU-4 too, which needs sacrebleu.
        recall: passages of the sessions for the systems ``+recall``, which have them in front of the newest tokens; 0
            leaves those systems out.
    """

    name = "dialogue"

    def __init__(
        self,
        files: Sequence[DialogueFile],
        tokenizer: Any,
        recent: int = 256,
        new_tokens: int = 50,
        answer_tokens: int = 128,
        conversations: int | None = None,
        questions: int | None = None,
        seed: int = 0,
        recall: int = 0,
        with_bleu: bool = True,
    ) -> None:
        names = numbered([file.name for file in files])
        self.files = [file._replace(name=name) for file, name in zip(files, names, strict=True)]
        self.tokenizer, self.seeds = tokenizer, (seed,)
        self.recent, self.new_tokens, self.answer_tokens = recent, new_tokens, answer_tokens
        self.limits = {"conversations": conversations, "questions": questions}
        self.start = start_tokens(tokenizer)
        self.recall, self.with_bleu = recall, with_bleu
        self.metrics = (
            Metric("f1", "F1 of words", "%"),
            *([Metric("bleu", "BLEU-4", "%")] if with_bleu else []),
            Metric("answer_nats", "reference answer, per token", "nats", "lower"),
        )
        self._known: tuple[Conversation, Tokens, Tokens, Recall] | None = None

    def systems(self, askers: Sequence[Asker]) -> list[Asker]:
        return rereading(askers, self.recall)

    @staticmethod
    def sizes(window: int) -> dict[str, int]:
        """What fits: half of the window for the newest session, at most a quarter for an answer."""
        most = max(1, window // 4)
        return {"recent": window // 2, "new_tokens": min(50, most), "answer_tokens": min(128, most)}

    def settings(self) -> Json:
        return {
            "files": {
                file.name: {"kind": file.kind, "sha256": file.sha256, "conversations": len(file.conversations)}
                for file in self.files
            },
            "recent": self.recent,
            "new_tokens": self.new_tokens,
            "answer_tokens": self.answer_tokens,
            **self.limits,
            "seed": self.seeds[0],
            **({"recall": self.recall} if self.recall else {}),
            "prompt": ASKED,
            "adversarial": OFFERED,
            "bleu": f"case:mixed|eff:yes|tok:13a|smooth:exp|version:{metadata.version('sacrebleu')}"
            if self.with_bleu
            else None,
        }

    def examples(self) -> list[Example]:
        found = []
        for file in self.files:
            chosen = file.conversations[: self.limits["conversations"]]
            names = numbered([f"{file.name}/{conversation.id}" for conversation in chosen])
            for name, conversation in zip(names, chosen, strict=True):
                # a conversation whose sessions are in several files is drawn as one
                unit = conversation.of or name
                for n in drawn(f"{self.seeds[0]} {name}", len(conversation.questions), self.limits["questions"]):
                    question, offered = conversation.questions[n], None
                    if question.category == ADVERSARIAL:
                        swapped = random.Random(f"{self.seeds[0]} {name} {question.id}").random() < 0.5
                        pair = (question.answer, NOTHING) if swapped else (NOTHING, question.answer)
                        offered = dict(zip("ab", pair, strict=True))
                    asked = Asked(conversation, question, offered)
                    found.append(Example(f"{name}/{question.id}", question.group, unit, asked))
        return found

    def prompt(self, example: Example, asker: Asker) -> Prompt:
        """To score the reference answer, and to have one generated."""
        asked = example.item
        memory, recent, search = self._sessions(asked.conversation)
        if asker.recall:
            notes, _ = search.notes(asked.question.text, self.tokenizer, asker.recall)
            recent = (*encode_after(self.tokenizer, "\n", [f"{notes}\n\n"])[0], *recent) if notes else recent
        (words,) = encode_after(self.tokenizer, "\n", [asked.question.before + asked.words])
        (answer,) = encode_after(self.tokenizer, "x:", [f" {asked.expected}"])
        context = (*(() if memory else self.start), *recent, *words)
        return Prompt((context,), (answer[: self.answer_tokens],), self.new_tokens, memory)

    def gold(self, example: Example) -> Json:
        asked, question = example.item, example.item.question
        return {
            "asked": asked.words,
            "expected": asked.expected,
            "answer": question.answer,
            "category": question.category,
        }

    def measure(self, example: Example, prompt: Prompt, answer: Answer) -> dict[str, float]:
        question, (scored,) = example.item.question, answer.scored
        text = self.tokenizer.decode(answer.said, skip_special_tokens=True)
        # an answer ends with the first line that has something on it
        said = next((line.strip() for line in text.splitlines() if line.strip()), "")
        words = word_scores(said, question.answer, question.category, example.item.offered, self.with_bleu)
        return {**words, "answer_nats": -scored.logprobs[0] / len(prompt.options[0])}

    def _sessions(self, conversation: Conversation) -> tuple[Tokens, Tokens, Recall]:
        """The sessions' tokens: those that only memory holds, and the newest ones, which are in the window; and the
        search over all of them."""
        if self._known is None or self._known[0] is not conversation:
            parts = encode_after(self.tokenizer, "\n", list(conversation.sessions))
            tokens = tuple(token for part in parts for token in part)
            cut = max(0, len(tokens) - self.recent)
            texts = {str(number): text for number, text in enumerate(conversation.sessions)}
            search = Recall(PlainTexts(texts), "")
            self._known = (conversation, (*self.start, *tokens[:cut]) if cut else (), tokens[cut:], search)
        return self._known[1:]


def word_scores(
    said: str,
    answer: str,
    category: int | None,
    offered: dict[str, str] | None,
    with_bleu: bool = True,
) -> dict[str, float]:
    """``f1`` and ``bleu`` of an answer in %; of an adversarial question ``f1`` is 100 if it was refused, else 0.

    A multi-hop answer is a list by commas: F1 is the mean over its parts of the best part of what was said. LoCoMo's
    own script also stems words and drops ``and``; this does not.
    """
    if category == ADVERSARIAL and offered is not None:
        # LoCoMo's rule: a letter, with or without brackets, stands for what it offers
        plain = said.strip().lower()
        chosen = offered["a" if plain in ("a", "(a)") else "b"] if len(plain) in (1, 3) else plain
        refused = any(words in chosen.lower() for words in REFUSALS)
        return {"f1": 100.0 * refused} | ({"bleu": bleu(chosen, NOTHING)} if with_bleu else {})
    expected = reference(answer, category)
    if category == MULTI_HOP:
        parts, truths = (text.split(",") for text in (said, answer))
        f1 = 100 * sum(max(f1_score(part, [truth]) for part in parts) for truth in truths) / len(truths)
    else:
        f1 = 100 * f1_score(said, [expected])
    return {"f1": f1} | ({"bleu": bleu(said, expected)} if with_bleu else {})


def reference(answer: str, category: int | None) -> str:
    """The answer as it is compared; of an open-domain one what comes before its reason."""
    return answer.split(";")[0].strip() if category == OPEN_DOMAIN else answer


def bleu(prediction: str, answer: str) -> float:
    """Sentence BLEU-4 (0 to 100) as sacrebleu defines it: 13a tokens, exponential smoothing, effective order.

    Raises:
        ConfigError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as problem:
        raise ConfigError("sacrebleu is not installed; pip install 'longmem-lm[eval]'") from problem
    # a short answer has no four words in a row: orders that cannot occur do not count
    return min(100.0, float(BLEU(effective_order=True).sentence_score(prediction, [answer]).score))
