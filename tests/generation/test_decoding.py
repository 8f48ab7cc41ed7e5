"""Laws 4 and 11: logits and decoded tokens do not depend on caches, padding, neighbours, parts or ways of decoding."""

import gc
from itertools import product
from typing import Any

import pytest
import torch
from tests.family_table import FAMILIES, RECURRENT, filled
from tests.generation.models import KINDS, bank_of, ids, longmem, reader
from transformers import PreTrainedTokenizerFast, pipeline

from longmem import AlibiGPTForCausalLM, MemoryBank

FILLS = (0, 10, 80)  # tokens each row of the bank was given: it is empty, partly filled, and has lost its oldest
PADS = (3, 0, 2)
LENGTH = 8
ROWS = torch.arange(3)
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
STATIC_FAILS_WITHOUT_US = ("falcon-alibi",)  # the bare backbone fails as well


@pytest.fixture(params=product(FAMILIES, KINDS), ids=lambda pair: f"{pair[0]}-{pair[1].__name__}", scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    name, kind = request.param
    return reader(kind, name)


@pytest.fixture(scope="module")
def bank(model: Any) -> MemoryBank:
    made = MemoryBank.for_model(model, rows=3, capacity_tokens=64)
    for row, tokens in enumerate(FILLS):
        if tokens:
            made.add(model.encode(ids(1, tokens, seed=row)), rows=ROWS[row : row + 1])
    assert made.tokens.tolist() == [0, 10, 64]
    return made


@torch.no_grad()
def test_logits_do_not_depend_on_cache_padding_neighbours_or_asking_twice(model: Any, bank: MemoryBank) -> None:
    prompt = ids(3, LENGTH)
    whole = model(prompt, memory=bank).logits
    assert torch.equal(model(prompt, memory=bank).logits, whole)

    first = model(prompt[:, :5], memory=bank, use_cache=True)
    steps, cache = [first.logits], first.past_key_values
    for token in prompt[:, 5:].split(1, dim=1):
        steps.append(model(token, memory=bank, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-5, rtol=0)

    for row in range(3):
        alone = model(prompt[row : row + 1], memory=bank, memory_rows=ROWS[row : row + 1]).logits
        torch.testing.assert_close(alone[0], whole[row], atol=1e-5, rtol=0)

    mask = torch.cat((torch.zeros(3, 3), torch.ones(3, LENGTH)), dim=1).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = torch.cat((torch.zeros(3, 3, dtype=torch.long), prompt), dim=1)
    out = model(padded, attention_mask=mask, position_ids=positions, memory=bank)
    torch.testing.assert_close(out.logits[:, 3:], whole, atol=1e-5, rtol=0)


def test_generation_does_not_depend_on_cache_padding_or_neighbours(model: Any, bank: MemoryBank) -> None:
    """Prompts of unequal lengths; what is padded in the batch is not padded alone."""
    prompt, mask = ids(3, LENGTH), torch.ones(3, LENGTH, dtype=torch.long)
    for row, pads in enumerate(PADS):
        prompt[row, :pads], mask[row, :pads] = 0, 0
    settings = {**GREEDY, "memory": bank}
    together = model.generate(prompt, attention_mask=mask, **settings)
    assert torch.equal(together, model.generate(prompt, attention_mask=mask, use_cache=False, **settings))
    for row, pads in enumerate(PADS):
        alone = model.generate(prompt[row : row + 1, pads:], memory_rows=ROWS[row : row + 1], **settings)
        assert torch.equal(alone[0], together[row, pads:])
    settings |= {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 4}
    assert torch.equal(model.generate(ids(3, 6), **settings), model.generate(ids(3, 6), use_cache=False, **settings))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in RECURRENT])
