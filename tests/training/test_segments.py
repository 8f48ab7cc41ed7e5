"""Several consecutive segments in one step train what they train one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.training.test_resume import crash_after, history, weights

from longmem.errors import ConfigError
from longmem.training.loop import train
from longmem.training.recipe import Recipe

Make = Callable[..., Recipe]
Records = Callable[..., list[dict[str, Any]]]


@pytest.mark.parametrize(
    ("sidenet", "recompute"),
    [({}, False), ({"boundary": "reset", "memory_size": 16}, True), ({"shared": True}, False)],
    ids=["keep", "reset-and-recompute", "shared"],
)
def test_segments_of_one_step_train_what_accumulated_ones_do(
    sidenet: dict[str, Any], recompute: bool, adapt: Make, records: Records
) -> None:
    shared = {"steps": 6, "dropout": 0.0, "gradient_checkpointing": recompute}
    # 15 tokens leave a tail behind every segment; pieces of 40 end in the middle of steps
    data = {"window": 15, "piece_tokens": 40}
    together = adapt("together", sidenet=sidenet, data=data, optim={**shared, "segments": 3, "accumulate": 1})
    in_turn = adapt("in-turn", sidenet=sidenet, data=data, optim={**shared, "segments": 1, "accumulate": 3})
    for recipe in (together, in_turn):
        train(recipe, quiet=True)
    mine, theirs = (records(recipe.out_dir, "train") for recipe in (together, in_turn))
    assert [record["tokens"] for record in mine] == [record["tokens"] for record in theirs]
    assert [record["memory_tokens"] for record in mine] == [record["memory_tokens"] for record in theirs]
    assert [r["loss"] for r in mine] == pytest.approx([r["loss"] for r in theirs], abs=1e-4)
    assert [r["grad_norm"] for r in mine] == pytest.approx([r["grad_norm"] for r in theirs], rel=1e-3)
    expected = weights(in_turn)
    for name, weight in weights(together).items():
        # Adam's steps are of size 1e-2 whatever the gradient: where that is rounding alone, its sign is
        close = (weight - expected[name]).abs() < 1e-3
        assert close.float().mean() > 0.99, name


def test_a_run_of_several_segments_resumes(adapt: Make, records: Records) -> None:
    settings = {"steps": 4, "segments": 2, "accumulate": 1}
    whole, cut = (adapt(name, optim=settings, checkpoint={"every": 2}) for name in ("whole", "cut"))
    for recipe in (whole, cut):
        train(recipe, quiet=True)
    crash_after(cut, 2)
    train(cut, resume=True, quiet=True)
    assert history(records(cut.out_dir, "train")) == history(records(whole.out_dir, "train"))


def test_windows_of_pretraining_are_not_taken_in_order(pretrain: Make) -> None:
    with pytest.raises(ConfigError, match=r"optim.segments \(2\) is for task = 'adapt'"):
        pretrain(optim={"segments": 2})
