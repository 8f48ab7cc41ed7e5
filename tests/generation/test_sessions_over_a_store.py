"""A conversation over a store: read while it runs, a document of the store only when it is committed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.generation.models import ids, longmem

from longmem import MemoryStore
from longmem.generation import remember

SETTINGS: dict[str, Any] = {
    "window": 12,
    "window_move": 6,
    "do_sample": False,
    "pad_token_id": None,
    "eos_token_id": None,
}


def test_a_conversation_over_a_store_is_committed_whole_and_found_by_the_next(tmp_path: Path) -> None:
    model = longmem("llama")
    with MemoryStore.open(tmp_path / "memory", model=model, dtype="float32") as store:
        store.add_document("ada", None, name="before", ids=ids(1, 60, seed=4)[0])
        bank = store.bank("ada")
        plain = model.generate(ids(1, 20), memory=bank, max_new_tokens=10, **SETTINGS)
        assert [each.name for each in store.documents("ada")] == ["before"]

        session = bank.session(capacity_tokens=64)
        said = model.generate(ids(1, 20), memory=session, max_new_tokens=10, **SETTINGS)
        assert torch.equal(said, plain) and session.tokens.tolist() == [18]
        remember(model, session, said[0])
        receipt = session.commit("talk")
        assert receipt.tokens == 30 and session.tokens.tolist() == [0]
        assert {each.name: each.tokens for each in store.documents("ada")} == {"before": 60, "talk": 30}

        readings: list[Any] = []
        model.generate(ids(1, 5, seed=9), memory=store.bank("ada"), max_new_tokens=3, explain=readings, **SETTINGS)
        assert "talk" in {origin.document for each in readings for origin in each.origins.values()}


def test_a_batch_over_two_namespaces_keeps_to_its_own(tmp_path: Path) -> None:
    model = longmem("llama")
    with MemoryStore.open(tmp_path / "memory", model=model, dtype="float32") as store:
        for seed, name in enumerate(("ada", "bob")):
            store.add_document(name, None, name="notes", ids=ids(1, 40, seed=seed + 20)[0])
        sessions = [store.bank(name).session(capacity_tokens=64) for name in ("ada", "bob")]
        together = model.generate(ids(2, 15), memory=sessions, max_new_tokens=12, **SETTINGS)
        lists = [store.bank(name) for name in ("ada", "bob")]
        assert torch.equal(model.generate(ids(2, 15), memory=lists, max_new_tokens=12, **SETTINGS), together)
        for row, bank in enumerate(lists):
            alone = model.generate(ids(2, 15)[row : row + 1], memory=bank, max_new_tokens=12, **SETTINGS)
            assert torch.equal(alone[0], together[row])