def test_static_caches_assistants_and_prompt_lookup(name: str) -> None:
    model = longmem(name)
    settings = {**GREEDY, "memory": bank_of(model)}
    prompt = ids(1, 4).repeat(1, 2)
    plain = model.generate(prompt, use_cache=False, **settings)
    settings["use_cache"] = True  # MPT's own default is none
    assert torch.equal(model.generate(prompt, assistant_model=model.backbone.model, **settings), plain)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=2, **settings), plain)
    if name not in STATIC_FAILS_WITHOUT_US:
        assert torch.equal(model.generate(prompt, cache_implementation="static", **settings), plain)


def test_rows_of_a_bank_a_list_of_banks_and_each_prompt_alone_agree_and_the_bank_is_only_read() -> None:
    llama = longmem()
    bank, texts = bank_of(llama, rows=3), ids(3, 20, seed=7).split(1)
    version, before = bank.version, bank.state_dict()["slots"]["storage"]
    alone = [
        llama.generate(prompt, memory=bank, memory_rows=torch.tensor([row]), **GREEDY)
        for prompt, row in zip(ids(2, 6).split(1), (2, 0), strict=True)
    ]
    assert torch.equal(llama.generate(ids(2, 6), memory=bank, memory_rows=[2, 0], **GREEDY), torch.cat(alone))
    banks = [filled(llama, texts[row]) for row in (2, 0)]
    assert torch.equal(llama.generate(ids(2, 6), memory=banks, **GREEDY), torch.cat(alone))
    for more in ({"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 2}, {"window": 8, "max_new_tokens": 30}):
        rows = llama.generate(ids(2, 6), memory=bank, memory_rows=[2, 0], **{**GREEDY, **more})
        assert torch.equal(llama.generate(ids(2, 6), memory=banks, **{**GREEDY, **more}), rows)
    without = llama.generate(ids(2, 6)[1:], **GREEDY)
    assert torch.equal(llama.generate(ids(2, 6), memory=[banks[0], None], **GREEDY), torch.cat((alone[0], without)))
    assert not torch.equal(without, alone[1])
    assert bank.version == version and torch.equal(bank.state_dict()["slots"]["storage"], before)


def test_prompts_in_parts_given_caches_processors_and_no_prompt_at_all() -> None:
    llama = longmem()
    settings = {**GREEDY, "memory": bank_of(llama, rows=3)}
    plain = llama.generate(ids(3, 9), **settings)
    assert torch.equal(llama.generate(ids(3, 9), prefill_chunk_size=4, **settings), plain)
    more = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 2}
    first = llama.generate(ids(3, 9), **{**settings, **more})
    assert len(first.logits) == 2
    rest = {"past_key_values": first.past_key_values, "max_new_tokens": 3}
    assert torch.equal(llama.generate(first.sequences, **{**settings, **rest}), plain)
    settings |= {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    assert torch.equal(llama.generate(ids(3, 9), **settings), llama.generate(ids(3, 9), use_cache=False, **settings))
    begun = llama.generate(memory=bank_of(llama), bos_token_id=1, **GREEDY)
    assert torch.equal(begun, llama.generate(torch.tensor([[1]]), memory=bank_of(llama), **GREEDY))


def test_the_text_generation_pipeline(
    tiny_backbone: AlibiGPTForCausalLM, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    speaking = longmem(tiny_backbone)
    speak = pipeline("text-generation", model=speaking, tokenizer=byte_tokenizer)
    settings = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    bank = MemoryBank.for_model(speaking)
    bank.add(speaking.encode(byte_tokenizer("remembered text", return_tensors="pt").input_ids))
    prompts = ["a short one", "and one that is a good deal longer than that"]
    together = [answer[0]["generated_text"] for answer in speak(prompts, memory=bank, batch_size=2, **settings)]
    alone = [speak(prompt, memory=bank, **settings)[0]["generated_text"] for prompt in prompts]
    assert together == alone
    assert speak(prompts[0], **settings)[0]["generated_text"] != alone[0]
    gc.collect()  # the pipeline leaves a finished iterator behind
