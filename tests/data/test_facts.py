"""Made-up facts: hidden in a text, or told in one conversation and asked for in another."""

import random

import numpy as np
import pytest

from longmem.data.facts import KINDS, OPTIONS, _values, asked_ids, draw_facts, told_ids, told_session
from longmem.data.tokens import train_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}" + TEMPLATE
"""As of models that know no system message."""


@pytest.mark.parametrize("kind", KINDS)
def test_question_and_true_answer_are_said_by_the_facts_and_no_wrong_answer_is(kind: str) -> None:
    for seed in range(30):
        facts = draw_facts(kind, np.random.default_rng(seed))
        assert facts == draw_facts(kind, np.random.default_rng(seed)) != draw_facts(kind, np.random.default_rng(99))
        assert len(set(facts.options)) == OPTIONS
        cue, said = facts.question.strip(), "".join(facts.asked)
        for sentence in facts.answer.split(". "):
            assert sentence.strip() in said
        assert cue + facts.answer.split(".")[0] in said
        assert not any(option.split()[-1] in said for option in facts.options[1:])


@pytest.mark.parametrize(
    ("template", "begins"),
    [(None, "System: Notes\nUser: "), (TEMPLATE, "<system>Notes</><user>"), (STRICT, "<user>Notes\n\n")],
    ids=["none", "plain", "no system message"],
)
def test_the_ids_are_those_of_one_conversation_and_the_spans_those_of_the_values(
    template: str | None, begins: str
) -> None:
    tokenizer = train_tokenizer(["My dog is called Comet.", "What is my dog called?"] * 20, 300)
    tokenizer.chat_template = template
    session = told_session(random.Random(1), 12)
    asked = asked_ids(session.facts, tokenizer, [{"role": "system", "content": "Notes"}])
    text = tokenizer.decode(asked.ids)
    assert text.startswith(begins + session.facts[0].asked)
    for fact, (first, end) in zip(session.facts, asked.values, strict=True):
        assert tokenizer.decode(asked.ids[first:end]).strip() == fact.value
        assert fact.asked in text and fact.before + fact.value + fact.after in text
        assert fact.said in tokenizer.decode(told_ids(session, tokenizer))
    if template:
        assert text.count("<user>") == len(session.facts) == text.count("<assistant>")


def test_what_is_held_out_is_never_trained_on() -> None:
    def drawn(held_out: bool) -> tuple[set[str], set[str]]:
        sessions = [told_session(random.Random(seed), 20, held_out=held_out) for seed in range(200)]
        facts = [fact for session in sessions for fact in session.facts]
        assert all(fact.value in fact.said and "{" not in fact.said + fact.asked for fact in facts)
        return {fact.asked for fact in facts}, {fact.value for fact in facts}

    (asked, values), (held_asked, held_values) = drawn(False), drawn(True)
    assert len(asked) == 84 and len(held_asked) == 21 and not asked & held_asked
    always = {*_values("days", True), *_values("months", True), "piano", "cork"}
    # a number of one range may be a number of another
    assert not {value for value in values & held_values if not value.isdigit()} - always
