"""A session over documents of a store: the best of both, committed or dropped."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.generation.models import longmem
from tests.store.banks import found_names, ids, make_store, queries
from torch import Tensor

from longmem import LongMem, SessionMemory
from longmem.errors import MemoryBankError, StoreError
from longmem.store.store import MemoryStore

LETTER = ids(21, seed=1)


@pytest.fixture(scope="module")
def model() -> LongMem:
    return longmem()


@pytest.fixture
def store(tmp_path: Path, model: LongMem) -> Iterator[MemoryStore]:
    with make_store(tmp_path / "memory", model) as made:
        made.add_document("alice", ids=LETTER, name="letter", time=1.0)
        yield made


def say(session: SessionMemory, model: LongMem, tokens: Tensor, **settings: object) -> None:
    session.add(model.encode(tokens[None]), ids=tokens[None], **settings)


def test_what_is_said_stays_in_its_session_until_commit(store: MemoryStore, model: LongMem) -> None:
    bank = store.bank("alice")
    session, other = bank.session(), bank.session()
    said = ids(13, seed=20)
    for part in said.split(5):
        say(session, model, part)
    assert store.documents("alice")[0].name == "letter"
    assert other.search(queries(bank), 99).chunk_mask.sum(-1).max() == 11
    receipt = session.commit("talk", source="chat", metadata={"kind": "talk"}, time=5.0)
    assert (receipt.status, receipt.tokens) == ("added", 13)
    document = store.document("alice", "talk")
    assert (document.source, document.metadata, document.added) == ("chat", {"kind": "talk"}, 5.0)
    assert torch.equal(torch.from_numpy(store.token_ids("alice", "talk").astype("int64")), said)
    assert session.tokens.tolist() == [0]
    # it goes on being found, now underneath, once, as a document that was added as a whole
    assert found_names(bank) == {"letter", "talk"}
    assert session.search(queries(bank), 99).chunk_mask.sum(-1).max() == 11 + 7
    store.add_document("bob", ids=said, name="talk")
    ours, theirs = (
        each.search(queries(bank), 50).scores for each in (store.bank("alice", documents=["talk"]), store.bank("bob"))
    )
    assert torch.equal(ours, theirs)


def test_a_full_session_forgets_the_oldest_and_commits_all_also_to_a_document(
    store: MemoryStore, model: LongMem
) -> None:
    session = store.bank("alice").session(capacity_tokens=8, rows=3)
    for part in ids(24, seed=20).split(8):
        say(session, model, part, rows=torch.tensor([1]))
    assert session.tokens.tolist() == [0, 8, 0]
    counts = session.search(queries(session.base, rows=3), 99).chunk_mask.sum(-1)[:, 0, 0]
    assert counts.tolist() == [11, 15, 11]  # each of three conversations reads the one bank underneath
    assert session.commit("letter", row=1, append=True).status == "appended"
    assert store.document("alice", "letter").tokens == 45
    assert session.base.tokens.tolist() == [45]


def test_padding_is_not_part_of_what_is_committed(store: MemoryStore, model: LongMem) -> None:
    session = store.bank("alice").session(rows=2)
    tokens = torch.stack([ids(8, seed=20), ids(8, seed=21)])
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    out = model(tokens, attention_mask=mask, memory=session)
    session.add(out.kv, ids=tokens)
    session.commit("padded", row=1)
    assert store.token_ids("alice", "padded").tolist() == tokens[1, 3:].tolist()


def test_what_cannot_be_committed_is_refused_in_one_line(store: MemoryStore, model: LongMem) -> None:
    session = store.bank("alice").session()
    with pytest.raises(StoreError, match="nothing was added; pass ids= to add"):
        session.commit("talk")
    session.add(model.encode(ids(8, seed=20)[None]))
    with pytest.raises(StoreError, match="tokens were added without their ids; pass ids= to add"):
        session.commit("talk")
    with pytest.raises(MemoryBankError, match=r"ids of \[3\] tokens must be those of the keys, \[8\] real tokens"):
        session.add(model.encode(ids(8, seed=20)[None]), ids=[ids(3)])
    assert session.tokens.tolist() == [8]


def test_a_commit_that_fails_leaves_the_session_as_it_was(store: MemoryStore, model: LongMem) -> None:
    session = store.bank("alice").session()
    say(session, model, ids(8, seed=20))
    with pytest.raises(StoreError, match="another document 'letter'"):
        session.commit("letter")
    assert session.tokens.tolist() == [8]
    assert session.commit("letter", replace=True).status == "replaced"
