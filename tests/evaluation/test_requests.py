"""Questions whose contexts do not fit the window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.family_table import V, make_backbone

from longmem import LongMem, MemoryBank
from longmem.evaluation.requests import Question, Reader

WINDOW = 16


def by_hand(model: LongMem, tokens: list[int], scored: int, window: int) -> float:
    """Log-probability of the last tokens: what does not fit is read in segments into a bank, one text alone."""
    before, inputs = tokens[: max(0, len(tokens) - 1 - window)], tokens[max(0, len(tokens) - 1 - window) : -1]
    bank = MemoryBank.for_model(model, 1, 64)
    for start in range(0, len(before), window):
        bank.add(model.encode(torch.tensor([before[start : start + window]])))
    bank.end_document()
    with torch.no_grad():
        logits = model(torch.tensor([inputs]), memory=bank).logits[0, -scored:].log_softmax(-1)
    return logits.gather(1, torch.tensor(tokens[-scored:])[:, None]).sum().item()


@pytest.fixture(scope="module")
def model() -> LongMem:
    torch.manual_seed(1)
    return LongMem.from_backbone(make_backbone("llama"), chunk_size=4, num_retrieved=8, memory_size=64).eval()


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, V, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_every_question_is_answered_as_if_it_were_alone(rows: int, model: LongMem) -> None:
    lengths = [3, 17, 18, 33, 40, 61]
    texts = [text(length, seed) for seed, length in enumerate(lengths)]
    asked = [[Question.of(number, tokens, 2, WINDOW)] for number, tokens in enumerate(texts)]
    found = {answer.number: answer for answer in Reader(model, WINDOW, rows, 64).answer(asked)}
    assert sorted(found) == list(range(len(texts)))
    for number, tokens in enumerate(texts):
        assert found[number].logprob == pytest.approx(by_hand(model, tokens, 2, WINDOW), abs=1e-4)


def test_questions_about_one_text_go_on_with_its_memory(model: LongMem) -> None:
    tokens, questions = text(60), []
    for number, end in enumerate((20, 30, 59)):
        questions.append(Question.of(number, tokens[: end + 1], 1, WINDOW))
    found = {answer.number: answer.logprob for answer in Reader(model, WINDOW, 2, 64).answer([questions])}
    # the last one has all that lay before it in memory, tail included
    assert found[2] != pytest.approx(by_hand(model, tokens[44:], 1, WINDOW), abs=1e-5)
    again = {a.number: a.logprob for a in Reader(model, WINDOW, 1, 64).answer([questions, [questions[0]]])}
    assert again == pytest.approx(found, abs=1e-5)


def test_the_first_choice_is_known(model: LongMem) -> None:
    tokens = text(10)
    with torch.no_grad():
        best = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
    for last, greedy in ((best, True), ((best + 1) % V, False)):
        (answer,) = Reader(model, WINDOW, 1, None).answer([[Question.of(7, [*tokens, last], 1, WINDOW)]])
        assert (answer.number, answer.greedy) == (7, greedy)


def test_without_memory_the_beginning_is_cut_off(model: LongMem) -> None:
    tokens = text(40)

    def ask(reader: Any, given: list[int]) -> float:
        (answer,) = reader.answer([[Question.of(0, given, 1, WINDOW)]])
        return float(answer.logprob)

    off = Reader(model, WINDOW, 1, None)
    assert ask(off, tokens) == pytest.approx(ask(off, tokens[-WINDOW - 1 :]), abs=1e-6)
    plain = Reader(model.backbone.model, WINDOW, 1, None)
    assert ask(plain, tokens) == pytest.approx(ask(plain, tokens[-WINDOW - 1 :]), abs=1e-6)
    assert ask(Reader(model, WINDOW, 1, 64), tokens) != pytest.approx(ask(off, tokens), abs=1e-4)
