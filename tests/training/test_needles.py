"""Adaptation to facts that are hidden in memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from tests.training.conftest import Make

from longmem import LongMem
from longmem.data.stream import IGNORE
from longmem.memory import MemoryBank
from longmem.memory.session import SessionMemory
from longmem.training.needles import NeedleStream
from longmem.training.recipe import Recipe
from longmem.training.run import build_trainer, train
from longmem.types import AttentionKV

ASK: dict[str, Any] = {
    "kinds": ["passkey"], "rows": 4, "repeats": 2, "context": 48, "text_tokens": 512, "least_tokens": 32,
    "most_tokens": 256, "grows": 4,
}  # fmt: skip


def _trainer(recipe: Recipe) -> Any:
    return build_trainer(recipe, PartialState(cpu=True), quiet=True)


def test_memory_of_a_question_is_the_common_text_and_its_own_facts_and_no_others(
    adapt: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row finds what a bank of its own finds that was given both."""
    trainer = _trainer(adapt(needles=ASK | {"kinds": ["passkey", "multi"]}))
    assert trainer.bank is None  # of which a run of questions writes nothing
    seen: list[tuple[Any, torch.Tensor, Any]] = []
    search = SessionMemory.search

    def watch(memory: Any, queries: torch.Tensor, num: int, rows: Any = None, **which: Any) -> Any:
        found = search(memory, queries, num, rows, **which)
        seen.append((memory, queries, found))
        return found

    monkeypatch.setattr(SessionMemory, "search", watch)
    loss = trainer.compute_loss(trainer.model, trainer.next_batch())
    assert math.isfinite(float(loss.detach()))
    memory, queries, found = seen[0]
    text = memory.base
    for row in range(4):
        asked = trainer.stream._asked[row]
        alone = MemoryBank.for_model(trainer.longmem, 1, 4096)
        flat = text.storage[0].permute(1, 2, 0, 3, 4).flatten(2, 3)  # (Hkv, 2, tokens, D)
        own = (asked.keys.transpose(0, 1), asked.values.transpose(0, 1))
        for keys, values in ((flat[:, 0], flat[:, 1]), own):
            alone.add(AttentionKV(keys[None], values[None]))
        mine = alone.search(queries[row : row + 1], 2)
        # equal scores may change places, and one product of all keys rounds otherwise than two
        assert torch.allclose(mine.scores[0], found.scores[row], atol=1e-5)
        means = found.keys[row].unflatten(2, (-1, found.chunk_size)).mean(3)  # (H, T, R, D)
        assert torch.allclose(mine.scores[0].sum(-1), (queries[row, ..., None, :] * means).sum((-1, -2)), atol=1e-4)


def test_only_the_answer_is_scored_and_it_is_hidden_in_the_row_s_own_facts(
    adapt: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream: NeedleStream = _trainer(adapt(needles=ASK | {"kinds": ["passkey", "pair", "multi", "twohop"]})).stream
    encoded: list[torch.Tensor] = []
    encode = LongMem.encode
    monkeypatch.setattr(LongMem, "encode", lambda model, ids: (encoded.append(ids), encode(model, ids))[1])
    for number in range(20):
        ids, targets, keys, _ = stream._question(number)
        answer = targets[targets != IGNORE]
        assert encoded[-1].shape[1] == 48 and len(keys) == encoded[-1].numel()
        assert stream.tokenizer.decode(answer).split()[-1] in stream.tokenizer.decode(encoded[-1].flatten())
        assert targets[-len(answer) :].tolist() == answer.tolist()
        assert ids[1:].tolist() == [*ids[1 : -len(answer) + 1].tolist(), *answer[:-1].tolist()]
    batch = stream.next()
    assert batch.ids.shape == batch.targets.shape and len(batch.ids) == 4


def test_memory_grows_from_the_least_to_the_most(adapt: Make) -> None:
    stream = _trainer(adapt(needles=ASK)).stream
    sizes = []
    for number in (0, 2, 4, 9):
        found = []
        for stream.seed in range(8):
            found.append(stream._background(number).capacity_tokens)
        sizes.append(max(found))
    assert sizes[0] == 32
    assert sizes[0] < sizes[1] < sizes[2] == sizes[3] == 256


def test_a_sidenet_goes_on_from_another_one(adapt: Make, backbone_dir: Path) -> None:
    first = adapt("first", optim={"steps": 2}, sidenet={"recency": 1.5})
    train(first, quiet=True)
    start = {"start": str(first.out_dir / "final"), "num_retrieved": 16}
    second = adapt("second", sidenet=start, optim={"steps": 2, "lr": 1e-12, "weight_decay": 0.0})
    train(second, quiet=True)
    models = [LongMem.from_pretrained(run.out_dir / "final") for run in (first, second)]
    assert (models[1].config.num_retrieved, models[1].config.recency) == (16, 1.5), "a recipe may change the first"
    assert models[1].config.backbone_name_or_path == models[0].config.backbone_name_or_path
    for one, two in zip(models[0].trainable_parameters(), models[1].trainable_parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-6)
