"""Laws 4 and 11, and text longer than the window: logits and decoded tokens with memory depend on no cache, padding,
neighbour, part or way of decoding, over the whole family table and every kind of model; nobody's bank is written.
"""

import gc
import re
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tests.family_table import FAMILIES, RECURRENT, filled
from tests.generation.models import KINDS, bank_of, ids, longmem, reader
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, TextIteratorStreamer, pipeline

from longmem import ConfigError, LongMem, MemoryBank, MemoryBankError, MemoryStore
from longmem.generation import read, remember
from longmem.memory.session import SessionMemory

FILLS = (0, 10, 80)  # tokens each row of the bank was given: it is empty, partly filled, and has lost its oldest
PADS = (3, 0, 2)
ROWS = torch.arange(3)
STATIC_FAILS_WITHOUT_US = ("falcon-alibi",)  # the bare backbone fails as well
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
FEW: dict[str, Any] = {**GREEDY, "max_new_tokens": 5}
WINDOW = {"window": 12, "window_move": 6}
FREE: dict[str, Any] = {**WINDOW, **GREEDY, "pad_token_id": None}  # an answer that is read on may hold the pad token


@pytest.fixture(scope="module")
def llama() -> LongMem:
    return longmem("llama")


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
    prompt = ids(3, 8)
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

    mask = torch.cat((torch.zeros(3, 3), torch.ones(3, 8)), dim=1).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = torch.cat((torch.zeros(3, 3, dtype=torch.long), prompt), dim=1)
    out = model(padded, attention_mask=mask, position_ids=positions, memory=bank)
    torch.testing.assert_close(out.logits[:, 3:], whole, atol=1e-5, rtol=0)


def test_beams_of_padded_prompts_are_beams_without_cache(model: Any, bank: MemoryBank) -> None:
    prompt, mask = ids(3, 8), torch.ones(3, 8, dtype=torch.long)
    for row, pads in enumerate(PADS):
        prompt[row, :pads], mask[row, :pads] = 0, 0
    settings = {**FEW, "num_beams": 2, "num_return_sequences": 2, "attention_mask": mask, "memory": bank}
    assert torch.equal(model.generate(prompt, **settings), model.generate(prompt, use_cache=False, **settings))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in RECURRENT])
def test_static_caches_assistants_and_prompt_lookup(name: str) -> None:
    model = longmem(name)
    settings = {**FEW, "memory": bank_of(model)}
    prompt = ids(1, 4).repeat(1, 2)
    plain = model.generate(prompt, use_cache=False, **settings)
    settings["use_cache"] = True  # MPT's own default is none
    assert torch.equal(model.generate(prompt, assistant_model=model.backbone.model, **settings), plain)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=2, **settings), plain)
    if name not in STATIC_FAILS_WITHOUT_US:
        assert torch.equal(model.generate(prompt, cache_implementation="static", **settings), plain)


