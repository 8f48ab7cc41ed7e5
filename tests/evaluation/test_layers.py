"""Which layers are worth remembering, by effect and by keys; and ``longmem layers`` from a folder to table and JSON."""

import json
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.calling import Command
from tests.family_table import FAMILIES, V, make_backbone

from longmem import AlibiGPTForCausalLM, TrainingFree
from longmem.evaluation.layers import (
    best_layers,
    conclusion,
    findability,
    layers_report,
    measure_layers,
    random_tokens,
    rank_keys,
)
from longmem.modeling.backbone import position_free_qkv

SMALL: dict[str, Any] = {"num_retrieved": 8, "chunk_size": 2, "quiet": True}


def texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, V, (20,), generator=generator).repeat(3) for _ in range(2)]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_measured_at_every_layer_that_can_be_remembered(name: str) -> None:
    model = make_backbone(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = layers_report(model, random_tokens(V, 1, 40).repeat(1, 2), distances=(40,), rows=1, num_retrieved=16)
    heads = model.config.get_text_config().num_attention_heads
    remembered = report["memory_layers"]
    assert report["allowed"] == remembered == [layer for each in report["effect"]["single"] for layer in each["layers"]]
    assert {*remembered} <= set(report["scores"])
    assert {len(rank) for ranks in report["ranks"] for rank in ranks["rank"].values()} == {heads}
    assert [copied["distance"] for copied in report["copying"]] == [40, 40]
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_the_best_set_grows_by_the_layer_that_adds_most_and_is_measured_once(tmp_path: Path) -> None:
    model, short = make_backbone("llama"), torch.tensor([3, 4])  # with nothing to remember before what is predicted
    found = measure_layers(model, [*texts(), short], **SMALL)
    ids = torch.stack([text[-31:] for text in texts()])  # half of a text is predicted, of that the second half counts
    scored = model(ids[:, :-1]).logits[:, 15:].log_softmax(-1).gather(2, ids[:, 16:, None])
    assert found["alone"]["nats"]["text"] == pytest.approx(-scored.mean().item(), abs=1e-5)
    worths = [each["worth"] for each in found["sets"]]
    assert found["sets"][0] == max(found["single"], key=lambda effect: effect["worth"])
    assert worths == sorted(worths) and found["best"] == (found["sets"][-1]["layers"] if worths[-1] > 0 else None)
    sizes = [set(each["layers"]) for each in found["sets"]]
    assert all(one < more for one, more in pairwise(sizes))
    copied = measure_layers(model, texts(), stride=2, **SMALL)
    assert [each["layers"] for each in copied["single"]] == [(1,), (3,)]
    assert copied["single"][0]["nats"] == pytest.approx(found["single"][1]["nats"], abs=1e-6), "alone as among others"
    kept = tmp_path / "layers.json"
    made = TrainingFree.from_backbone(
        model, memory_layers=lambda loaded: best_layers(loaded, texts(), None, kept=kept, **SMALL)
    )
    assert made.memory_layers == (found["best"] or (2,))
    kept.write_text('{"best": [0, 1]}')
    assert best_layers(model, [], None, kept=kept) == (0, 1)


def test_ranks_equal_counting_by_hand(tiny_backbone: AlibiGPTForCausalLM) -> None:
    tokens = random_tokens(260, 1, 24, seed=1)
    found = rank_keys(tiny_backbone, tokens, segment=24, chunk_size=4, num_chunks=2)
    first = position_free_qkv(tiny_backbone, tokens)
    second = position_free_qkv(tiny_backbone, tokens.roll(-12, dims=1))
    for layer, (rank, recall) in found.items():
        keys, queries = first[layer].keys[0], second[layer].queries[0].roll(12, dims=1)
        for head in range(4):
            ranks, hits = [], 0
            for t in range(23):
                scores = [float(queries[head, t] @ keys[head, j]) for j in range(24)]
                ranks.append(1 + sum(score > scores[t + 1] for score in scores))
                means = [keys[head, 4 * c : 4 * c + 4].mean(dim=0) for c in range(6)]
                by_chunk = [float(queries[head, t] @ mean) for mean in means]
                hits += sum(score > by_chunk[(t + 1) // 4] for score in by_chunk) < 2
            assert rank[head].item() == statistics.median(ranks)
            assert recall[head].item() == pytest.approx(hits / 23)
    # a quarter of the heads is enough
    blind, best = torch.full((8,), 128.0), torch.tensor([1.0] * 2 + [200.0] * 6)
    assert (findability(blind, 256), findability(best, 256)) == pytest.approx((0.0, 1.0), abs=1e-6)


def test_the_command_prints_tables_and_writes_json_and_heat_map(
    backbone_dir: Path, tmp_path: Path, command: Command
) -> None:
    small = ("--distances", "96,128", "--rows", 2, "--stride", 2)
    printed = command("layers", backbone_dir, *small, "--out", tmp_path / "out").out
    assert "none, all in the window" in printed and "How well keys find what followed" in printed
    assert (tmp_path / "out" / "layers.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    written = json.loads((tmp_path / "out" / "layers.json").read_text())
    assert conclusion(written) in printed
    assert (written["num_layers"], written["allowed"], written["default"]) == (4, [1, 3], 3)
    assert written["effect"]["alone"]["nats"].keys() == {"text", "facts"}
    assert [(ranks["source"], ranks["distance"]) for ranks in written["ranks"]] == [
        (source, distance) for source in ("text", "random") for distance in (96, 128)
    ]
    assert all(ranks["chance"] == 16 / (ranks["distance"] // 4) for ranks in written["ranks"])
    assert written["copying"] == [], "twice 96 tokens exceed the positions"
    assert conclusion({"recommended": None, "default": 3}).startswith("no layer is worth reading")
    assert conclusion({"recommended": [1, 3], "default": 3}) == "remember 1, 3 (the paper's rule gives 3)"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--data short", "--data has 1 tokens, 1,024 are needed; give more text, or smaller --distances"),
        ("--distances 96 --stride 9", "stride (9) copies no layer that can be remembered (0, 1, 2, 3); try 1"),
        (
            "--distances 64,96",
            "distances (64, 96) must all exceed num_retrieved (64): a query may not retrieve everything",
        ),
        ("--distances 96 --num-retrieved 6", "num_retrieved (6) must be a multiple of chunk_size (4); try 4 or 8"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(options: str, line: str, home: Path, command: Command) -> None:
    assert line in command("layers", "backbone", *options.split()).error
