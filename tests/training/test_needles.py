"""Adaptation to facts that are hidden in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState

from longmem import LongMem
from longmem.data.stream import IGNORE
from longmem.errors import ConfigError
from longmem.memory import MemoryBank
from longmem.memory.session import SessionMemory
from longmem.training import needles
from longmem.training.needles import NeedleTrainer
from longmem.training.recipe import Recipe
from longmem.training.run import build_trainer, train

Make = Callable[..., Recipe]
Records = Callable[..., list[dict[str, Any]]]

ASK: dict[str, Any] = {
    "share": 1.0, "rows": 4, "repeats": 2, "context": 48, "text_tokens": 512, "least_tokens": 32, "most_tokens": 256,
    "grows": 4,
}  # fmt: skip


def _task(recipe: Recipe) -> NeedleTrainer:
    trainer = build_trainer(recipe, PartialState(cpu=True), quiet=True)
    assert isinstance(trainer, NeedleTrainer)
    return trainer


def _means(found: Any, row: int) -> torch.Tensor:
    """The mean key of each chunk that a row found, (H, T, R, D)."""
    return found.keys[row].unflatten(2, (-1, found.chunk_size)).mean(3)


def test_memory_of_a_question_is_the_common_text_and_its_own_facts_and_no_others(
    adapt: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row finds what a bank of its own finds that was given both."""
    task = _task(adapt(needles=ASK | {"kinds": ["passkey", "multi"]}))
    seen: list[tuple[Any, torch.Tensor, Any]] = []
    search = SessionMemory.search

    def watch(memory: Any, queries: torch.Tensor, num: int, rows: Any = None, **which: Any) -> Any:
        found = search(memory, queries, num, rows, **which)
        seen.append((memory, queries, found))
        return found

    monkeypatch.setattr(SessionMemory, "search", watch)
    loss = task.compute_loss(task.model, task.next_batch())
    assert math.isfinite(float(loss.detach()))
    memory, queries, found = seen[0]
    text = memory.base
    for row in range(4):
        asked = task._asked[row][1]
        alone = MemoryBank.for_model(task.longmem, 1, 4096)
        flat = text.storage[0].permute(1, 2, 0, 3, 4).flatten(2, 3)  # (Hkv, 2, tokens, D)
        for keys, values in ((flat[:, 0], flat[:, 1]), asked.kv):
            alone.add(needles.AttentionKV(keys[None], values[None]))
        mine = alone.search(queries[row : row + 1], 2)
        # equal scores may change places, and one product of all keys rounds otherwise than two
        assert torch.allclose(mine.scores[0], found.scores[row], atol=1e-5)
        assert torch.allclose(
            mine.scores[0].sum(-1), (queries[row, ..., None, :] * _means(found, row)).sum((-1, -2)), atol=1e-4
        )


def test_only_the_answer_is_scored_and_it_is_hidden_in_the_row_s_own_facts(adapt: Make) -> None:
    task = _task(adapt(needles=ASK | {"kinds": ["passkey", "pair", "multi", "twohop"]}))
    for number in range(20):
        segments, ids, answer = task._draw(number)
        assert segments.shape[1] == 48
        text = task.tokenizer.decode(segments.flatten())
        assert task.tokenizer.decode(ids[-answer:]).split()[-1] in text
    rows = [needles._Asked(*task._draw(number)[1:], task._encode(task._draw(number)[0])) for number in range(3)]
    ids, targets = needles._rows(rows, 0)
    for row, one in enumerate(rows):
        assert targets[row][targets[row] != IGNORE].tolist() == one.ids[-one.answer :].tolist()
        assert ids[row, : len(one.ids) - 1].tolist() == one.ids[:-1].tolist()
        # a target is the next token
        first = int((targets[row] != IGNORE).nonzero()[0])
        assert one.ids[first + 1] == targets[row, first]


def test_the_backbone_stays_and_the_sidenet_learns_in_steps_of_both_kinds(adapt: Make, records: Records) -> None:
    recipe = adapt(needles=ASK | {"share": 0.5}, optim={"steps": 12, "accumulate": 1})
    task = _task(recipe)
    before = {name: weight.clone() for name, weight in task.longmem.backbone.state_dict().items()}
    train(recipe, quiet=True)
    model = LongMem.from_pretrained(recipe.out_dir / "final")
    after = model.backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    lines = records(recipe.out_dir, "train")
    asked = [line for line in lines if "practice_loss" in line]
    assert 0 < len(asked) < 12
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_a_run_that_only_asks_reports_the_loss_of_its_answers(adapt: Make, records: Records) -> None:
    recipe = adapt(needles=ASK, optim={"steps": 3})
    train(recipe, quiet=True)
    for line in records(recipe.out_dir, "train"):
        assert line["loss"] == line["practice_loss"]
        assert line["tokens"] == line["step"] * 2 * 2 * 4 * 48


def test_memory_grows_from_the_least_to_the_most(adapt: Make) -> None:
    task = _task(adapt(needles=ASK))
    sizes = [
        max(task._background(number, np.random.default_rng(seed)).keys.shape[2] for seed in range(8)) * 4
        for number in (0, 2, 4, 9)
    ]
    assert sizes[0] == 32
    assert sizes[0] < sizes[1] < sizes[2] == sizes[3] == 256


def test_a_sidenet_goes_on_from_another_one(adapt: Make, backbone_dir: Path) -> None:
    first = adapt("first", optim={"steps": 2})
    train(first, quiet=True)
    start = {"start": str(first.out_dir / "final"), "num_retrieved": 16}
    second = adapt("second", sidenet=start, optim={"steps": 2, "lr": 1e-12, "weight_decay": 0.0})
    train(second, quiet=True)
    models = [LongMem.from_pretrained(run.out_dir / "final") for run in (first, second)]
    assert models[1].config.num_retrieved == 16
    assert models[1].config.backbone_name_or_path == models[0].config.backbone_name_or_path
    for one, two in zip(models[0].trainable_parameters(), models[1].trainable_parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-6)
    with pytest.raises(ConfigError, match=r"sidenet\.fusion \('softmax'\) is 'gate' in sidenet\.start"):
        train(adapt("third", sidenet=start | {"fusion": "softmax"}), quiet=True)


def test_settings_that_do_not_go_together_are_refused(adapt: Make) -> None:
    with pytest.raises(ConfigError) as error:
        adapt(needles=ASK | {"kinds": ["riddle"], "least_tokens": 512, "context": 50}, sidenet={"memory": False})
    for rule in (
        "needles.kinds ('riddle')",
        "needles.least_tokens (512)",
        "needles.context (50)",
        "facts are hidden in memory",
    ):
        assert rule in str(error.value)
    with pytest.raises(ConfigError, match=r"sidenet\.start \('z'\) and method"):
        Recipe.parse(
            {
                "task": "adapt", "method": "memtrm", "data": {"paths": ["x"]}, "backbone": {"path": "y"},
                "sidenet": {"start": "z"}, "optim": {"steps": 1},
            }
        )  # fmt: skip
