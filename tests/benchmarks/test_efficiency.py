"""Time and memory against the context: what is measured, left out and compared; a process for each peak."""

import json
from pathlib import Path

import pytest
import torch
from benchmarks.efficiency import FULL, LONGMEM, WINDOWED, Settings, load, main, roomy_cache
from transformers import DynamicCache

from longmem import LongMem

SHAPE = {"hidden": 32, "layers": 4, "heads": 2, "kv_heads": 1, "vocab": 64, "num_retrieved": 8, "memory_size": 64}
SMALL = Settings(shape=SHAPE, contexts=(16, 33), window=16, new_tokens=3, repeats=2, memory=False)


@pytest.fixture(scope="module")
def model() -> LongMem:
    return load(SMALL)


def test_every_system_is_measured_at_every_context_and_compared_with_longmem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = ",".join(f"{name}={value}" for name, value in SHAPE.items())
    options = ["--contexts", "16,33", "--window", "16", "--new-tokens", "3", "--repeats", "2", "--no-memory"]
    main(["--random", shape, *options, "--out", str(tmp_path)])
    assert "each new token" in capsys.readouterr().out
    result = json.loads((tmp_path / "efficiency.json").read_text())
    assert [(point["context"], point["system"]) for point in result["points"]] == [
        (context, system) for context in (16, 32) for system in (LONGMEM, FULL, WINDOWED)
    ]
    assert (result["window"], result["move"], result["memory_size"], result["attention"]) == (16, 8, 64, "sdpa")
    assert all(point["first_token"]["rounds"] == 2 and point["peak"] is None for point in result["points"])
    assert [(one["context"], one["system"]) for one in result["ratios"]] == [
        (context, system) for context in (16, 32) for system in (FULL, WINDOWED)
    ]


@torch.no_grad()
def test_full_attention_over_a_roomy_cache_says_what_it_says_over_a_growing_one(model: LongMem) -> None:
    inner, ids = model.backbone.model, torch.randint(8, 64, (1, 24), generator=torch.Generator().manual_seed(0))
    said = {}
    for name, cache in (("roomy", roomy_cache(inner.config, 30)), ("growing", DynamicCache(config=inner.config))):
        for part in (ids[:, :20], ids[:, 20:]):
            said[name] = inner(input_ids=part, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(said["roomy"], said["growing"])
