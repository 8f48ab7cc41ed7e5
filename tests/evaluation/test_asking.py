"""Prompts to one system: its window, its memory, and nothing of other prompts."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.evaluation.pairs import by_hand, remembered
from tests.family_table import V, disturbed, make_backbone
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, MambaConfig, MiniMaxConfig, PreTrainedTokenizerFast

from longmem import LongMem
from longmem.errors import ConfigError
from longmem.evaluation.asking import Answer, Asker, Prompt, Tokens, encode_after
from longmem.evaluation.systems import with_window

WINDOW = 16
TOKENIZER = SimpleNamespace(eos_token_id=1, pad_token_id=0)


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longmem.evaluation.asking._WORTH", 0)
    monkeypatch.setattr("longmem.evaluation.asking._TOGETHER", 4)


@pytest.fixture(scope="module")
def model() -> LongMem:
    torch.manual_seed(1)
    shape = {"chunk_size": 4, "num_retrieved": 8, "memory_size": 64, "memory_layers": (0,), "stride": 1}
    made = LongMem.from_backbone(make_backbone("llama"), **shape)
    return disturbed(made, 0.1, 1).eval()  # type: ignore[no-any-return]


def text(length: int, seed: int = 0) -> Tokens:
    return tuple(torch.randint(3, V, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def asker(model: Any, memory: int | None = None, *, rows: int = 4, window: int = WINDOW, whole: bool = False) -> Asker:
    return Asker("it", "it", {}, model, memory, tokenizer=TOKENIZER, window=window, rows=rows, whole=whole)


def asked(asker: Asker, *prompts: Prompt) -> list[Answer]:
    found = dict(asker.ask(prompts))
    return [found[number] for number in range(len(prompts))]


SHARED = text(100, 9)
PROMPTS = [
    Prompt((text(5, 1),), (text(1, 2), text(3, 3), text(3, 4))),
    Prompt((text(40, 5),), (text(2, 6), text(4, 7))),
    Prompt((text(8, 8), text(9, 18)), (text(1, 10), text(1, 11)), memory=SHARED),
    Prompt((text(12, 12),), (text(1, 13),), memory=SHARED),
    Prompt((text(20, 14),), (text(2, 15),), memory=SHARED),
    Prompt((text(8, 8),), (text(1, 10), text(1, 11)), memory=SHARED),
    Prompt((text(9, 15),), tuple(text(1 + number % 4, 20 + number) for number in range(17)), memory=SHARED),
]


@pytest.mark.parametrize(
    ("memory", "rows", "window", "whole"),
    [(64, 1, 16, False), (24, 3, 16, False), (128, 16, 16, False), (None, 4, 16, False), (None, 4, 128, True)],
)
def test_each_option_is_scored_as_if_it_were_alone(
    memory: int | None, rows: int, window: int, whole: bool, model: LongMem
) -> None:
    """Behind the window that fits, and what was before it in memory, where there is one, as far as that holds it."""
    answers = asked(asker(model, memory, rows=rows, window=window, whole=whole), *PROMPTS)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        for context, scored in zip(prompt.contexts, answer.scored, strict=True):
            local: Any = (*prompt.memory, *context) if whole else context  # type: ignore[misc]
            cut = max(0, len(local) + max(map(len, prompt.options)) - 1 - window)
            bank = remembered(model, (*prompt.memory, *local[:cut]), size=memory) if memory else None  # type: ignore[misc]
            expected = [by_hand(model, bank, local[cut:], option) for option in prompt.options]
            assert scored.logprobs == pytest.approx(expected, abs=1e-4)
            assert scored.best == expected.index(max(expected))


def test_prompts_that_differ_only_beyond_window_and_memory_are_one(model: LongMem) -> None:
    off, on = asker(model), asker(model, 64)
    seen, other = (Prompt((text(n, 3)[-20:],), ((5,),)) for n in (20, 21))
    far = Prompt((text(9, 7) + seen.contexts[0],), seen.options)
    assert off.seen(seen) == off.seen(far) != off.seen(other)
    assert on.seen(seen)[0] != on.seen(far)[0]
    assert on.seen(seen)[1] and not on.seen(Prompt((text(3),), ((5,),)))[1]


@pytest.mark.parametrize("memory", [None, 64])
def test_continuations_are_those_of_each_prompt_alone(model: LongMem, memory: int | None) -> None:
    shared = text(24, 9)
    prompts = [Prompt((text(n, n),), (), new, m) for n, new, m in ((3, 4, ()), (9, 2, shared), (30, 4, shared))]
    for prompt, answer in zip(prompts, asked(asker(model, memory), *prompts), strict=True):
        (context,), ids = prompt.contexts, list[int]()
        cut = max(0, len(context) - (WINDOW - prompt.new_tokens))
        bank = remembered(model, (*prompt.memory, *context[:cut])) if memory else None  # type: ignore[misc]
        while len(ids) < prompt.new_tokens and TOKENIZER.eos_token_id not in ids:
            with torch.no_grad():
                logits = model(torch.tensor([[*context[cut:], *ids]]), memory=bank).logits
            ids.append(int(logits[0, -1].argmax()))
        assert answer == Answer((), tuple(ids))


@pytest.mark.parametrize("memory", [None, 64])
def test_what_begins_alike_is_read_once_and_scored_as_if_it_were_alone(
    memory: int | None, model: LongMem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two memories in one bank, contexts of which one begins another, options that begin alike too."""
    options = (
        *((number, 3) for number in range(3, 8)),
        *((9, 9, number) for number in (4, 5, 6)),
        *((9, 9, 8, n) for n in (4, 5)),
    )
    told, shots = [text(20, seed) if memory else () for seed in (5, 6)], text(11, 1)
    prompts = [Prompt((shots, (*shots, 4)), options, memory=each) for each in told]
    system, tokens = asker(model, memory, rows=64), list[int]()
    model.register_forward_pre_hook(lambda _, __, given: tokens.append(given["input_ids"].numel()), with_kwargs=True)
    shared, once = asked(system, *prompts), sum(tokens)
    monkeypatch.setattr("longmem.evaluation.asking._beginnings", lambda sequences, row: [(sequences, 0)])
    alone = asked(system, *prompts)
    assert once < 0.5 * (sum(tokens) - once)
    for mine, other in zip(shared, alone, strict=True):
        for one, same in zip(mine.scored, other.scored, strict=True):
            assert one.logprobs == pytest.approx(same.logprobs, abs=1e-4)
            assert one[1:] == same[1:]


