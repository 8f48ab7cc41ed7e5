"""The recipe of the pair over SmolLM2: what it asks for was told, and it trains, searches and saves."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipes.smollm2 import pieces as pieces_recipe
from recipes.smollm2 import train as train_recipe
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from longmem import LongMem, TrainingFree

ROOT = Path(__file__).parents[2]
WINDOW, SEGMENTS = 384, 8


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short segments."""
    for module in (pieces_recipe, train_recipe):
        monkeypatch.setattr(module, "WINDOW", WINDOW)
        monkeypatch.setattr(module, "PIECE", WINDOW * SEGMENTS)


def maker_of() -> pieces_recipe.Maker:
    tokenizer: Any = AutoTokenizer.from_pretrained(ROOT / "models/small/backbone")
    words = np.random.default_rng(0).integers(300, 4000, 3 * WINDOW * SEGMENTS).astype(np.uint16)
    story = (["Mary went to the kitchen.", "John took the milk."], "Where is Mary?", "kitchen", [0])
    own = pieces_recipe.own_words("So it was. I lost my purse in the garden. We met her, and you were there too.")
    assert own == [("I lost my purse in the garden.", "my purse")]
    return pieces_recipe.Maker(tokenizer, {"books": [words, words[::-1]]}, [[story]], ["Jasper", "walnut"], own, seed=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pieces; three ask what is told in them, the last one about stories."""
    maker = maker_of()
    made = [maker.plain("books"), *(maker.asking("books") for _ in range(3)), maker.story("books")]
    ids, weights, links, fresh = zip(*made, strict=True)
    np.save(tmp_path / "ids.npy", np.stack(ids))
    np.save(tmp_path / "weights.npy", np.stack(weights))
    np.save(tmp_path / "fresh.npy", np.array(fresh))
    numbered = [(number, *link) for number, some in enumerate(links) for link in some]
    np.save(tmp_path / "links.npy", np.array(numbered, np.int32))
    (tmp_path / "kinds.json").write_text(json.dumps(["books", *["asking"] * 3, "story"]))
    return tmp_path


def test_every_asked_token_was_told_before(folder: Path) -> None:
    ids, weights, links, fresh = (np.load(folder / f"{name}.npy") for name in ("ids", "weights", "links", "fresh"))
    assert ids.shape == (5, WINDOW * SEGMENTS + 1) and weights.shape == (5, WINDOW * SEGMENTS)
    assert len(links) > 20 and set(links[:, 0]) == {1, 2, 3, 4}
    piece, asked, told = links.T
    # in an earlier segment: out of the window; a story may be told up to its question
    assert ((told // WINDOW < asked // WINDOW) | (piece == 4)).all()
    emptied = [fresh[n, t // WINDOW + 1 : a // WINDOW + 1].any() for n, a, t in links]
    assert fresh[4, 0] and not any(emptied)  # what is asked for is still there
    learned = weights[piece, asked]  # 8: words of a sentence that is told back
    assert (learned >= 8).all() and (learned == 16).mean() > 0.5
    same = ids[piece, asked + 1] == ids[piece, told]
    assert same.mean() > 0.8  # the first token of a word may have its space in one place only


def test_of_a_fact_that_was_told_twice_the_newer_value_is_learned() -> None:
    maker = maker_of()
    twice = [group for group in (maker.told() for _ in range(20)) if len(group.parts) == 2]
    assert len(twice) > 4
    changed = 0
    for group in twice:
        older, newer = (maker.tokenizer.decode(part) for part in group.parts)
        for asked in group.asked:
            (first, last), *_ = asked.answers
            value = maker.tokenizer.decode(asked.ids[first:last]).strip()
            parts = {part for _, part, _ in asked.links}
            assert parts <= {1} or (parts == {0} and value in older)
            changed += parts == {1} and value in newer and value not in older
    assert changed > 4


def test_links_are_found_in_memory_and_what_is_trained_is_saved(folder: Path, tmp_path: Path) -> None:
    train, device = train_recipe, torch.device("cpu")
    torch.manual_seed(0)
    shape = {"vocab_size": 8192, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    backbone = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2))
    settings: dict[str, Any] = {"init": "delta", "trained": "attention", "stride": 1, "fusion": "token"}
    model = LongMem.from_backbone(backbone, memory_layers=(1, 2), **settings)
    pieces, reader = train.Pieces(folder, device), train.Reader(model, 2, 2 * WINDOW * SEGMENTS)
    given = argparse.Namespace(teacher=0.5, search=1.0, links=64)
    optimizer, losses = train.optimiser(model, 1e-3), []
    pieces.fresh[3] = torch.arange(SEGMENTS) == 0  # the other row goes on behind what it read before
    pieces.fresh[2] = False
    for some in (torch.tensor([1, 4]), torch.tensor([3, 2])):
        teacher = train.Teacher.of(backbone, pieces.ids[some], 8)
        for number in range(SEGMENTS):
            loss, _, search, out = reader.segment(pieces, some, number, teacher, given)
            for row, live in enumerate(reader.bank.chunks.tolist()):
                gone = reader.bank.keys[row, :, live:]  # of chunks that are no more: would be found by every query
                gone[:, ::2], gone[:, 1::2] = 1e4, -1e4
            (loss + search).backward()
            optimizer.step()
            optimizer.zero_grad()
            reader.write(out, some, number)
            losses.append(search.item())
    assert 0 < max(losses) < 20 and all(np.isfinite(losses))
    for row, number in enumerate(some.tolist()):
        for _, _, told in pieces.links[pieces.first[number] : pieces.first[number + 1]].tolist():
            origin = reader.bank.provenance(row, int(reader.begun[row]) + told // 4)
            assert origin.document == str(number) and origin.start_token <= told < origin.start_token + 4
    for gates, kind in ((False, LongMem), (True, TrainingFree)):
        train.save(model, backbone, tmp_path / kind.__name__, gates)
        assert kind.from_pretrained(tmp_path / kind.__name__, backbone=backbone).memory_layers == (1, 2)
