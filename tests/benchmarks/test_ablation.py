"""One setting changed at a time: as models made with that setting, paired by document, resumed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.ablation import ablate, main, varied
from tests.evaluation.pairs import HOW, TEXT, TOKENIZER, backbone, documents
from tests.evaluation.pairs import SETTINGS as BOTH
from tests.family_table import disturbed

from longmem import CheckpointError, LongMem
from longmem.data.tokens import TokenizedDocument
from longmem.evaluation.perplexity import perplexity
from longmem.evaluation.systems import systems_of

SETTINGS = replace(BOTH, protocols=("sliding",))
SHAPE: dict[str, Any] = {"chunk_size": 4, "num_retrieved": 8, "memory_size": 64}


def longmem(seed: int = 0, **settings: Any) -> LongMem:
    """The same weights under other settings."""
    made: LongMem = disturbed(LongMem.from_backbone(backbone(seed), **SHAPE | settings), 0.05).eval()
    return made


def score(result: dict[str, Any], axis: str, value: str) -> float:
    (found,) = [v for a in result["axes"] if a["name"] == axis for v in a["values"] if v["value"] == value]
    return float(found["scores"]["sliding"]["perplexity"])


def alone(model: LongMem, some: list[TokenizedDocument], size: int = 64) -> float:
    """Perplexity of the model with its own settings."""
    found = perplexity(systems_of(model, [size], **HOW), some, SETTINGS)
    scores = found["protocols"]["sliding"]["all"]["systems"]
    return float(next(score["perplexity"] for score in scores if score["system"] == f"memory_{size}"))


def test_each_value_scores_as_a_model_made_with_it(tmp_path: Path) -> None:
    some, model = documents(4, 2), longmem()
    of = ["chunk_size=2", "num_retrieved=4", "memory_size=16", "memory_dtype=float32,bfloat16,int8", "gate_share=0,0.3"]
    result = ablate(model, some, SETTINGS, of, **HOW)
    default = alone(model, some)
    assert score(result, "chunk_size", "4") == score(result, "memory_dtype", "float32") == pytest.approx(default)
    assert score(result, "gate_share", "as trained") == pytest.approx(default)
    assert score(result, "chunk_size", "2") == pytest.approx(alone(longmem(chunk_size=2), some))
    assert score(result, "num_retrieved", "4") == pytest.approx(alone(longmem(num_retrieved=4), some))
    assert score(result, "memory_size", "16") == pytest.approx(alone(model, some, 16))
    rounded = [score(result, "memory_dtype", name) for name in ("bfloat16", "int8")]
    assert len({default, *rounded}) == 3 and all(abs(each / default - 1) < 0.01 for each in rounded)
    forced = longmem()
    with torch.no_grad():
        forced.sidenet.memory_gate.fill_(torch.logit(torch.tensor(0.3)))
    assert score(result, "gate_share", "0.3") == pytest.approx(alone(forced, some))
    records = tmp_path / "records.jsonl"
    ablate(model, some, SETTINGS, ["chunk_size=2"], records=records, **HOW)
    lines = records.read_text()
    ablate(model, some, SETTINGS, ["chunk_size=2"], records=records, **HOW)
    assert records.read_text() == lines, "nothing is measured again"
    off = result["without"]["memory_off"]["sliding"]
    assert score(result, "gate_share", "0") == pytest.approx(off["perplexity"])
    assert off["percent"] == pytest.approx(100 * (off["perplexity"] / default - 1))
    marked = [value for axis in result["axes"] for value in axis["values"] if value["default"]]
    assert len(marked) == len(of) and all(value["scores"]["sliding"]["percent"] == 0 for value in marked)
    assert torch.equal(varied(model, gate_share=1.0).sidenet.memory_gate.sigmoid(), torch.ones(4))
    assert not torch.equal(model.sidenet.memory_gate.sigmoid(), torch.ones(4))


def test_trained_sidenets_are_told_apart_from_files_to_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = longmem()
    model.backbone.model.save_pretrained(tmp_path / "backbone")
    TOKENIZER.save_pretrained(tmp_path / "backbone")
    for name, settings in (("side", {}), ("low", {"memory_layer": 1})):
        LongMem.from_backbone(tmp_path / "backbone", **SHAPE, **settings).save_pretrained(tmp_path / name)
    longmem(seed=7).backbone.model.save_pretrained(tmp_path / "other")
    LongMem.from_backbone(tmp_path / "other", **SHAPE).save_pretrained(tmp_path / "foreign")
    (tmp_path / "text.txt").write_text(TEXT * 3)
    asked = ["--model", str(tmp_path / "side"), "--data", str(tmp_path / "text.txt"), "--protocols", "sliding"]
    asked += ["--of", "chunk_size=2", "--resamples", "20", "--out", str(tmp_path / "out")]
    result = main([*asked, "--also", f"memory_layer:1={tmp_path / 'low'}"])
    assert "chunk size (tokens)" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "ablate.json").read_text())
    assert [axis["name"] for axis in written["axes"]] == ["chunk_size", "memory_layer"]
    assert "memory_layers (1,) (default" in result["axes"][1]["values"][1]["differs"]
    with pytest.raises(CheckpointError):
        main([*asked, "--also", f"x={tmp_path / 'foreign'}"])
