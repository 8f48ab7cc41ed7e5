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
WINDOW, SEGMENTS = 512, 8


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
    return pieces_recipe.Maker(tokenizer, {"books": [words]}, [story], ["Jasper", "walnut"], seed=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pieces, three of which ask."""
    maker = maker_of()
    made = [maker.plain("books"), *(maker.asking("books") for _ in range(3))]
    for name, arrays in zip(
        ("ids", "weights"), zip(*((ids, weights) for ids, weights, _ in made), strict=True), strict=True
    ):
        np.save(tmp_path / f"{name}.npy", np.stack(arrays))
    links = [(number, *link) for number, (*_, some) in enumerate(made) for link in some]
    np.save(tmp_path / "links.npy", np.array(links, np.int32))
    (tmp_path / "kinds.json").write_text(json.dumps(["books", *["asking"] * 3]))
    return tmp_path


def test_every_asked_token_was_told_before(folder: Path) -> None:
    ids, weights, links = (np.load(folder / f"{name}.npy") for name in ("ids", "weights", "links"))
    assert ids.shape == (4, WINDOW * SEGMENTS + 1) and weights.shape == (4, WINDOW * SEGMENTS)
    assert len(links) > 20 and set(links[:, 0]) == {1, 2, 3}
    piece, asked, told = links.T
    assert (told // WINDOW < asked // WINDOW).all()  # in an earlier segment: out of the window
    assert (weights[piece, asked] == 16).all()
    same = ids[piece, asked + 1] == ids[piece, told]
    assert same.mean() > 0.8  # the first token of a word may have its space in one place only


def test_whole_replies_are_learned_where_they_are_asked_for() -> None:
    maker = maker_of()
    ids, weights, _ = maker.asking("books")
    text = "".join(
        maker.tokenizer.decode(ids[place + 1]) if weight >= 8 else "|" for place, weight in enumerate(weights)
    )
    replies = [part for part in text.split("|") if part.endswith("\n")]
    assert len(replies) > 3 and {4, 8, 16} <= set(weights.tolist())  # 4: what is told has replies too
    assert all(len(reply.split()) > 1 for reply in replies)
    read = "".join(maker.tokenizer.decode(maker.asking("books")[0]) for _ in range(8))
    assert "Story: Mary went to the kitchen." in read  # some questions have others with their answers before them


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
    for some in (torch.tensor([1, 2]), torch.tensor([3, 0])):
        teacher = train.Teacher.of(backbone, pieces.ids[some], 8)
        for number in range(SEGMENTS):
            loss, _, search, out = reader.segment(pieces, some, number, teacher, given)
            (loss + search).backward()
            optimizer.step()
            optimizer.zero_grad()
            reader.write(out, some, number)
            losses.append(search.item())
    assert max(losses) > 0 and all(np.isfinite(losses))
    for row, number in enumerate(some.tolist()):
        for _, _, told in pieces.links[pieces.first[number] : pieces.first[number + 1]].tolist():
            origin = reader.bank.provenance(row, (reader.begun + told // 4) % (reader.bank.capacity_tokens // 4))
            assert origin.document == str(number) and origin.start_token <= told < origin.start_token + 4
    for gates, kind in ((False, LongMem), (True, TrainingFree)):
        train.save(model, backbone, tmp_path / kind.__name__, gates)
        assert kind.from_pretrained(tmp_path / kind.__name__, backbone=backbone).memory_layers == (1, 2)
