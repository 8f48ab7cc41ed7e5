"""Prompts to one system: its window, its memory, and nothing of other prompts."""

import random
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tests.evaluation.pairs import by_hand, remembered
from tests.family_table import V, disturbed, make_backbone
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, MambaConfig, MiniMaxConfig, PreTrainedTokenizerFast

from longmem import LongMem
from longmem.data.tokens import start_tokens
from longmem.errors import ConfigError
from longmem.evaluation.asking import Answer, Asker, Prompt, Query, Tokens, _beginnings, _Sequence, encode_after
from longmem.evaluation.systems import systems_of, with_window
from longmem.progress import EVERY

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


def asker(model: Any, *, memory: int | None, rows: int = 4, whole: bool = False, window: int = WINDOW) -> Asker:
    return Asker("it", "it", {}, model, memory, tokenizer=TOKENIZER, window=window, rows=rows, whole=whole)


def asked(asker: Asker, *prompts: Prompt) -> list[Answer]:
    found = dict(asker.ask(prompts))
    return [found[number] for number in range(len(prompts))]


SHARED = text(37, 9)
PROMPTS = [
    Prompt((text(5, 1),), (text(1, 2), text(3, 3), text(3, 4))),
    Prompt((text(40, 5),), (text(2, 6), text(4, 7))),
    Prompt((text(8, 8), text(9, 18)), (text(1, 10), text(1, 11)), memory=SHARED),
    Prompt((text(12, 12),), (text(1, 13),), memory=SHARED),
    Prompt((text(20, 14),), (text(2, 15),), memory=SHARED),
    Prompt((text(8, 8),), (text(1, 10), text(1, 11)), memory=SHARED),
    Prompt((text(9, 15),), tuple(text(1 + number % 4, 20 + number) for number in range(17)), memory=SHARED),
]


@pytest.mark.parametrize(("memory", "rows"), [(64, 1), (64, 3), (64, 16), (None, 4)])
def test_each_option_is_scored_as_if_it_were_alone(model: LongMem, memory: int | None, rows: int) -> None:
    """Behind the window that fits, and what was before it in memory, where there is one."""
    for prompt, answer in zip(PROMPTS, asked(asker(model, memory=memory, rows=rows), *PROMPTS), strict=True):
        room = WINDOW - max(map(len, prompt.options)) + 1
        for context, scored in zip(prompt.contexts, answer.scored, strict=True):
            cut = max(0, len(context) - room)
            bank = remembered(model, (*prompt.memory, *context[:cut])) if memory else None  # type: ignore[misc]
            expected = [by_hand(model, bank, context[cut:], option) for option in prompt.options]
            assert scored.logprobs == pytest.approx(expected, abs=1e-4)
            assert scored.best == expected.index(max(expected))


def test_a_backbone_that_gives_all_logits_scores_the_same(model: LongMem) -> None:
    bare = model.backbone.model
    expected, forward = asked(asker(bare, memory=None), *PROMPTS), type(bare).forward
    with patch.object(type(bare), "forward", lambda self, logits_to_keep=0, **given: forward(self, **given)):
        found = asked(asker(bare, memory=None), *PROMPTS)
    for one, other in zip(expected, found, strict=True):
        for scored, again in zip(one.scored, other.scored, strict=True):
            assert again.logprobs == pytest.approx(scored.logprobs, abs=1e-4)


def test_prompts_that_differ_only_beyond_window_and_memory_are_one(model: LongMem) -> None:
    off, on = asker(model, memory=None), asker(model, memory=64)
    seen, other = (Prompt((text(n, 3)[-20:],), ((5,),)) for n in (20, 21))
    far = Prompt((text(9, 7) + seen.contexts[0],), seen.options)
    assert off.seen(seen) == off.seen(far) != off.seen(other)
    assert on.seen(seen)[0] != on.seen(far)[0]
    assert on.seen(seen)[1] and not on.seen(Prompt((text(3),), ((5,),)))[1]


