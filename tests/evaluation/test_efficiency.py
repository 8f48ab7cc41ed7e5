"""Time and memory against the context: the same text for all, what is left out, ratios, a process for each peak."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from longmem import AlibiGPTConfig, AlibiGPTForCausalLM, ConfigError, LongMem
from longmem.cli.main import main
from longmem.evaluation.efficiency import EfficiencySettings, Spread, efficiency
from longmem.evaluation.efficiency_names import FULL, LONGMEM, WINDOWED
from longmem.evaluation.efficiency_peak import Peak, peak_in_child, resident
from longmem.evaluation.efficiency_plots import efficiency_figure
from longmem.evaluation.efficiency_run import (
    RandomShape,
    Setting,
    Source,
    Timeline,
    context_ids,
    roomy_cache,
    run,
    weights_bytes,
)
from longmem.evaluation.results import to_json
from longmem.evaluation.themes import DARK, LIGHT, picture

SHAPE = RandomShape(hidden=32, layers=4, heads=2, kv_heads=1, vocab=64, num_retrieved=8, memory_size=64)
SOURCE = Source(random=SHAPE)


@pytest.fixture(scope="module")
def model() -> LongMem:
    return SOURCE.load()


def test_every_system_is_measured_at_every_context_and_compared_with_longmem() -> None:
    settings = EfficiencySettings(contexts=(16, 33), window=16, new_tokens=3, repeats=2, memory=False)
    result = efficiency(SOURCE, settings, command="longmem eval efficiency")
    assert [(point.context, point.system) for point in result.points] == [
        (context, system) for context in (16, 32) for system in (LONGMEM, FULL, WINDOWED)
    ]
    assert (result.window, result.move, result.memory_size, result.attention) == (16, 8, 64, "sdpa")
    for point in result.points:
        assert point.first_token.rounds == 2 and point.first_token.low <= point.first_token.median
        assert point.read.median == pytest.approx(point.context / point.first_token.median, rel=0.5)
        assert (point.moving is not None) == (point.system == LONGMEM), "the window is full, so text moves"
        assert point.per_token.median >= point.plain.low
    assert [(one.context, one.system) for one in result.ratios] == [
        (context, system) for context in (16, 32) for system in (FULL, WINDOWED)
    ]
    assert result.header.models["backbone"]["parameters"] < result.header.models["longmem"]["parameters"]
    plain = json.loads(to_json(result))
    assert picture(lambda theme: efficiency_figure(plain, theme), LIGHT) != picture(
        lambda theme: efficiency_figure(plain, theme), DARK
    )


def test_where_the_positions_end_full_attention_is_left_out_and_that_is_said(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 32}
    AlibiGPTForCausalLM(AlibiGPTConfig(vocab_size=64, **shape)).save_pretrained(tmp_path / "backbone")
    LongMem.from_backbone(tmp_path / "backbone", num_retrieved=8, memory_size=64).save_pretrained(tmp_path / "side")
    settings = EfficiencySettings(contexts=(16, 64), new_tokens=3, repeats=1, systems=(LONGMEM, FULL), memory=False)
    result = efficiency(Source(path=str(tmp_path / "side")), settings)
    assert result.window == 32
    assert [(point.context, point.system) for point in result.points] == [(16, LONGMEM), (16, FULL), (64, LONGMEM)]
    (absent,) = result.left_out
    assert (absent.context, absent.system, absent.reason) == (64, FULL, "the backbone's positions end at 32")
    with pytest.raises(ConfigError, match="no LongMem checkpoint; efficiency compares LongMem with its own backbone"):
        Source(path=str(tmp_path / "backbone")).load()


def test_what_would_take_longer_than_the_budget_is_left_out() -> None:
    settings = EfficiencySettings(contexts=(16, 4096), window=16, new_tokens=2, repeats=5, budget=1e-6, memory=False)
    result = efficiency(SOURCE, settings)
    assert {point.first_token.rounds for point in result.points} == {1}, "the budget ends after one round"
    assert [one.system for one in result.left_out] == [LONGMEM, FULL, WINDOWED]
    assert "more than --budget allows (0 s)" in result.left_out[0].reason


@torch.no_grad()
def test_full_attention_over_a_roomy_cache_says_what_it_says_over_a_growing_one(model: LongMem) -> None:
    inner, ids = model.backbone.model, context_ids(model, 24, 0)
    said = {}
    for name, cache in (("roomy", roomy_cache(inner.config, 30)), ("growing", DynamicCache(config=inner.config))):
        for part in (ids[:, :20], ids[:, 20:]):
            said[name] = inner(input_ids=part, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(said["roomy"], said["growing"])
    said = {
        name: inner.generate(ids, max_new_tokens=6, do_sample=False, **more)
        for name, more in (("roomy", {"past_key_values": roomy_cache(inner.config, 30)}), ("growing", {}))
    }
    assert torch.equal(said["roomy"], said["growing"])


def test_moves_fall_where_the_window_is_full(model: LongMem) -> None:
    setting = Setting.of(model, window=16, memory_size=64, new_tokens=12)
    line = run(model, LONGMEM, context_ids(model, setting.whole(40), 0), setting)
    assert line.moved == (True, *[False] * 7, True, *[False] * 2)
    assert not any(run(model, LONGMEM, context_ids(model, 4, 0), setting).moved)


def test_a_token_bears_its_share_of_the_moves() -> None:
    line = Timeline(first=1.0, gaps=(5.0, 1.0, 1.0, 1.0), moved=(True, False, False, False))
    assert (line.plain, line.moving, line.each(8)) == (1.0, 4.0, 1.5)
    still = Timeline(first=1.0, gaps=(1.0, 2.0, 3.0), moved=(False,) * 3)
    assert (still.plain, still.moving, still.each(8)) == (2.0, None, 2.0)
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    setting = Setting(window=16, move=8, memory_size=64, new_tokens=4)
    assert [setting.whole(context) for context in (5, 16, 19, 21, 40)] == [5, 16, 16, 24, 40]


def test_peak_memory_is_that_of_a_process_of_its_own(model: LongMem) -> None:
    setting = Setting.of(model, window=16, memory_size=64, new_tokens=3)
    peak = peak_in_child(SOURCE, setting, FULL, 64, threads=1)
    assert isinstance(peak, Peak), peak
    assert 0 <= peak.beyond < peak.total
    assert peak.total > weights_bytes(model)
    now, most = resident()
    assert 0 < now <= most
    failed = peak_in_child(Source(path="nowhere/at/all"), setting, FULL, 64, threads=1)
    assert isinstance(failed, str) and "nowhere/at/all" in failed


def test_shapes_and_settings_that_break_a_rule_are_named() -> None:
    assert RandomShape.parse("hidden=64, layers=2") == RandomShape(hidden=64, layers=2)
    with pytest.raises(
        ConfigError, match=r"hidden \(40\) must be a multiple of twice the heads \(3\); try hidden=42; .*kv_"
    ):
        RandomShape.parse("hidden=40,heads=3,kv_heads=2")
    with pytest.raises(
        ConfigError, match=r"systems \(none\) must name at least one of longmem, full.*contexts \(4, 4\)"
    ):
        EfficiencySettings(contexts=(4, 4), systems=())
    with pytest.raises(ConfigError) as error:
        RandomShape.parse("hidden=0,depth=3")
    assert [line[:20] for line in error.value.problems] == ["--random (hidden=0) ", "--random (depth=3) m"]
    with pytest.raises(ConfigError) as error:
        EfficiencySettings(contexts=(1,), repeats=0, systems=("slow",))
    assert len(error.value.problems) == 3
    with pytest.raises(ConfigError, match="name one model"):
        Source().load()


def test_the_command_writes_json_and_a_picture_on_either_paper(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = "hidden=32,layers=4,heads=2,vocab=64,num_retrieved=8,memory_size=64"
    options = ["--contexts", "16,32", "--window", "16", "--new-tokens", "2", "--repeats", "1", "--no-memory"]
    with pytest.raises(SystemExit) as done:
        main(["eval", "efficiency", "--random", shape, *options, "--out", str(tmp_path)])
    captured = capsys.readouterr()
    assert not done.value.code, captured.err
    assert "per new token" in captured.out and "full over longmem" in captured.out
    assert {path.name for path in tmp_path.iterdir()} == {"efficiency.json", "efficiency.png", "efficiency-dark.png"}
    result = json.loads((tmp_path / "efficiency.json").read_text())
    assert result["header"]["config"]["random"]["hidden"] == 32
    assert len(result["points"]) == 6
