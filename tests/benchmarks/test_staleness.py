"""The bench of staleness: what untrained weights wrote before is not stale, what other weights wrote is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.family_table import make_backbone

from benchmarks import staleness
from longmem import MemTRM


@pytest.fixture
def places(tmp_path: Path, byte_tokenizer: Any) -> tuple[Path, Path, Path]:
    """A MemTRM, the backbone that it was made from, and a text."""
    torch.manual_seed(0)
    backbone = make_backbone("alibi_gpt")
    backbone.resize_token_embeddings(len(byte_tokenizer))
    backbone.save_pretrained(tmp_path / "before")
    byte_tokenizer.save_pretrained(tmp_path / "before")
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, the dog sat on the log. " * 20)
    settings: dict[str, Any] = {"chunk_size": 4, "num_retrieved": 16, "memory_size": 256, "gate": 0.5}
    MemTRM.from_backbone(str(tmp_path / "before"), **settings).save_pretrained(tmp_path / "memtrm")
    byte_tokenizer.save_pretrained(tmp_path / "memtrm")
    return tmp_path / "memtrm", tmp_path / "before", text


def measured(memtrm: Path, before: Path, text: Path, out: Path) -> dict[str, Any]:
    arguments = ["--memtrm", str(memtrm), "--before", str(before), "--data", str(text), "--tokens", "256"]
    result = staleness.main([*arguments, "--segment", "32", "--out", str(out)])
    assert json.loads(out.read_text()) == result
    found: dict[str, Any] = result["stale"][str(text)]
    return found


def test_the_same_weights_leave_the_same_memory(places: tuple[Path, Path, Path], tmp_path: Path) -> None:
    found = measured(*places, tmp_path / "result.json")
    assert found["documents"] == 1 and found["tokens"] == 8 * 31
    assert found["fresh"]["perplexity"] == pytest.approx(found["stale"]["perplexity"], rel=1e-5)
    assert found["fresh"]["perplexity"] != pytest.approx(found["off"]["perplexity"], rel=1e-5)


def test_other_weights_leave_another_memory(places: tuple[Path, Path, Path], tmp_path: Path) -> None:
    memtrm, before, text = places
    model = MemTRM.from_pretrained(memtrm)
    with torch.no_grad():
        for parameter in model.backbone.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(memtrm)
    found = measured(memtrm, before, text, tmp_path / "result.json")
    assert found["fresh"]["perplexity"] != pytest.approx(found["stale"]["perplexity"], rel=1e-4)