def test_a_full_context_has_memory_in_front_and_only_what_memory_can_hold_is_read(model: LongMem) -> None:
    memory, context, option = text(100, 1), text(10, 2), text(2, 3)
    whole = asker(model.backbone.model, memory=None, whole=True, window=128)
    (found,) = asked(whole, Prompt((context,), (option,), memory=memory))
    expected = by_hand(model.backbone.model, None, (*memory, *context), option)
    assert found.scored[0].logprobs[0] == pytest.approx(expected, abs=1e-4)
    (found,) = asked(asker(model, memory=24), Prompt((context,), (option,), memory=memory))
    expected = by_hand(model, remembered(model, memory, size=24), context, option)
    assert found.scored[0].logprobs[0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("memory", [None, 64])
def test_continuations_are_those_of_each_prompt_alone(model: LongMem, memory: int | None) -> None:
    shared = text(24, 9)
    prompts = [Prompt((text(n, n),), (), new, m) for n, new, m in ((3, 4, ()), (9, 2, shared), (30, 4, shared))]
    together = asked(asker(model, memory=memory), *prompts)
    for prompt, answer in zip(prompts, together, strict=True):
        (context,), ids = prompt.contexts, list[int]()
        cut = max(0, len(context) - (WINDOW - prompt.new_tokens))
        bank = remembered(model, (*prompt.memory, *context[:cut])) if memory else None  # type: ignore[misc]
        while len(ids) < prompt.new_tokens and TOKENIZER.eos_token_id not in ids:
            with torch.no_grad():
                logits = model(torch.tensor([[*context[cut:], *ids]]), memory=bank).logits
            ids.append(int(logits[0, -1].argmax()))
        assert answer == Answer((), tuple(ids))


@pytest.mark.parametrize(
    ("prompt", "line"),
    [
        (Prompt((text(5),), (text(WINDOW + 1),)), "every option must have 1 to 16 tokens .* not 17"),
        (Prompt((text(5),), new_tokens=WINDOW), r"new tokens \(16\) must be fewer than the window \(16\)"),
    ],
)
def test_prompts_that_cannot_be_asked_are_refused(model: LongMem, prompt: Prompt, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        asked(asker(model, memory=None), prompt)


def test_a_full_context_is_the_backbone_with_as_many_tokens_in_a_batch(model: LongMem) -> None:
    alone = systems_of(model, tokenizer=TOKENIZER, window=WINDOW)[0]
    full = with_window(alone, 32, whole=True)
    assert (full.name, full.label, full.rows) == ("full_32", "backbone, full context of 32", 4)
    for size, whole, way_out in ((8, True, "--full-context"), (8, False, "--windows"), (1 << 20, False, "--windows")):
        line = rf" \({size}\) must be above .* at most the backbone's positions \(128\); change {way_out}"
        with pytest.raises(ConfigError, match=line):
            with_window(alone, size, whole=whole)


def test_tokens_are_those_of_the_joined_text(byte_tokenizer: Any) -> None:
    assert encode_after(byte_tokenizer, ".", [" ab", ""]) == [tuple(byte_tokenizer(" ab")["input_ids"]), ()]
    assert start_tokens(byte_tokenizer) == ()
    # like Llama's: a space sign stands before every text, and so must be none where a text goes on
    vocabulary = {token: number for number, token in enumerate("▁ab.")}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    spaced = PreTrainedTokenizerFast(tokenizer_object=inner)
    assert spaced("ab")["input_ids"] == [0, 1, 2]
    assert encode_after(spaced, "a.", ["b", " a"]) == [(2,), (0, 1)]


@pytest.mark.parametrize("memory", [None, 64])
def test_what_begins_alike_is_read_once_and_scored_as_if_it_were_alone(
    model: LongMem, memory: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two memories in one bank, contexts of which one begins another, options that begin alike too."""
    options = (
        *((number, 3) for number in range(3, 8)),
        *((9, 9, number) for number in (4, 5, 6)),
        *((9, 9, 8, n) for n in (4, 5)),
    )
    told, shots = [text(20, seed) if memory else () for seed in (5, 6)], text(11, 1)
    prompts = [Prompt((shots, (*shots, 4)), options, memory=each) for each in told]
    system, tokens = asker(model, memory=memory, rows=64), list[int]()
    model.register_forward_pre_hook(lambda _, __, given: tokens.append(given["input_ids"].numel()), with_kwargs=True)
    shared, once = asked(system, *prompts), sum(tokens)
    monkeypatch.setattr("longmem.evaluation.asking._beginnings", lambda sequences, row: [(sequences, 0)])
    alone = asked(system, *prompts)
    assert once < 0.5 * (sum(tokens) - once)
    for mine, other in zip(shared, alone, strict=True):
        for one, same in zip(mine.scored, other.scored, strict=True):
            assert one.logprobs == pytest.approx(same.logprobs, abs=1e-4)
            assert one[1:] == same[1:]


def test_sequences_share_no_more_than_they_may() -> None:
    """What all of a group begin with, over one memory, without the last token of any context."""
    draw, row = random.Random(0), {(): 0, (1,): 1}
    for _ in range(300):
        shots = [tuple(draw.choices((3, 4), k=draw.randrange(1, 20))) for _ in range(2)]
        sequences = []
        for number in range(draw.randrange(1, 12)):
            context = (*draw.choice(shots), *draw.choices((3, 4), k=draw.randrange(1, 4)))
            query = Query(draw.choice([*row]), context, (), 0)
            sequences.append(_Sequence(query, (*context, *draw.choices((3, 4), k=draw.randrange(3))), [number]))
        groups = _beginnings(sequences, row)
        assert sorted(each.numbers for some, _ in groups for each in some) == [each.numbers for each in sequences]
        for some, shared in groups:
            if shared:
                assert len({(each.query.memory, each.inputs[:shared]) for each in some}) == 1
                assert shared < min(len(each.query.context) for each in some)
                assert 2 * (len(some) - 1) * shared > sum(len(each.inputs) for each in some)


def test_reading_into_memory_shows_progress(
    model: LongMem, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(EVERY, False, 0.0)
    asker(model, memory=64).read([text(3 * WINDOW), text(5)])
    assert "reading into memory: 2 of 3 segments (66 %)" in capsys.readouterr().err


STATES = {
    "mamba": MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=2, state_size=4),
    "minimax": MiniMaxConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_local_experts=2, block_size=8, layer_types=["linear_attention", "full_attention"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", STATES)
def test_a_model_with_states_in_its_cache_reads_every_beginning_again(kind: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(STATES[kind]).eval()
    prompt = Prompt((text(12, 1),), tuple((number, 5, 3) for number in range(3, 18)))
    (found,) = asked(asker(model, memory=None), prompt)
    expected = [by_hand(model, None, prompt.contexts[0], option) for option in prompt.options]
    assert found.scored[0].logprobs == pytest.approx(expected, abs=1e-4)
