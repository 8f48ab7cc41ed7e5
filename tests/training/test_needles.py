"""Adaptation to facts that are hidden in memory."""

import math

import pytest
import torch
from accelerate import PartialState
from tests.training.conftest import ASK, Make

from longmem import LongMem
from longmem.data.stream import IGNORE
from longmem.training.run import build_trainer


def test_only_the_answer_is_scored_and_it_is_hidden_in_the_rows_own_facts_among_the_common_text(
    adapt: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = adapt(needles={**ASK, "kinds": ["passkey", "pair", "multi", "twohop"]})
    trainer = build_trainer(recipe, PartialState(cpu=True), quiet=True)
    assert trainer.bank is None  # of which a run of questions writes nothing
    stream, batch = trainer.stream, trainer.next_batch()
    assert batch.ids.shape == batch.targets.shape and len(batch.ids) == 4
    assert batch.memory.base.keys.shape[2] * 4 == 32, "one run of text for all rows"
    own = [len(asked.keys) for asked in stream._asked.values()]
    assert batch.memory.bank.tokens.tolist() == own and len(set(own)) > 1
    assert math.isfinite(float(trainer.compute_loss(trainer.model, batch).detach()))
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


def test_memory_grows_from_the_least_to_the_most(adapt: Make) -> None:
    stream, largest = build_trainer(adapt(needles=ASK), PartialState(cpu=True), quiet=True).stream, []
    for number in (0, 2, 4, 9):
        sizes = []
        for stream.seed in range(8):
            sizes.append(stream._background(number).capacity_tokens)
        largest.append(max(sizes))
    assert largest[0] == 32
    assert largest[0] < largest[1] < largest[2] == largest[3] == 256