SMALL: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=2, state_size=4),
        MiniMaxConfig(**SMALL, num_local_experts=2, block_size=8, layer_types=["linear_attention", "full_attention"]),
    ],
    ids=["mamba", "minimax"],
)
def test_a_model_with_states_in_its_cache_reads_every_beginning_again(config: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    forward = model.forward
    model.forward = lambda *ids, logits_to_keep=0, **given: forward(
        *ids, **given
    )  # gives all logits, as some models do
    prompt = Prompt((text(12, 1),), tuple((number, 5, 3) for number in range(3, 18)))
    (found,) = asked(asker(model), prompt)
    expected = [by_hand(model, None, prompt.contexts[0], option) for option in prompt.options]
    assert found.scored[0].logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("ask", "line"),
    [
        (lambda it: asked(it, Prompt(((5,),), (text(17),))), "every option must have 1 to 16 tokens .* not 17"),
        (lambda it: asked(it, Prompt(((5,),), new_tokens=16)), r"new tokens \(16\) must be fewer than the window \(16"),
        (lambda it: with_window(it, 8), r"longer window \(8\) must be above the window \(16\)"),
        (lambda it: with_window(it, 129, whole=True), r"at most .* positions \(128\); change --full-context or leave"),
    ],
)
def test_what_has_no_room_is_refused(ask: Callable[[Asker], Any], line: str, model: LongMem) -> None:
    with pytest.raises(ConfigError, match=line):
        ask(asker(model.backbone.model))


def test_tokens_are_those_of_the_joined_text(byte_tokenizer: Any) -> None:
    assert encode_after(byte_tokenizer, ".", [" ab", ""]) == [tuple(byte_tokenizer(" ab")["input_ids"]), ()]
    # like Llama's: a space sign stands before every text, and so must be none where a text goes on
    vocabulary = {token: number for number, token in enumerate("▁ab.")}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    spaced = PreTrainedTokenizerFast(tokenizer_object=inner)
    assert spaced("ab")["input_ids"] == [0, 1, 2]
    assert encode_after(spaced, "a.", ["b", " a"]) == [(2,), (0, 1)]
