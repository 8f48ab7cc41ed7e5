"""transformers' ways of decoding, with memory: each gives the tokens it gives without a cache."""

import gc
from threading import Thread
from typing import Any

import pytest
import torch
from tests.family_table import FAMILIES, RECURRENT, filled
from tests.generation.models import bank_of, ids, longmem
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer, pipeline

from longmem import AlibiGPTForCausalLM, LongMem, MemoryBank

GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
STATIC_FAILS_WITHOUT_US = ("falcon-alibi",)  # the bare backbone fails as well


@pytest.fixture(scope="module")
def llama() -> LongMem:
    return longmem("llama")


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


def test_the_memory_is_only_read(llama: LongMem) -> None:
    bank = bank_of(llama)
    version, before = bank.version, bank.state_dict()["slots"]["storage"]
    for more in ({}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}, {"window": 8, "max_new_tokens": 30}):
        llama.generate(ids(1, 12), memory=bank, **{**GREEDY, **more})
    assert bank.version == version and torch.equal(bank.state_dict()["slots"]["storage"], before)


def test_rows_of_a_bank_a_list_of_banks_and_each_prompt_alone_agree(llama: LongMem) -> None:
    bank, texts = bank_of(llama, rows=3), ids(3, 20, seed=7).split(1)
    alone = [
        llama.generate(prompt, memory=bank, memory_rows=torch.tensor([row]), **GREEDY)
        for prompt, row in zip(ids(2, 6).split(1), (2, 0), strict=True)
    ]
    assert torch.equal(llama.generate(ids(2, 6), memory=bank, memory_rows=[2, 0], **GREEDY), torch.cat(alone))
    banks = [filled(llama, texts[row]) for row in (2, 0)]
    assert torch.equal(llama.generate(ids(2, 6), memory=banks, **GREEDY), torch.cat(alone))
    for more in ({"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 2}):
        rows = llama.generate(ids(2, 6), memory=bank, memory_rows=[2, 0], **GREEDY, **more)
        assert torch.equal(llama.generate(ids(2, 6), memory=banks, **GREEDY, **more), rows)
    without = llama.generate(ids(2, 6)[1:], **GREEDY)
    assert torch.equal(llama.generate(ids(2, 6), memory=[banks[0], None], **GREEDY), torch.cat((alone[0], without)))
    assert not torch.equal(without, alone[1])


def test_prompts_read_in_parts_and_no_prompt_at_all(llama: LongMem) -> None:
    bank = bank_of(llama, rows=3)
    plain = llama.generate(ids(3, 9), memory=bank, **GREEDY)
    assert torch.equal(llama.generate(ids(3, 9), memory=bank, prefill_chunk_size=4, **GREEDY), plain)
    begun = llama.generate(memory=bank_of(llama), bos_token_id=1, **GREEDY)
    assert torch.equal(begun, llama.generate(torch.tensor([[1]]), memory=bank_of(llama), **GREEDY))


def test_scores_a_given_cache_and_processors_of_the_whole_text(llama: LongMem) -> None:
    bank = bank_of(llama)
    settings: dict[str, Any] = {**GREEDY, "memory": bank}
    more = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 2}
    first = llama.generate(ids(1, 6), **{**settings, **more})
    assert len(first.logits) == 2
    rest = {"past_key_values": first.past_key_values, "max_new_tokens": 3}
    plain = llama.generate(ids(1, 6), **settings)
    assert torch.equal(llama.generate(first.sequences, **{**settings, **rest}), plain)
    penalised = {**settings, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    assert torch.equal(llama.generate(ids(1, 6), **penalised), llama.generate(ids(1, 6), use_cache=False, **penalised))


@pytest.fixture
def speaking(tiny_backbone: AlibiGPTForCausalLM) -> LongMem:
    """Over bytes; its window is 32."""
    return longmem(tiny_backbone)


def test_streaming_gives_the_text_piece_by_piece(speaking: LongMem, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = byte_tokenizer("a long way to go, longer than the window", return_tensors="pt").input_ids
    streamer = TextIteratorStreamer(byte_tokenizer, skip_prompt=True, timeout=60)
    settings = {**GREEDY, "max_new_tokens": 40, "pad_token_id": byte_tokenizer.pad_token_id}
    thread = Thread(target=speaking.generate, args=(prompt,), kwargs={"streamer": streamer, **settings})
    thread.start()
    pieces = list(streamer)
    thread.join()
    whole = speaking.generate(prompt, **settings)
    assert len(pieces) > 2 and "".join(pieces) == byte_tokenizer.decode(whole[0, prompt.shape[1] :])


def test_the_text_generation_pipeline(speaking: LongMem, byte_tokenizer: PreTrainedTokenizerFast) -> None:
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
