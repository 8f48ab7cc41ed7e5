"""Questions to one system: its window, its memory, and nothing of other questions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.family_table import V, make_backbone

from longmem import LongMem, MemoryBank
from longmem.errors import ConfigError
from longmem.evaluation.asking import Asker, Choice, Prompt, Scored, askers
from longmem.evaluation.systems import Comparison

WINDOW = 16
TOKENIZER = SimpleNamespace(eos_token_id=1, pad_token_id=0)


@pytest.fixture(scope="module")
def model() -> LongMem:
    torch.manual_seed(1)
    return LongMem.from_backbone(make_backbone("llama"), chunk_size=4, num_retrieved=8, memory_size=64).eval()


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, V, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def asker(model: Any, *, memory: int | None, rows: int = 4, whole: bool = False, window: int = WINDOW) -> Asker:
    return Asker("it", "it", {}, model, TOKENIZER, window, rows, memory, whole)


def read(model: LongMem, before: list[int], size: int = 64) -> MemoryBank | None:
    if not before:
        return None
    bank = MemoryBank.for_model(model, 1, size)
    for start in range(0, len(before), WINDOW):
        bank.add(model.encode(torch.tensor([before[start : start + WINDOW]])))
    bank.end_document()
    return bank


def by_hand(model: LongMem, before: list[int], local: list[int], option: list[int], size: int = 64) -> float:
    """Alone, from the parts: segments into a bank, then one forward pass."""
    with torch.no_grad():
        ids = torch.tensor([[*local, *option[:-1]]])
        logits = model(ids, memory=read(model, before, size)).logits[0, -len(option) :].log_softmax(-1)
    return logits.gather(1, torch.tensor(option)[:, None]).sum().item()


def choices() -> list[Choice]:
    shared = tuple(text(37, 9))
    return [
        Choice(text(5, 1), [text(1, 2), text(3, 3), text(3, 4)]),
        Choice(text(40, 5), [text(2, 6), text(4, 7)]),
        Choice(text(8, 8), [text(1, 10), text(1, 11)], memory=shared),
        Choice(text(12, 12), [text(1, 13)], memory=shared),
        Choice(text(20, 14), [text(2, 15)], memory=shared),
    ]


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_with_memory_each_option_is_scored_as_if_it_were_alone(model: LongMem, rows: int) -> None:
    asked = choices()
    found = dict(asker(model, memory=64, rows=rows).score(asked))
    assert sorted(found) == list(range(len(asked)))
    for number, question in enumerate(asked):
        room = WINDOW - max(map(len, question.options)) + 1
        cut = max(0, len(question.context) - room)
        before = [*question.memory, *question.context[:cut]]
        expected = [by_hand(model, before, list(question.context[cut:]), list(o)) for o in question.options]
        assert found[number].logprobs == pytest.approx(expected, abs=1e-4)


def test_without_memory_only_the_window_counts(model: LongMem) -> None:
    asked = choices()
    found = dict(asker(model, memory=None).score(asked))
    alone = dict(asker(model, memory=None).score([Choice(q.context[-16:], q.options) for q in asked]))
    for number, question in enumerate(asked):
        assert found[number].logprobs == pytest.approx(alone[number].logprobs, abs=1e-4)
        room = WINDOW - max(map(len, question.options)) + 1
        with_memory = by_hand(model, [], list(question.context)[-room:], list(question.options[0]))
        assert found[number].logprobs[0] == pytest.approx(with_memory, abs=1e-4)


def test_a_full_context_has_memory_in_front_of_the_context(model: LongMem) -> None:
    backbone = model.backbone.model
    memory, context, option = text(30, 1), text(10, 2), text(2, 3)
    ((_, found),) = asker(backbone, memory=None, whole=True, window=64).score(
        [Choice(context, [option], memory=tuple(memory))]
    )
    with torch.no_grad():
        logits = backbone(torch.tensor([[*memory, *context, option[0]]])).logits[0, -2:].log_softmax(-1)
    expected = logits.gather(1, torch.tensor(option)[:, None]).sum().item()
    assert found.logprobs[0] == pytest.approx(expected, abs=1e-4)


def test_the_first_choice_after_the_context_is_known(model: LongMem) -> None:
    context = text(10)
    with torch.no_grad():
        best = int(model(torch.tensor([context])).logits[0, -1].argmax())
    ((_, found),) = asker(model, memory=None).score([Choice(context, [[best], [(best + 1) % V, 5]])])
    assert isinstance(found, Scored)
    assert found.next_token == best
    assert found.greedy == (True, False)


def test_only_what_memory_can_hold_is_read(model: LongMem) -> None:
    memory, context, option = tuple(text(100, 3)), text(6, 4), text(1, 5)
    ((_, found),) = asker(model, memory=24).score([Choice(context, [option], memory=memory)])
    assert found.logprobs[0] == pytest.approx(by_hand(model, list(memory), context, option, size=24), abs=1e-4)


def test_a_prepared_bank_is_read_by_every_question(model: LongMem) -> None:
    before = text(20, 1)
    bank = read(model, before)
    asked = [Choice(text(5, seed), [text(1, seed + 50)]) for seed in range(5)]
    found = dict(asker(model, memory=64, rows=2).score(asked, bank))
    for number, question in enumerate(asked):
        expected = by_hand(model, before, list(question.context), list(question.options[0]))
        assert found[number].logprobs[0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("memory", [None, 64])
def test_continuations_are_those_of_each_prompt_alone(model: LongMem, memory: int | None) -> None:
    shared = tuple(text(24, 9))
    prompts = [Prompt(text(n, n), new, memory=m) for n, new, m in ((3, 4, ()), (9, 2, shared), (30, 4, shared))]
    together = dict(asker(model, memory=memory).generate(prompts))
    for number, prompt in enumerate(prompts):
        ((_, alone),) = asker(model, memory=memory, rows=1).generate([prompt])
        assert together[number] == alone
        room = WINDOW - prompt.max_new_tokens
        cut = max(0, len(prompt.context) - room)
        before = [*prompt.memory, *prompt.context[:cut]] if memory else []
        ids, local, bank = [], list(prompt.context[cut:]), read(model, before)
        for _ in range(prompt.max_new_tokens):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([local]), memory=bank).logits[0, -1].argmax()))
            local.append(ids[-1])
            if ids[-1] == TOKENIZER.eos_token_id:
                break
        assert alone == ids


@pytest.mark.parametrize("options", [[], [[]], [text(WINDOW + 1)]])
def test_options_that_cannot_be_scored_are_refused(model: LongMem, options: list[list[int]]) -> None:
    with pytest.raises(ConfigError, match="every option must have 1 to 16 tokens"):
        list(asker(model, memory=None).score([Choice(text(5), options)]))


def test_every_system_and_the_full_context_is_asked(model: LongMem) -> None:
    found = askers(Comparison.of_longmem(model, [16, 32]), TOKENIZER, window=WINDOW, rows=8, full_context=32)
    assert [each.name for each in found] == ["backbone", "memory_off", "memory_16", "memory_32", "full_32"]
    assert [each.memory_size for each in found] == [None, None, 16, 32, None]
    assert found[-1].rows == 4
    with pytest.raises(ConfigError, match=r"full context \(8\) must be above the window \(16\)"):
        askers(Comparison.of_longmem(model, [16]), TOKENIZER, window=WINDOW, full_context=8)
    with pytest.raises(ConfigError, match="at most the backbone's positions"):
        askers(Comparison.of_longmem(model, [16]), TOKENIZER, window=WINDOW, full_context=1 << 20)
