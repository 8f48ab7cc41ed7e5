"""Facts that are told in one conversation and asked for in another."""

from __future__ import annotations

import random

import pytest
from transformers import PreTrainedTokenizerFast

from longmem.data.tokens import train_tokenizer
from longmem.data.told import _kinds, _values, asked_ids, told_ids, told_session

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module", params=[None, TEMPLATE], ids=["plain", "template"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    made = train_tokenizer(["My dog is called Comet.", "What is my dog called?"] * 20, 300)
    made.chat_template = request.param
    return made


def test_the_ids_are_those_of_one_conversation_and_the_spans_those_of_the_values(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    session = told_session(random.Random(1), 12)
    asked = asked_ids(session.facts, tokenizer)
    text = tokenizer.decode(asked.ids)
    for fact, (first, end) in zip(session.facts, asked.values, strict=True):
        assert tokenizer.decode(asked.ids[first:end]).strip() == fact.value
        assert fact.asked in text and fact.before + fact.value + fact.after in text
        assert fact.said in tokenizer.decode(told_ids(session, tokenizer))
    if tokenizer.chat_template:
        assert text.startswith("<user>") and text.count("<user>") == len(session.facts) == text.count("<assistant>")


def test_what_is_held_out_is_never_trained_on() -> None:
    def drawn(held_out: bool) -> tuple[set[str], set[tuple[str, str]]]:
        sessions = [told_session(random.Random(seed), 20, held_out=held_out) for seed in range(200)]
        facts = [fact for session in sessions for fact in session.facts]
        return {fact.asked for fact in facts}, {fact.value for fact in facts}

    (asked, values), (held_asked, held_values) = drawn(False), drawn(True)
    assert len(asked) == 84 and len(held_asked) == 21 and not asked & held_asked
    shared = set(_values("days", True)) | set(_values("months", True))
    # a number of one range may be a number of another
    assert not {value for value in values & held_values if value not in shared and not value.isdigit()} - {
        "piano",
        "cork",
    }


def test_every_kind_has_one_place_for_its_value() -> None:
    for said, asked, answer, pool in _kinds():
        assert said.count("{}") == answer.count("{}") == 1 and "{" not in asked
        assert len(_values(pool, True)) >= 3 and len(_values(pool, False)) >= 7
