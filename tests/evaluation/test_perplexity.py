"""The whole measurement on tiny random models."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.evaluation.pairs import HOW, SETTINGS, SHAPE, backbone, documents, longmem
from tests.family_table import disturbed
from torch import Tensor

from longmem import LongMem, MemoryBank, MemTRM, TrainingFree
from longmem.evaluation.perplexity import perplexity, windows
from longmem.evaluation.report import plot_all
from longmem.evaluation.systems import sized, systems_of, with_window


def memtrm(seed: int = 2) -> MemTRM:
    made: MemTRM = disturbed(MemTRM.from_backbone(backbone(), **SHAPE), 0.05, seed).eval()
    return made


@given(st.integers(1, 300), st.integers(2, 40), st.data())
def test_every_position_is_scored_once_and_sees_window_minus_stride_to_window_tokens(
    length: int, window: int, data: st.DataObject
) -> None:
    plan = list(windows(length, window, data.draw(st.integers(1, window), label="stride")))
    assert [i for _, end, scored_from in plan for i in range(scored_from, end)] == list(range(length))
    for (before, *_), (start, end, scored_from) in pairwise(plan):
        for position in range(scored_from, end):
            assert window - (start - before) < position - start + 1 <= window


@torch.no_grad()
def nll_by_hand(model: Any, ids: Tensor, window: int, stride: int, size: int | None) -> float:
    """One document, window by window; memory holds exactly what has left the window."""
    bank = None if size is None else MemoryBank.for_model(model, rows=1, capacity_tokens=size)
    total, held, start, scored = 0.0, list[Tensor](), 0, 0
    while scored < len(ids) - 1:
        end = min(start + window, len(ids) - 1)
        out = model(ids[None, start:end], **({"memory": bank} if bank else {}))
        each = out.logits[0, scored - start :].log_softmax(-1).gather(1, ids[scored + 1 : end + 1, None])
        total -= each.sum().item()
        if bank is not None:
            held.append(torch.stack([out.kv.keys, out.kv.values])[:, :, :, scored - start :])
            bank.reset()
            bank.add(type(out.kv)(*torch.cat(held, dim=3)[:, :, :, : start + stride]))
        start, scored = start + stride, end
    return total


@pytest.mark.parametrize("fusion", ["gate", "softmax"])
def test_every_system_scores_every_document_as_its_model_alone(fusion: str, tmp_path: Path) -> None:
    """Also those that share one pass of the backbone, in rows that begin and end at different times, with banks that
    overflow, and beside a control that would remember another layer."""
    side, control, trained = longmem(fusion=fusion), longmem(5, memory_layers=[1]), memtrm()
    free = TrainingFree.from_backbone(side.backbone.model, gate=0.3, **SHAPE)
    alone, off, other, *sizes = systems_of(side, [8, 64], control=control, **HOW)
    more = [each for model in (trained, free) for each in systems_of(model, [8, 64], **HOW)]
    longer = with_window(alone, 32)
    compared = [other, alone, off, *sizes, *more, longer]
    several = documents(5, 1, 3, 2, 4)
    found = perplexity(compared, several, replace(SETTINGS, stride=5))
    assert list(found["systems"]) == [
        "control", "backbone", "memory_off", "memory_8", "memory_64", "memtrm_off", "memtrm_8", "memtrm_64",
        "training_free_0.3_8", "training_free_0.3_64", "window_32",
    ]  # fmt: skip
    assert (longer.label, longer.rows) == ("backbone, window of 32", 1)
    for document, scored in zip(several, found["documents"], strict=True):
        for system in compared:
            for protocol, stride in (("segments", system.window), ("sliding", 16 if system is longer else 5)):
                size = None if system is longer else (sized(system.name) or ("", None))[1]
                expected = nll_by_hand(system.model, document.ids, system.window, stride, size)
                assert scored["nll"][protocol][system.name] == pytest.approx(expected, rel=1e-5), (protocol, system)
    against = {d["against"] for d in found["protocols"]["sliding"]["all"]["differences"] if d["system"] == "memory_64"}
    assert against == {"backbone", "memory_off", "control", "memtrm_64", "training_free_0.3_64", "window_32"}
    assert len(plot_all(found, tmp_path)) == 2


def test_what_is_recorded_is_not_measured_again_and_all_else_is(tmp_path: Path) -> None:
    several, path = documents(2, 1, 3), tmp_path / "records.jsonl"
    path.touch()

    def measured(model: LongMem, *sizes: int, own: Any = None, window: int = 16) -> tuple[dict[str, Any], list[str]]:
        """The result, and the systems of the records that are new."""
        before, compared = len(path.read_text().splitlines()), systems_of(model, sizes, window=window, rows=2)
        compared += [] if own is None else systems_of(own, [8], **HOW)
        result = perplexity(compared, several, replace(SETTINGS, stride=8), records=path)  # of every window
        return result, [json.loads(line)["system"] for line in path.read_text().splitlines()[before:] if line]

    whole, scored = measured(longmem(1), 64)
    assert len(scored) == 18 and set(scored) == {"backbone", "memory_off", "memory_64"}
    path.write_text("\n".join(path.read_text().splitlines()[:24]) + "\n")  # interrupted after twelve
    found, scored = measured(longmem(1), 64)
    assert len(scored) == 6
    for one, other in zip(found["documents"], whole["documents"], strict=True):
        assert one["nll"]["sliding"] == pytest.approx(other["nll"]["sliding"], rel=1e-5)
    again, scored = measured(longmem(1), 64)
    assert not scored
    assert again["header"]["seconds"] == found["header"]["seconds"] > 0, "the time of all runs together"
    assert set(measured(longmem(1), 16, 64)[1]) == {"memory_16"}
    assert set(measured(longmem(2), 64)[1]) == {"memory_off", "memory_64"}
    assert sorted(measured(longmem(1), 64, window=12)[1]) == sorted([*("backbone", "memory_off", "memory_64")] * 6)
    assert set(measured(longmem(1), 64, own=memtrm(2))[1]) == {"memtrm_off", "memtrm_8"}
    assert set(measured(longmem(1), 64, own=memtrm(9))[1]) == {"memtrm_off", "memtrm_8"}
    assert set(measured(longmem(1).to(torch.bfloat16), 64)[1]) == {"backbone", "memory_off", "memory_64"}
