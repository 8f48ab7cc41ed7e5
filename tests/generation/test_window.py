"""Text longer than the local window: the same tokens as the same steps without any cache, and nobody's bank written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.family_table import FAMILIES
from tests.generation.models import KINDS, bank_of, ids, longmem, reader
from torch import Tensor
from transformers import GenerationConfig

from longmem import ConfigError, LongMem, MemoryBank, MemoryBankError, MemoryStore
from longmem.config import LongMemGenerationConfig
from longmem.generation import read, remember
from longmem.memory.session import SessionMemory

WINDOW = {"window": 12, "window_move": 6}
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
FREE: dict[str, Any] = {**WINDOW, **GREEDY, "pad_token_id": None}  # an answer that is read on may hold the pad token


@pytest.fixture(scope="module")
def llama() -> LongMem:
    return longmem("llama")


@torch.no_grad()
def reference(
    model: Any, prompt: Tensor, new: int, window: int, move: int, bank: MemoryBank | None = None
) -> list[int]:
    """One row, greedy: every step a forward over the window alone, in a memory that holds all that has left it.

    The memory is one bank that began as ``bank_of``, so that no session takes part.
    """
    bank, text, start = bank_of(model, capacity=256) if bank is None else bank, prompt.tolist(), 0
    for _ in range(new):
        while len(text) - start > window:
            bank.add(model.encode(torch.tensor([text[start : start + move]])), documents=["after"])
            start += move
        text.append(int(model(torch.tensor([text[start:]]), memory=bank).logits[0, -1].argmax()))
    return text


# the baselines decode as LongMem does; how each of them uses a cache is law 11
BEYOND = [(name, LongMem) for name in FAMILIES] + [(name, kind) for name in ("llama", "qwen3.5") for kind in KINDS[1:]]


@pytest.mark.parametrize(("name", "kind"), BEYOND)
def test_generating_beyond_the_window_equals_the_same_steps_without_any_cache(name: str, kind: Any) -> None:
    """The prompt is read into memory in two pieces, two more move while 14 tokens are generated."""
    model = reader(kind, name)
    bank = bank_of(model)
    got = model.generate(ids(1, 20), memory=bank, max_new_tokens=14, **WINDOW, **GREEDY)
    assert got[0].tolist() == reference(model, ids(1, 20)[0], 14, 12, 6)
    assert bank.tokens.tolist() == [20]


@pytest.mark.parametrize(
    "settings",
    [
        {"window_move": 2},
        {"window_move": 10},
        {"window_move": 6, "cache_implementation": "static"},
        {"window_move": 6, "use_cache": False},
    ],
    ids=str,
)
def test_every_policy_and_cache_gives_the_tokens_of_the_reference(llama: LongMem, settings: dict[str, Any]) -> None:
    got = llama.generate(ids(1, 5), memory=bank_of(llama), max_new_tokens=30, window=12, **settings, **GREEDY)
    assert got[0].tolist() == reference(llama, ids(1, 5)[0], 30, 12, settings["window_move"])


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "alibi_gpt", "mistral-sliding"])
def test_rows_of_unequal_length_move_when_they_would_alone(name: str) -> None:
    model, pads = longmem(name), (9, 0, 4)
    prompt, mask = ids(3, 17), torch.ones(3, 17, dtype=torch.long)
    for row, count in enumerate(pads):
        prompt[row, :count], mask[row, :count] = 0, 0
    settings = {"max_new_tokens": 12, **WINDOW, **GREEDY}
    bank = bank_of(model, rows=3)
    together = model.generate(prompt, attention_mask=mask, memory=bank, **settings)
    for row, count in enumerate(pads):
        one = torch.tensor([row])
        alone = model.generate(prompt[row : row + 1, count:], memory=bank, memory_rows=one, **settings)
        assert torch.equal(alone[0], together[row, count:])


def test_by_default_the_window_is_what_the_backbone_was_made_for_and_a_full_session_drops_its_oldest(
    llama: LongMem, monkeypatch: pytest.MonkeyPatch
) -> None:
    warns = (
        "transformers.generation.stopping_criteria.logger.warning_once"  # of a text longer than that, which is no harm
    )
    monkeypatch.setattr(warns, lambda said: pytest.fail(said))
    got = llama.generate(ids(1, 120), memory=bank_of(llama), max_new_tokens=20, **GREEDY)
    assert got[0].tolist() == reference(llama, ids(1, 120)[0], 20, 128, 64)
    got = llama.generate(ids(1, 20), max_new_tokens=40, session_tokens=16, **WINDOW, **GREEDY)
    bank = MemoryBank.for_model(llama, capacity_tokens=16)
    assert got[0].tolist() == reference(llama, ids(1, 20)[0], 40, 12, 6, bank=bank)


def test_generating_in_two_calls_with_a_session_is_generating_in_one(llama: LongMem) -> None:
    whole = llama.generate(ids(2, 9), memory=SessionMemory.for_model(llama, rows=2), max_new_tokens=30, **FREE)
    session = SessionMemory.for_model(llama, rows=2)
    first = llama.generate(ids(2, 9), memory=session, max_new_tokens=11, **FREE)
    assert session.tokens.tolist() == [12, 12]
    assert torch.equal(llama.generate(first, memory=session, max_new_tokens=19, **FREE), whole)
    assert [len(session.followed(row)) for row in range(2)] == [30, 30]
    assert torch.equal(session.followed(1), whole[1, :30])
    assert session.provenance(0, 3).start_token == 6


def test_the_rest_of_a_text_can_be_remembered_and_the_text_gone_on_with(llama: LongMem) -> None:
    session = SessionMemory.for_model(llama)
    text = llama.generate(ids(1, 20), memory=session, max_new_tokens=5, **FREE)
    assert session.tokens.tolist() == [12]
    assert remember(llama, session, text[0]) == 13 and session.tokens.tolist() == [25]
    assert remember(llama, session, text[0]) == 0 and session.tokens.tolist() == [25]
    longer = torch.cat((text, ids(1, 20, seed=5)), dim=1)
    llama.generate(longer, memory=session, max_new_tokens=1, **FREE)
    assert session.tokens.tolist() == [37] and torch.equal(session.followed(0), longer[0, :37])
    origins = [session.provenance(0, chunk) for chunk in range(int(session.bank.chunks[0]))]
    assert [(each.start_token, each.length) for each in origins[11:15]] == [(22, 2), (24, 1), (25, 2), (27, 2)]
    assert remember(llama, session, ids(1, 9, seed=6)[0]) == 9 and len(session.followed(0)) == 9


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


@pytest.mark.parametrize(
    ("mode", "says"),
    [({"num_beams": 3}, "beam search takes back"), ({"prompt_lookup_num_tokens": 3}, "assisted generation takes back")],
)
def test_what_takes_tokens_back_must_fit_the_window(llama: LongMem, mode: dict[str, int], says: str) -> None:
    settings = {**WINDOW, **GREEDY, **mode, "memory": bank_of(llama)}
    fits = llama.generate(ids(1, 6), max_new_tokens=6, **settings)
    assert torch.equal(fits, llama.generate(ids(1, 6), max_new_tokens=6, **{**settings, "window": None}))
    with pytest.raises(ConfigError, match=says):
        llama.generate(ids(1, 6), max_new_tokens=8, **settings)


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


def test_hidden_states_come_back_and_cache_and_session_stay_within_their_bounds(llama: LongMem) -> None:
    session = SessionMemory.for_model(llama, capacity_tokens=20)
    size, settings = session.bank.nbytes, {"return_dict_in_generate": True, "output_hidden_states": True, **GREEDY}
    out = llama.generate(ids(1, 4), memory=session, max_new_tokens=60, **WINDOW, **settings)
    assert out.past_key_values.get_seq_length() <= 12 and out.sequences.shape == (1, 64)
    assert session.tokens.tolist() == [20] and session.bank.nbytes == size
    assert len(out.hidden_states) == 60 and len(out.hidden_states[0]) == 5 and out.hidden_states[0][0].shape[-1] == 32


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
    again = SessionMemory.for_model(llama, capacity_tokens=256)
    assert read(llama, again, text[None], document="book") == 153, "as a tokenizer returns it"
    with pytest.raises(MemoryBankError, match=r"ids \(\(2, 7\)\) must be the token ids \(t,\) of one text"):
        remember(llama, again, ids(2, 7))
    with pytest.raises(MemoryBankError, match=r"ids .a list. must be the token ids"):
        read(llama, again, [1, 2], document="book")  # type: ignore[arg-type]
    with pytest.raises(MemoryBankError, match=r"a text goes to a session, not to a MemoryBank; make Se"):
        read(llama, expected, text, document="book")  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"a LlamaForCausalLM reads no memory by itself; make a bank for LongMem.from"
    ):
        MemoryBank.for_model(llama.backbone.model)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"window": 3}, "window (3) must hold two chunks of 2 tokens; try 4"),
        ({"window": 200}, "window (200) must not exceed the backbone's 128 positions"),
        ({"window_move": 5}, "window_move (5) must be a multiple of the memory's chunk size (2); try 4"),
        ({"window": 12, "window_move": 12}, "window_move (12) must leave something in the window (12); try 6"),
        ({"session_tokens": 31}, "session_tokens (31) must be a multiple of the memory's chunk size (2); try 30"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(llama: LongMem, settings: dict[str, int], says: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        llama.generate(ids(1, 5), max_new_tokens=3, **settings, **GREEDY)
    assert says in str(refusal.value)


def test_the_policy_is_saved_with_the_model(llama: LongMem, tmp_path: Path) -> None:
    model = longmem("llama")
    model.generation_config.window, model.generation_config.window_move = 12, 6
    model.backbone.model.save_pretrained(tmp_path / "backbone")
    model.save_pretrained(tmp_path / "side")
    loaded = LongMem.from_pretrained(tmp_path / "side", backbone=tmp_path / "backbone")
    assert isinstance(loaded.generation_config, LongMemGenerationConfig)
    assert loaded.generation_config.window == 12
    got = loaded.generate(ids(1, 20), memory=bank_of(loaded), max_new_tokens=14, **GREEDY)
    assert got[0].tolist() == reference(llama, ids(1, 20)[0], 14, 12, 6)
    plain = GenerationConfig(max_new_tokens=14, window=10, **GREEDY)  # transformers' own, with one of ours in it
    got = loaded.generate(ids(1, 20), memory=bank_of(loaded), generation_config=plain)
    assert got[0].tolist() == reference(llama, ids(1, 20)[0], 14, 10, 6)


def test_embeddings_and_filled_caches_cannot_leave_the_window(llama: LongMem) -> None:
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
