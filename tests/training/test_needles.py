"""Adaptation to facts that are hidden in memory."""

import math
from typing import Any

import pytest
import torch
from accelerate import PartialState
from tests.training.conftest import Make

from longmem import LongMem
from longmem.data.stream import IGNORE
from longmem.training.recipe import Recipe
from longmem.training.run import build_trainer

ASK: dict[str, Any] = {
    "kinds": ["passkey"], "rows": 4, "repeats": 2, "context": 48, "text_tokens": 512, "least_tokens": 32,
    "most_tokens": 256, "grows": 4,
}  # fmt: skip


def _stream(recipe: Recipe) -> Any:
    return build_trainer(recipe, PartialState(cpu=True), quiet=True).stream


def test_memory_of_a_question_is_the_common_text_and_its_own_facts(adapt: Make) -> None:
    recipe = adapt(needles=ASK | {"kinds": ["passkey", "multi"]})
    trainer = build_trainer(recipe, PartialState(cpu=True), quiet=True)
    assert trainer.bank is None  # of which a run of questions writes nothing
    batch = trainer.next_batch()
    assert batch.memory.base.keys.shape[2] * 4 == 32, "one run of text for all rows"
    own = [len(asked.keys) for asked in trainer.stream._asked.values()]
    assert batch.memory.bank.tokens.tolist() == own and len(set(own)) > 1
    assert math.isfinite(float(trainer.compute_loss(trainer.model, batch).detach()))


def test_only_the_answer_is_scored_and_it_is_hidden_in_the_rows_own_facts(
    adapt: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = _stream(adapt(needles=ASK | {"kinds": ["passkey", "pair", "multi", "twohop"]}))
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
    stream = _stream(adapt(needles=ASK))
    sizes = []
    for number in (0, 2, 4, 9):
        found = []
        for stream.seed in range(8):
            found.append(stream._background(number).capacity_tokens)
        sizes.append(max(found))
    assert sizes[0] == 32
    assert sizes[0] < sizes[1] < sizes[2] == sizes[3] == 256