def test_rows_of_a_bank_a_list_of_banks_and_each_prompt_alone_agree_and_the_bank_is_only_read(
    llama: LongMem,
) -> None:
    bank, texts = bank_of(llama, rows=3), ids(3, 20, seed=7).split(1)
    version, before = bank.version, bank.state_dict()["slots"]["storage"]
    alone = [
        llama.generate(prompt, memory=bank, memory_rows=torch.tensor([row]), **FEW)
        for prompt, row in zip(ids(2, 6).split(1), (2, 0), strict=True)
    ]
    assert torch.equal(llama.generate(ids(2, 6), memory=bank, memory_rows=[2, 0], **FEW), torch.cat(alone))
    banks = [filled(llama, texts[row]) for row in (2, 0)]
    assert torch.equal(llama.generate(ids(2, 6), memory=banks, **FEW), torch.cat(alone))
    for more in ({"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 2}, {"window": 8, "max_new_tokens": 30}):
        rows = llama.generate(ids(2, 6), memory=bank, memory_rows=[2, 0], **{**FEW, **more})
        assert torch.equal(llama.generate(ids(2, 6), memory=banks, **{**FEW, **more}), rows)
    without = llama.generate(ids(2, 6)[1:], **FEW)
    assert torch.equal(llama.generate(ids(2, 6), memory=[banks[0], None], **FEW), torch.cat((alone[0], without)))
    assert not torch.equal(without, alone[1])
    assert bank.version == version and torch.equal(bank.state_dict()["slots"]["storage"], before)


def test_prompts_in_parts_given_caches_processors_and_no_prompt_at_all(llama: LongMem) -> None:
    settings = {**FEW, "memory": bank_of(llama, rows=3)}
    plain = llama.generate(ids(3, 9), **settings)
    assert torch.equal(llama.generate(input_ids=ids(3, 9), prefill_chunk_size=4, **settings), plain)
    more = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 2}
    first = llama.generate(ids(3, 9), **{**settings, **more})
    assert len(first.logits) == 2
    rest = {"past_key_values": first.past_key_values, "max_new_tokens": 3}
    assert torch.equal(llama.generate(first.sequences, **{**settings, **rest}), plain)
    settings |= {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    assert torch.equal(llama.generate(ids(3, 9), **settings), llama.generate(ids(3, 9), use_cache=False, **settings))
    begun = llama.generate(memory=bank_of(llama), bos_token_id=1, **FEW)
    assert torch.equal(begun, llama.generate(torch.tensor([[1]]), memory=bank_of(llama), **FEW))


# text longer than the window


@torch.no_grad()
def reference(
    model: Any, text: list[int], new: int, window: int, move: int, bank: MemoryBank, row: int = 0
) -> list[int]:
    """A row of the batch, greedy: every step a forward over the window alone, in a bank that holds all that left it."""
    rows, text, start = torch.tensor([row]), list(text), 0
    for _ in range(new):
        while len(text) - start > window:
            bank.add(model.encode(torch.tensor([text[start : start + move]])), documents=["after"], rows=rows)
            start += move
        out = model(torch.tensor([text[start:]]), memory=bank, memory_rows=rows)
        text.append(int(out.logits[0, -1].argmax()))
    return text


# the baselines decode as LongMem does; how each of them uses a cache is law 11
BEYOND = [(name, LongMem) for name in FAMILIES] + [(name, kind) for name in ("llama", "qwen3.5") for kind in KINDS[1:]]


@pytest.mark.parametrize(("name", "kind"), BEYOND)
def test_rows_of_unequal_length_go_beyond_the_window_as_each_would_alone_without_any_cache(
    name: str, kind: Any
) -> None:
    """One prompt is read into memory in two pieces, the other fits the window; more of both moves meanwhile."""
    model, prompt, mask = reader(kind, name), ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    prompt[1, :9], mask[1, :9] = 0, 0
    bank = bank_of(model, rows=2)
    got = model.generate(prompt, attention_mask=mask, memory=bank, max_new_tokens=14, **WINDOW, **GREEDY)
    assert bank.tokens.tolist() == [20, 20]
    for row, pads in enumerate((0, 9)):
        whole = bank_of(model, rows=2, capacity=256)
        assert got[row, pads:].tolist() == reference(model, prompt[row, pads:].tolist(), 14, 12, 6, whole, row)


@pytest.mark.parametrize(
    ("settings", "window", "move"),
    [
        ({"window": 12, "window_move": 2}, 12, 2),
        ({"window": 12, "window_move": 10}, 12, 10),
        ({"window": 10}, 10, 4),
        ({}, 128, 64),
        ({"window": 12, "cache_implementation": "static"}, 12, 6),
        ({"window": 12, "use_cache": False}, 12, 6),
        ({"window": 12, "session_tokens": 16}, 12, 6),
        ({"generation_config": GenerationConfig(window=10, **GREEDY)}, 10, 4),  # transformers' own, with one of ours
    ],
    ids=str,
)
def test_every_window_and_cache_gives_the_tokens_of_the_reference(
    llama: LongMem, settings: dict[str, Any], window: int, move: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The window is what the backbone was made for unless told otherwise; a full session drops its oldest."""
    warns = "transformers.generation.stopping_criteria.logger.warning_once"  # of text longer than that: no harm
    monkeypatch.setattr(warns, lambda said: pytest.fail(said))
    settings, streamer = {"return_dict_in_generate": True, "max_new_tokens": 20, **GREEDY, **settings}, Mock()
    out = llama.generate(ids(1, 120), streamer=streamer, output_hidden_states=True, **settings)
    assert len(out.hidden_states) == 20 and len(out.hidden_states[-1]) == 5
    bank = MemoryBank.for_model(llama, capacity_tokens=settings.get("session_tokens", 64))
    assert out.sequences[0].tolist() == reference(llama, ids(1, 120)[0].tolist(), 20, window, move, bank)
    assert [int(put.args[0][-1]) for put in streamer.put.call_args_list[1:]] == out.sequences[0, 120:].tolist()
    cache = out.past_key_values
    assert cache is None or cache.layers[0].keys.shape[2] <= window


def test_a_session_follows_its_text_through_several_calls_and_the_rest_can_be_remembered(llama: LongMem) -> None:
    whole = llama.generate(ids(2, 9), memory=SessionMemory.for_model(llama, rows=2), max_new_tokens=30, **FREE)
    session = SessionMemory.for_model(llama, rows=2)
    size = session.bank.nbytes
    first = llama.generate(ids(2, 9), memory=session, max_new_tokens=11, **FREE)
    assert session.tokens.tolist() == [12, 12]
    assert torch.equal(llama.generate(first, memory=session, max_new_tokens=19, **FREE), whole)
    assert [len(session.followed(row)) for row in range(2)] == [30, 30]
    assert torch.equal(session.followed(1), whole[1, :30]) and session.provenance(0, 3).start_token == 6

    assert [remember(llama, session, whole[1], row=1) for _ in range(2)] == [9, 0]
    assert session.tokens.tolist() == [30, 39]
    longer = torch.cat((whole[1:], ids(1, 20, seed=5)), dim=1)
    llama.generate(longer, memory=session, memory_rows=[1], max_new_tokens=1, **FREE)
    assert session.tokens.tolist() == [30, 51] and torch.equal(session.followed(1), longer[0, :51])
    assert session.bank.nbytes == size
    origins = [session.provenance(1, chunk) for chunk in range(int(session.bank.chunks[1]))]
    assert [(each.start_token, each.length) for each in origins[18:22]] == [(36, 2), (38, 1), (39, 2), (41, 2)]
    assert remember(llama, session, ids(1, 9, seed=6)[0], row=1) == 9 and len(session.followed(1)) == 9


def test_the_pipeline_and_a_streamer_of_transformers_read_memory(
    tiny_backbone: torch.nn.Module, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = longmem(tiny_backbone)
    speak, bank = pipeline("text-generation", model=model, tokenizer=byte_tokenizer), MemoryBank.for_model(model)
    bank.add(model.encode(byte_tokenizer("remembered text", return_tensors="pt").input_ids))
    prompts, settings = ["a short one", "and one that is a good deal longer than that"], {"max_new_tokens": 12}
    settings |= {"do_sample": False, "return_full_text": False}
    together = [answer[0]["generated_text"] for answer in speak(prompts, memory=bank, batch_size=2, **settings)]
    assert together == [speak(prompt, memory=bank, **settings)[0]["generated_text"] for prompt in prompts]
    assert speak(prompts[0], **settings)[0]["generated_text"] != together[0]
    streamer = TextIteratorStreamer(byte_tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = byte_tokenizer(prompts[1], return_tensors="pt")
    model.generate(**ids, memory=bank, streamer=streamer, max_new_tokens=12, do_sample=False)
    assert "".join(streamer) == together[1]
    gc.collect()  # the pipeline leaves a finished iterator behind


def test_sampling_and_several_sequences_of_one_prompt(llama: LongMem) -> None:
    def sampled(**more: Any) -> Tensor:
        torch.manual_seed(5)
        settings = {**GREEDY, **WINDOW, "do_sample": True, "num_return_sequences": 3, "max_new_tokens": 20}
        got: Tensor = llama.generate(ids(2, 8), memory=bank_of(llama, 2), **settings, **more)
        return got

    cached = sampled()
    assert torch.equal(cached, sampled(use_cache=False))
    assert len({tuple(row.tolist()) for row in cached}) == 6
    session = SessionMemory.for_model(llama, rows=2)
    with pytest.raises(MemoryBankError, match="must each follow one text"):
        llama.generate(ids(2, 8), memory=session, num_return_sequences=2, do_sample=True, max_new_tokens=20, **WINDOW)


def test_what_stands_behind_the_end_of_a_text_is_not_remembered(llama: LongMem) -> None:
    settings = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, **WINDOW}
    free = llama.generate(ids(2, 10), memory=bank_of(llama, 2), eos_token_id=None, **settings)
    end = next(int(t) for t in free[0, 13:] if int(t) not in free[1].tolist())  # row 0 ends there, row 1 never
    length = 13 + free[0, 13:].tolist().index(end) + 1
    session = SessionMemory.for_model(llama, bank_of(llama, 2), rows=2)
    got = llama.generate(ids(2, 10), memory=session, eos_token_id=end, **settings)
    assert torch.equal(got[1], free[1]) and torch.equal(got[0, :length], free[0, :length])
    assert (got[0, length:] == 0).all() and length < 40
    for row in range(2):
        moved = session.followed(row)
        assert torch.equal(moved, got[row, : len(moved)]) and end not in moved.tolist()
    assert len(session.followed(1)) == 30 and len(session.followed(0)) <= length


def test_a_whole_text_is_read_into_a_session_under_its_name(llama: LongMem) -> None:
    session, text = SessionMemory.for_model(llama, capacity_tokens=256), ids(1, 153)[0]
    assert read(llama, session, text, document="book") == 153
    expected = MemoryBank.for_model(llama, capacity_tokens=256)
    for segment in text.split(128):
        expected.add(llama.encode(segment[None]), documents=["book"])
    expected.end_document()
    assert session.tokens.tolist() == expected.tokens.tolist() == [153]
    with torch.no_grad():
        logits = [llama(ids(1, 5, seed=4), memory=memory).logits for memory in (session, expected)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)
    assert session.provenance(0, 76).document == "book" and session.provenance(0, 76).length == 1
    assert read(llama, session, text[None, :9], document="as a tokenizer returns it") == 9
    with pytest.raises(MemoryBankError, match=r"ids \(\(2, 7\)\) must be the token ids \(t,\) of one text"):
        remember(llama, session, ids(2, 7))
    some: Any
    for some in ([3, 4, 5], text[:3].numpy().astype("uint32")):  # as a store has them
        assert read(llama, session, some, document="as numbers") == 3
    with pytest.raises(MemoryBankError, match=r"ids \(a str\) must be the token ids \(t,\) of one text"):
        read(llama, session, "words", document="book")  # type: ignore[arg-type]
    with pytest.raises(MemoryBankError, match=r"a text goes to a session, not to a MemoryBank; make Se"):
        read(llama, expected, text, document="book")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a LlamaForCausalLM reads no memory by itself; make a bank"):
        MemoryBank.for_model(llama.backbone.model)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"window": 3}, "window (3) must hold two chunks of 2 tokens; try 4"),
        ({"window": 200}, "window (200) must not exceed the backbone's 128 positions; try 128"),
        ({"window": 12, "window_move": 12}, "window_move (12) must leave something in the window (12); try 6"),
        ({"session_tokens": 31}, "session_tokens (31) must be a multiple of the memory's chunk size (2); try 30"),
        ({"window_move": 5, "session_tokens": 0}, "chunk size (2); try 4; session_tokens (0) must be a multiple"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(llama: LongMem, settings: dict[str, int], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        llama.generate(ids(1, 5), max_new_tokens=3, **settings, **GREEDY)


def test_the_policy_is_saved_with_the_model(llama: LongMem, tmp_path: Path) -> None:
    model = longmem()
    model.generation_config.window, model.generation_config.window_move = 12, 10
    model.save_pretrained(tmp_path)
    loaded = LongMem.from_pretrained(tmp_path, backbone=model.backbone.model)
    got = loaded.generate(ids(1, 20), max_new_tokens=14, **GREEDY)
    assert torch.equal(got, llama.generate(ids(1, 20), max_new_tokens=14, window=12, window_move=10, **GREEDY))


def test_text_that_cannot_move_must_fit_the_window(llama: LongMem) -> None:
    settings = {**WINDOW, **GREEDY, "num_beams": 3, "memory": bank_of(llama)}
    fits = llama.generate(ids(1, 6), max_new_tokens=6, **settings)
    assert torch.equal(fits, llama.generate(ids(1, 6), max_new_tokens=6, **{**settings, "window": None}))
    with pytest.raises(ConfigError, match="beam search takes back"):
        llama.generate(ids(1, 6), max_new_tokens=8, **settings)
    with pytest.raises(ConfigError, match="assisted generation takes back"):
        llama.generate(ids(1, 6), max_new_tokens=8, **{**settings, "num_beams": 1, "prompt_lookup_num_tokens": 3})
    embeds = llama.get_input_embeddings()(ids(1, 5))
    fits = llama.generate(inputs_embeds=embeds, max_new_tokens=6, **WINDOW, **GREEDY)
    assert torch.equal(fits, llama.generate(ids(1, 5), max_new_tokens=6, **GREEDY)[:, 5:])
    with pytest.raises(ConfigError, match="token ids behind inputs_embeds are unknown"):
        llama.generate(inputs_embeds=embeds, max_new_tokens=20, **WINDOW, **GREEDY)
    first = llama.generate(ids(1, 5), max_new_tokens=4, return_dict_in_generate=True, **WINDOW, **GREEDY)
    with pytest.raises(ConfigError, match="behind past_key_values with tokens in it are"):
        llama.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=20, **WINDOW, **GREEDY)


def test_a_batch_over_two_namespaces_of_a_store_keeps_to_its_own(llama: LongMem, tmp_path: Path) -> None:
    with MemoryStore.open(tmp_path / "memory", model=llama, dtype="float32") as store:
        for seed, name in enumerate(("ada", "bob")):
            store.add_document(name, None, name="notes", ids=ids(1, 40, seed=seed + 20)[0])
        sessions = [store.bank(name).session(capacity_tokens=64) for name in ("ada", "bob")]
        together = llama.generate(ids(2, 15), memory=sessions, max_new_tokens=12, **FREE)
        lists = [store.bank(name) for name in ("ada", "bob")]
        assert torch.equal(llama.generate(ids(2, 15), memory=lists, max_new_tokens=12, **FREE), together)
        for row, bank in enumerate(lists):
            alone = llama.generate(ids(2, 15)[row : row + 1], memory=bank, max_new_tokens=12, **FREE)
            assert torch.equal(alone[0], together[row])
