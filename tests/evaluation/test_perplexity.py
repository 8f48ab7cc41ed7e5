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
from tests.evaluation.pairs import SETTINGS, documents, everything, longmem, memtrm, nll_of, systems
from torch import Tensor

from longmem import LongMem, MemoryBank
from longmem.evaluation.perplexity import perplexity, windows
from longmem.evaluation.report import plot_all
from longmem.evaluation.systems import compared, sized, with_window


@given(st.integers(1, 300), st.integers(2, 40), st.data())
def test_every_position_is_scored_once_and_sees_window_minus_stride_to_window_tokens(
    length: int, window: int, data: st.DataObject
) -> None:
    plan = list(windows(length, window, data.draw(st.integers(1, window), label="stride")))
    assert [i for _, end, scored_from in plan for i in range(scored_from, end)] == list(range(length))
    for (before, *_), (start, end, scored_from) in pairwise(plan):
        for position in range(scored_from, end):
            assert window - (start - before) < position - start + 1 <= window


def test_longer_windows_are_the_backbone_measured_with_them(tmp_path: Path) -> None:
    side, some = systems(longmem(), 64), documents(3, 2)
    found = perplexity([*side, with_window(side[0], 32)], some, replace(SETTINGS, stride=4))
    assert found["systems"]["window_32"] == "backbone, window of 32"
    alone = perplexity([replace(side[0], window=32)], some, SETTINGS)
    for mine, its in zip(found["documents"], alone["documents"], strict=True):
        for protocol, nll in mine["nll"].items():
            assert nll["window_32"] == pytest.approx(its["nll"][protocol]["backbone"], rel=1e-5)
    assert ("memory_64", "window_32") in compared(list(found["systems"]))
    assert len(plot_all(found, tmp_path)) == 2


@torch.no_grad()
def test_every_system_scores_as_its_model_alone() -> None:
    """Also those that share one pass of the backbone, window by window; memory holds exactly what has left it."""
    compared, models = everything(8, 64)
    (document,) = documents(3)
    found, ids = perplexity(compared, [document], replace(SETTINGS, stride=5)), document.ids
    assert list(found["systems"]) == [
        "backbone", "memory_off", "control", "memory_8", "memory_64", "memtrm_off", "memtrm_8", "memtrm_64",
        "training_free_0.3_8", "training_free_0.3_64",
    ]  # fmt: skip
    alone = {"backbone": models["memory"].backbone.model, "memory_off": models["memory"], "control": longmem(5)}
    for protocol, stride in (("segments", 16), ("sliding", 5)):
        for name in found["systems"]:
            kind, size = sized(name) or ("memtrm", None)
            model: Any = alone.get(name) or models[kind]
            bank = None if size is None else MemoryBank.for_model(model, rows=1, capacity_tokens=size)
            expected, held, start, scored = 0.0, list[Tensor](), 0, 0
            while scored < len(ids) - 1:
                end = min(start + 16, len(ids) - 1)
                out = model(ids[None, start:end], **({"memory": bank} if bank else {}))
                each = out.logits[0, scored - start :].log_softmax(-1).gather(1, ids[scored + 1 : end + 1, None])
                expected -= each.sum().item()
                if bank is not None:
                    held.append(torch.stack([out.kv.keys, out.kv.values])[:, :, :, scored - start :])
                    bank.reset()
                    bank.add(type(out.kv)(*torch.cat(held, dim=3)[:, :, :, : start + stride]))
                start, scored = start + stride, end
            assert nll_of(found, name, protocol) == pytest.approx([expected], rel=1e-5), (protocol, name)


@pytest.mark.parametrize("fusion", ["gate", "softmax"])
def test_rows_of_a_batch_score_as_alone(fusion: str) -> None:
    """Law 4, with rows that begin and end at different times and banks that overflow."""
    compared = everything(16, 64)[0] if fusion == "gate" else systems(longmem(fusion=fusion), 16, 64)
    several, settings = documents(5, 1, 3, 2, 4), replace(SETTINGS, stride=5)
    together = perplexity(compared, several, settings)
    for i, document in enumerate(several):
        alone = perplexity(compared, [document], settings)
        for protocol in together["protocols"]:
            for system in together["systems"]:
                (expected,) = nll_of(alone, system, protocol)
                assert nll_of(together, system, protocol)[i] == pytest.approx(expected, rel=1e-5), (system, protocol)


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tmp_path: Path) -> None:
    compared, several, path = systems(longmem(), 64), documents(4, 2, 3), tmp_path / "records.jsonl"
    whole = perplexity(compared, several, SETTINGS, records=path)
    lines = [line for line in path.read_text().splitlines() if line]
    path.write_text("\n".join(lines[:12]) + "\n")
    found = perplexity(compared, several, SETTINGS, records=path)
    for system in whole["systems"]:
        assert nll_of(found, system, "sliding") == pytest.approx(nll_of(whole, system, "sliding"), rel=1e-5)
    written = path.read_text()
    assert len([line for line in written.splitlines() if line]) == len(lines), "what was there is not measured again"
    again = perplexity(compared, several, SETTINGS, records=path)
    assert path.read_text() == written
    assert again["header"]["seconds"] == found["header"]["seconds"] > 0, "the time of all runs together"


def test_records_of_other_settings_or_weights_are_not_reused(tmp_path: Path) -> None:
    several, path = documents(2, 1), tmp_path / "records.jsonl"
    perplexity(systems(longmem(1), 64), several, SETTINGS, records=path)

    def scored_anew(model: LongMem, *sizes: int, own: Any = None, window: int = 16) -> set[str]:
        before = len(path.read_text().splitlines())
        compared = systems(model, *sizes, window=window) + ([] if own is None else systems(own, 8))
        perplexity(compared, several, SETTINGS, records=path)
        return {json.loads(line)["system"] for line in path.read_text().splitlines()[before:] if line}

    assert scored_anew(longmem(1), 64) == set()
    assert scored_anew(longmem(1), 16, 64) == {"memory_16"}
    assert scored_anew(longmem(2), 64) == {"memory_off", "memory_64"}
    assert scored_anew(longmem(1), 64, window=12) == {"backbone", "memory_off", "memory_64"}
    assert scored_anew(longmem(1), 64, own=memtrm(2)) == {"memtrm_off", "memtrm_8"}
    assert scored_anew(longmem(1), 64, own=memtrm(2)) == set()
    assert scored_anew(longmem(1), 64, own=memtrm(9)) == {"memtrm_off", "memtrm_8"}
    assert scored_anew(longmem(1).to(torch.bfloat16), 64) == {"backbone", "memory_off", "memory_64"}


def test_a_control_of_other_layers_leaves_memory_its_own_when_work_goes_on(tmp_path: Path) -> None:
    model, some, records = longmem(1, memory_layers=[1]), documents(4, 2), tmp_path / "records.jsonl"
    compared = systems(model, 64, control=longmem(2, memory_layers=[2]))
    whole = perplexity(compared, some, SETTINGS)
    perplexity(systems(model), some, SETTINGS, records=records)
    resumed = perplexity(compared, some, SETTINGS, records=records)
    for name in ("control", "memory_64"):
        assert nll_of(resumed, name, "sliding") == pytest.approx(nll_of(whole, name, "sliding"), rel=1e-5)
