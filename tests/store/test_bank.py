"""A bank on a store: what it finds, equal to a MemoryBank to the last bit, and a session over it, to be committed."""

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

from longmem import LongMem, SessionMemory
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


def fill(store: MemoryStore) -> None:
    for number, (name, tokens) in enumerate(DOCUMENTS):
        store.add_document("alice", ids=tokens, name=name, time=100.0 + number, metadata={"even": number % 2 == 0})


# the same as a bank in memory


@pytest.mark.parametrize(
    ("name", "layers"),
    [("llama", (3,)), ("llama", (1, 3)), ("gemma2", (1, 3)), ("alibi_gpt", (1, 3)), ("lfm2", (2, 5))],
)
def test_a_store_is_searched_and_read_as_a_memory_bank_to_the_last_bit(
    tmp_path: Path, name: str, layers: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longmem.types.PERIOD_TOKENS", 8)  # so that documents are longer
    model = longmem(name, memory_layers=layers)
    model.config.recency = 2.0
    with make_store(tmp_path / "memory", model) as store:
        fill(store)
        bank, twin = store.bank("alice"), memory_bank(store, model, DOCUMENTS)
        assert store.layout.memory_layers == bank.memory_layers == layers
        assert torch.equal(bank.tokens, twin.tokens) and torch.equal(bank.chunks, twin.chunks)
        for chunk in range(int(bank.chunks[0])):
            places = (each.provenance(0, chunk) for each in (bank, twin))
            ours, theirs = ((each.number, each.document, each.start_token, each.length) for each in places)
            assert ours == theirs
        for layer in range(len(layers)):
            for length, num in ((1, 4), (7, 4), (3, 200)):
                asked = queries(bank, length=length, heads=2 * bank.heads_kv)
                same(bank.search(asked, num, layer=layer), twin.search(asked, num, layer=layer))
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
    assert torch.equal(model(prompt, memory=bank).logits, model(prompt).logits)


def test_opening_reads_nothing_and_a_search_keys_and_what_it_finds(store: MemoryStore) -> None:
    bank = store.bank("alice")
    assert bank.tokens.tolist() == [sum(len(tokens) for _, tokens in DOCUMENTS)]
    assert bank.provenance(0, 5).document == "letter 0"
    assert bank.nbytes == 0
    found = bank.search(queries(bank, length=1), 3)
    assert bank.load() is bank
    assert bank.nbytes == int(bank.chunks) * bank.heads_kv * bank.head_dim * 4
    assert found.storage.shape[1] <= 4 * 3 + 1 and found.storage.shape[2] == 1


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


# what becomes of it when the store changes


def test_a_change_reads_and_tells_the_index_only_what_is_new(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, plain = list[Any](), banks.read_into
    monkeypatch.setattr(banks, "read_into", lambda *given: (told.append(len(given[2])), plain(*given)))
    monkeypatch.setattr(ExactIndex, "written", lambda _, row, slots: told.append(slots.tolist()))
    monkeypatch.setattr(ExactIndex, "cleared", lambda _, row: told.append("cleared"))
    bank = store.bank("alice").load()
    assert told == [52, "cleared", [*range(52)]]
    files = weakref.ref(bank._held.stored)
    store.forget("alice", name="letter 0")
    store.compact()
    assert found_names(bank) == {"letter 1", "letter 2", "letter 3"}
    assert told[3:] == [41, "cleared", [*range(41)]]
    gc.collect()
    assert files() is None, "its mapping would keep bytes that compact has removed"
    monkeypatch.setattr(banks, "AT_ONCE", 3)
    store.add_document("alice", ids=ids(9, seed=32), name="new")
    assert "new" not in found_names(bank) and len(told) == 6
    bank.refresh()
    bank.refresh()
    assert told[6:] == [5, [*range(41, 46)]]
    same(bank.search(queries(bank), 100), store.bank("alice").search(queries(bank), 100))


def test_a_refresh_that_fails_leaves_what_was_forgotten_out(store: MemoryStore) -> None:
    bank = store.bank("alice", documents=["letter 0", "letter 1"]).load()
    store.forget("alice", name="letter 0")
    for _ in range(2):
        with pytest.raises(StoreError, match="letter 0"):
            bank.refresh()
    assert found_names(bank) == {"letter 1"}


def test_what_cannot_be_read_is_made_up_for_by_the_next_search(store: MemoryStore) -> None:
    bank, broken = store.bank("alice").load(), patch.object(banks, "read_into", side_effect=OSError("gone"))
    store.add_document("alice", ids=ids(9, seed=31), name="first", time=0.0)
    with broken, pytest.raises(OSError, match="gone"):
        bank.refresh()
    same(bank.search(queries(bank), 100), store.bank("alice").search(queries(bank), 100))
    store.forget("alice", name="letter 1")
    with broken, pytest.raises(OSError, match="gone"):
        bank.search(queries(bank), 100)
    assert found_names(bank) == {"first", "letter 0", "letter 2", "letter 3"}


# texts


def test_a_text_is_searched_by_the_heads_of_the_model_and_shown_in_its_surroundings(
    tmp_path: Path, tiny_backbone: torch.nn.Module, byte_tokenizer: object, made_text: object
) -> None:
    model, query = longmem(tiny_backbone, chunk_size=4, num_retrieved=16), "Who keeps the old map?"
    with MemoryStore.open(tmp_path / "m", model=model, tokenizer=byte_tokenizer, segment_tokens=16) as store:
        for number in range(3):
            store.add_document("alice", made_text(20, number), name=f"story {number}", time=7.0)
        store.add_document("bob", made_text(20, 9), name="secret")
        bank = store.bank("alice")
        hits, every = (bank.search_text(query, top=top, around=5) for top in (5, 10_000))
        assert len(hits) == 5 and every[:5] == hits
        assert [hit.share for hit in hits] == sorted((hit.share for hit in hits), reverse=True)
        for hit in every:
            text, start = store.text("alice", hit.origin.document), hit.origin.start_token
            around = text[max(0, start - 5) : start], text[start : start + 4], text[start + 4 : start + 9]
            assert (hit.passage.before, hit.passage.text, hit.passage.after) == around
        ids = torch.tensor([byte_tokenizer(query, add_special_tokens=False)["input_ids"]])
        shares = [
            part.shape[1] * float(model(part, memory=bank, explain=True).share.mean()) for part in ids.split(16, dim=1)
        ]
        assert sum(hit.share for hit in every) == pytest.approx(sum(shares) / ids.shape[1], rel=1e-4)
        with pytest.raises(StoreError, match="no tokens"):
            bank.search_text("")
        origin, text = bank.provenance(0, int(bank.chunks) - 1), store.text("alice", "story 2")
        assert (origin.document, origin.namespace, origin.time) == ("story 2", "alice", 7.0)
        store.append("alice", " more to tell", name="story 2")
        assert bank.passage(origin, around=3).text == text[origin.start_token :]
        store.add_document("alice", text + "!", name="story 2", replace=True)
        with pytest.raises(StoreError, match=r"'story 2' of namespace 'alice' is not there any more"):
            bank.passage(origin)
    with (
        MemoryStore.open(tmp_path / "m", mode="read") as store,
        pytest.raises(StoreError, match="opened without a model"),
    ):
        store.bank("alice").search_text("old map")


def test_a_bank_is_refused_by_a_model_over_another_backbone_and_closes_with_its_store(store: MemoryStore) -> None:
    bank = store.bank("alice")
    with pytest.raises(MemoryBankError, match="written by backbone"):
        longmem("gpt2")(ids(12)[None], memory=bank)
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


# a session over it


def say(session: SessionMemory, model: LongMem, tokens: Tensor, **settings: object) -> None:
    session.add(model.encode(tokens[None]), ids=tokens[None], **settings)


def test_what_is_said_stays_in_its_session_until_commit(store: MemoryStore, model: LongMem) -> None:
    bank = store.bank("alice")
    session, other, said = bank.session(), bank.session(), ids(13, seed=20)
    for part in said.split(5):
        say(session, model, part)
    assert not store.has("alice", "talk")
    assert other.search(queries(bank), 99).chunk_mask.sum(-1).max() == 52
    receipt = session.commit("talk", source="chat", metadata={"kind": "talk"}, time=5.0)
    assert (receipt.status, receipt.tokens) == ("added", 13)
    document = store.document("alice", "talk")
    assert (document.source, document.metadata, document.added) == ("chat", {"kind": "talk"}, 5.0)
    assert store.token_ids("alice", "talk").tolist() == said.tolist()
    assert session.tokens.tolist() == [0]
    # it goes on being found, now underneath, once, as a document that was added as a whole
    assert "talk" in found_names(bank)
    assert session.search(queries(bank), 99).chunk_mask.sum(-1).max() == 52 + 7
    store.add_document("bob", ids=said, name="talk")
    ours, theirs = store.bank("alice", documents=["talk"]), store.bank("bob")
    assert torch.equal(*(each.search(queries(bank), 50).scores for each in (ours, theirs)))


def test_a_full_session_forgets_the_oldest_and_commits_all_also_to_a_document(
    store: MemoryStore, model: LongMem
) -> None:
    session = store.bank("alice").session(capacity_tokens=8, rows=3)
    for part in ids(24, seed=20).split(8):
        say(session, model, part, rows=torch.tensor([1]))
    assert session.tokens.tolist() == [0, 8, 0]
    counts = session.search(queries(session.base, rows=3), 99).chunk_mask.sum(-1)[:, 0, 0]
    assert counts.tolist() == [52, 56, 52]  # each of three conversations reads the one bank underneath
    assert session.commit("letter 0", row=1, append=True).status == "appended"
    assert store.document("alice", "letter 0").tokens == 45
    assert session.base.tokens.tolist() == [102 + 24]


def test_padding_is_not_part_of_what_is_committed(store: MemoryStore, model: LongMem) -> None:
    session, tokens = store.bank("alice").session(rows=2), ids(16, seed=20).view(2, 8)
    mask = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])
    session.add(model(tokens, attention_mask=mask, memory=session).kv, ids=tokens)
    session.commit("padded", row=1)
    assert store.token_ids("alice", "padded").tolist() == tokens[1, 3:].tolist()


def test_a_commit_that_fails_says_why_and_leaves_the_session_as_it_was(store: MemoryStore, model: LongMem) -> None:
    session, said = store.bank("alice").session(), ids(8, seed=20)
    with pytest.raises(StoreError, match="nothing was added; pass ids= to add"):
        session.commit("talk")
    with pytest.raises(MemoryBankError, match=r"ids of \[3\] tokens must be those of the keys, \[8\] real tokens"):
        session.add(model.encode(said[None]), ids=[ids(3)])
    say(session, model, said)
    with pytest.raises(StoreError, match="another document 'letter 0'"):
        session.commit("letter 0")
    assert session.tokens.tolist() == [8]
    assert session.commit("letter 0", replace=True).status == "replaced"
    session.add(model.encode(said[None]))
    with pytest.raises(StoreError, match="tokens were added without their ids; pass ids= to add"):
        session.commit("talk")
