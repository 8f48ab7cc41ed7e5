"""A bank on a store: what it finds, equal to a MemoryBank to the last bit, and what it stops finding."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tests.generation.models import longmem
from tests.store.banks import found_names, ids, make_store, memory_bank, queries, same
from torch import Tensor

from longmem import LongMem
from longmem.errors import MemoryBankError, StoreError
from longmem.memory.index import ExactIndex
from longmem.store import bank as banks
from longmem.store.store import MemoryStore

DOCUMENTS = [(f"letter {number}", ids(21 + 3 * number, seed=number)) for number in range(4)]


@pytest.fixture(scope="module")
def model() -> LongMem:
    return longmem()


@pytest.fixture
def store(tmp_path: Path, model: LongMem) -> Iterator[MemoryStore]:
    with make_store(tmp_path / "memory", model) as made:
        fill(made)
        yield made


def fill(store: MemoryStore, namespace: str = "alice", documents: list[tuple[str, Tensor]] = DOCUMENTS) -> None:
    for number, (name, tokens) in enumerate(documents):
        store.add_document(namespace, ids=tokens, name=name, time=100.0 + number, metadata={"even": number % 2 == 0})


# the same as a bank in memory


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("llama", (3,)),
        ("llama", (1, 3)),
        ("gpt2", (1, 3)),
        ("gemma2", (1, 3)),
        ("qwen3", (1, 3)),
        ("alibi_gpt", (1, 3)),
        ("lfm2", (2, 5)),
    ],
)
def test_a_store_is_searched_and_read_as_a_memory_bank_to_the_last_bit(
    tmp_path: Path, name: str, layers: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longmem.types.PERIOD_TOKENS", 8)  # so that documents are longer
    model = longmem(name, memory_layers=layers)
    model.config.recency = 2.0
    with make_store(tmp_path / "memory", model) as store, make_store(tmp_path / "int8", model, dtype="int8") as small:
        fill(store)
        fill(small)
        bank, twin = store.bank("alice"), memory_bank(store, model, DOCUMENTS)
        assert store.layout.memory_layers == bank.memory_layers == layers
        assert torch.equal(bank.tokens, twin.tokens) and torch.equal(bank.chunks, twin.chunks)
        for chunk in range(int(bank.chunks[0])):
            ours, theirs = bank.provenance(0, chunk), twin.provenance(0, chunk)
            assert ours.number == chunk and ours.document == theirs.document
            assert (ours.start_token, ours.length) == (theirs.start_token, theirs.length)
        for layer in range(len(layers)):
            for length, num in ((1, 4), (7, 4), (3, 200)):
                asked = queries(bank, length=length, heads=2 * bank.heads_kv)
                same(bank.search(asked, num, layer=layer), twin.search(asked, num, layer=layer))
            found = small.bank("alice").search(asked, 5, layer=layer)
            assert torch.equal(found.chunks, bank.search(asked, 5, layer=layer).chunks)
        prompt = ids(12, seed=50)[None]
        logits = model(prompt, memory=bank).logits
        assert torch.equal(logits, model(prompt, memory=twin).logits)
        assert not torch.equal(logits, model(prompt).logits)
        settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        text = model.generate(prompt, memory=bank, **settings)
        assert torch.equal(text, model.generate(prompt, memory=twin, **settings))
        session = bank.session()
        session.add(model.encode(prompt), ids=prompt)
        twin.add(model.encode(prompt), documents=["said"])
        for layer in range(len(layers)):
            both = [each.search(asked, 5, layer=layer).scores for each in (session, twin)]
            torch.testing.assert_close(*both)
        session.commit("said")
        assert "said" in found_names(bank)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_rounded_numbers_are_those_of_a_memory_bank_and_the_chunks_the_same(
    tmp_path: Path, model: LongMem, dtype: str
) -> None:
    with make_store(tmp_path / "memory", model, dtype=dtype) as store, make_store(tmp_path / "exact", model) as exact:
        fill(store)
        bank, full = store.bank("alice"), memory_bank(exact, model, DOCUMENTS)
        ours, theirs = bank.search(queries(bank), 4), full.search(queries(bank), 4)
        assert torch.equal(ours.chunks, theirs.chunks)
        assert torch.equal(ours.scores, theirs.scores)
        for mine, exactly in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            if dtype == "int8":
                torch.testing.assert_close(mine, exactly, atol=float(exactly.abs().max()) / 200, rtol=0)
            else:
                assert torch.equal(mine, exactly.to(getattr(torch, dtype)))


def test_an_empty_bank_equals_no_bank_bit_for_bit(store: MemoryStore, model: LongMem) -> None:
    bank, prompt = store.bank("nobody"), ids(12, seed=3)[None]
    assert bank.tokens.tolist() == [0]
    assert torch.equal(model(prompt, memory=bank).logits, model(prompt).logits)


# opening


def test_opening_reads_nothing_and_a_search_keys_and_what_it_finds(store: MemoryStore) -> None:
    bank = store.bank("alice")
    assert bank.tokens.tolist() == [sum(len(tokens) for _, tokens in DOCUMENTS)]
    assert bank.provenance(0, 5).document == "letter 0"
    assert bank.nbytes == 0
    found = bank.search(queries(bank, length=1), 3)
    assert bank.load() is bank
    assert bank.nbytes == int(bank.chunks) * bank.heads_kv * bank.head_dim * 4
    assert found.storage.shape[1] <= 4 * 3 + 1 and found.storage.shape[2] == 1


# filters


@pytest.mark.parametrize(
    ("selection", "left"),
    [
        ({"documents": ["letter 1", "letter 2"]}, [1, 2]),
        ({"where": {"odd": True}}, []),
        ({"after": 101.0, "before": 103.0, "where": {"even": True}}, [2]),
    ],
)
def test_filters_choose_the_documents_before_the_search(
    store: MemoryStore, model: LongMem, selection: Any, left: list[int]
) -> None:
    bank, twin = store.bank("alice", **selection), memory_bank(store, model, [DOCUMENTS[each] for each in left])
    assert found_names(bank) == {f"letter {number}" for number in left}
    same(bank.search(queries(bank), 5), twin.search(queries(bank), 5))


# forgetting


def test_after_compact_a_bank_reads_on_and_lets_the_old_files_go(store: MemoryStore, model: LongMem) -> None:
    bank = store.bank("alice").load()
    files = weakref.ref(bank._held.stored)
    store.forget("alice", name="letter 0")
    store.compact()
    scores = bank.search(queries(bank), 200).scores
    assert torch.equal(scores, memory_bank(store, model, DOCUMENTS[1:]).search(queries(bank), 200).scores)
    gc.collect()
    assert files() is None, "its mapping would keep bytes that compact has removed"


def test_refresh_reads_only_what_is_new(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = store.bank("alice").load()
    store.forget("alice", name="letter 0")
    bank.search(queries(bank), 1)
    monkeypatch.setattr(banks, "AT_ONCE", 3)
    read, plain = list[int](), banks.read_into
    monkeypatch.setattr(banks, "read_into", lambda *given: (read.append(len(given[2])), plain(*given))[1])
    store.add_document("alice", ids=ids(9, seed=32), name="new")
    assert "new" not in found_names(bank) and read == []
    bank.refresh()
    assert "new" in found_names(bank) and read == [5]
    bank.refresh()
    assert read == [5]
    same(bank.search(queries(bank), 100), store.bank("alice").search(queries(bank), 100))


def test_a_refresh_that_fails_leaves_what_was_forgotten_out(store: MemoryStore) -> None:
    bank = store.bank("alice", documents=["letter 0", "letter 1"]).load()
    store.forget("alice", name="letter 0")
    for _ in range(2):
        with pytest.raises(StoreError, match="letter 0"):
            bank.refresh()
    bank.search(queries(bank), 100)
    assert found_names(bank) == {"letter 1"}


def test_what_cannot_be_read_is_made_up_for_by_the_next_search(store: MemoryStore) -> None:
    bank = store.bank("alice").load()
    store.add_document("alice", ids=ids(9, seed=31), name="first", time=0.0)
    with patch.object(banks, "read_into", side_effect=OSError("gone")), pytest.raises(OSError, match="gone"):
        bank.refresh()
    same(bank.search(queries(bank), 100), store.bank("alice").search(queries(bank), 100))
    store.forget("alice", name="letter 1")
    with patch.object(banks, "read_into", side_effect=OSError("gone")), pytest.raises(OSError, match="gone"):
        bank.search(queries(bank), 100)
    assert found_names(bank) == {"first", "letter 0", "letter 2", "letter 3"}


def test_an_index_hears_of_every_change(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    told = list[Any]()
    monkeypatch.setattr(ExactIndex, "written", lambda _, row, slots: told.append(slots.tolist()))
    monkeypatch.setattr(ExactIndex, "cleared", lambda _, row: told.append("cleared"))
    bank = store.bank("alice", index="exact").load()
    total = int(bank.chunks[0])
    left = total - int(bank._held.begins[1])
    store.forget("alice", name="letter 0")
    bank.search(queries(bank), 1)
    store.add_document("alice", ids=ids(4, seed=31), name="new")
    bank.refresh()
    assert told == ["cleared", [*range(total)], "cleared", [*range(left)], [left, left + 1]]


# provenance


def test_passages_are_the_text_of_a_chunk_in_its_surroundings(
    tmp_path: Path, tiny_backbone: torch.nn.Module, byte_tokenizer: object, made_text: object
) -> None:
    model = longmem(tiny_backbone, chunk_size=4, num_retrieved=16)
    text = made_text(60)
    with MemoryStore.open(tmp_path / "m", model=model, tokenizer=byte_tokenizer, segment_tokens=16) as store:
        store.add_document("alice", text, name="story", metadata={"a": 1}, time=7.0)
        bank = store.bank("alice")
        starts = range(0, len(text), 4)
        for chunk in (0, 3, 64, len(starts) - 1):
            origin = bank.provenance(0, chunk)
            start = 4 * chunk
            assert (origin.document, origin.namespace, origin.time) == ("story", "alice", 7.0)
            passage = bank.passage(origin, around=5)
            assert passage.text == text[start : start + 4]
            assert passage.before == text[max(0, start - 5) : start]
            assert passage.after == text[start + 4 : start + 9]
        store.append("alice", " more to tell", name="story")
        assert bank.passage(origin, around=3).text == text[start:]
        store.add_document("alice", text + "!", name="story", replace=True)
        with pytest.raises(StoreError, match=r"'story' of namespace 'alice' is not there any more"):
            bank.passage(origin)


def test_a_text_is_searched_by_the_heads_of_the_model(
    tmp_path: Path, tiny_backbone: torch.nn.Module, byte_tokenizer: object, made_text: object
) -> None:
    model, query = longmem(tiny_backbone, chunk_size=4, num_retrieved=16), "Who keeps the old map?"
    with MemoryStore.open(tmp_path / "m", model=model, tokenizer=byte_tokenizer, segment_tokens=16) as store:
        for number in range(3):
            store.add_document("alice", made_text(20, number), name=f"story {number}")
        store.add_document("bob", made_text(20, 9), name="secret")
        bank = store.bank("alice")
        hits, every = (bank.search_text(query, top=top) for top in (5, 10_000))
        assert len(hits) == 5 and every[:5] == hits
        assert [hit.share for hit in hits] == sorted((hit.share for hit in hits), reverse=True)
        for hit in hits:
            text, start = store.text("alice", hit.origin.document), hit.origin.start_token
            assert hit.passage.text == text[start : start + 4]
            assert hit.passage.before + hit.passage.text + hit.passage.after in text
        ids = torch.tensor([byte_tokenizer(query, add_special_tokens=False)["input_ids"]])
        shares = [
            part.shape[1] * float(model(part, memory=bank, explain=True).share.mean()) for part in ids.split(16, dim=1)
        ]
        assert sum(hit.share for hit in every) == pytest.approx(sum(shares) / ids.shape[1], rel=1e-4)
        with pytest.raises(StoreError, match="no tokens"):
            bank.search_text("")
    with (
        MemoryStore.open(tmp_path / "m", mode="read") as store,
        pytest.raises(StoreError, match="opened without a model"),
    ):
        store.bank("alice").search_text("old map")


def test_a_bank_is_refused_by_a_model_over_another_backbone(store: MemoryStore) -> None:
    with pytest.raises(MemoryBankError, match="written by backbone"):
        longmem("gpt2")(ids(12)[None], memory=store.bank("alice"))


def test_a_closed_store_closes_its_banks(store: MemoryStore) -> None:
    bank = store.bank("alice").load()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        bank.search(queries(bank), 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_bank_on_a_gpu_finds_what_one_on_the_cpu_finds(tmp_path: Path, model: LongMem, dtype: str) -> None:
    with make_store(tmp_path / "memory", model, dtype=dtype) as store:
        fill(store)
        bank, twin = store.bank("alice", device="cuda"), store.bank("alice")
        for forget in (None, "letter 1"):
            if forget:
                store.forget("alice", name=forget)
            asked = queries(bank, length=5)
            ours, theirs = bank.search(asked.cuda(), 200), twin.search(asked, 200)
            torch.testing.assert_close(ours.scores.cpu(), theirs.scores, atol=1e-4, rtol=1e-4)
            # all are found: in whatever order, together they are the same
            ours, theirs = (found.values * found.mask[..., None] for found in (ours, theirs))
            torch.testing.assert_close(ours.sum(3).cpu().float(), theirs.sum(3).float(), atol=1e-3, rtol=1e-3)
