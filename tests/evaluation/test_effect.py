"""What reading at a layer is worth."""

from __future__ import annotations

import pytest
import torch
from tests.family_table import V, make_backbone

from longmem.data.tokenizer import train_tokenizer
from longmem.evaluation.effect import measure_effect


def _texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, V, (20,), generator=generator).repeat(3) for _ in range(2)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_every_layer_that_can_be_remembered_is_measured(name: str) -> None:
    model = make_backbone(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = measure_effect(model, _texts(), most=1, window=20, num_retrieved=8, chunk_size=2, quiet=True)
    assert [effect.layers for effect in report.single] == (
        [(1,), (3,)] if name == "gemma3" else [(0,), (1,), (2,), (3,)]
    )
    assert report.best == max(report.single, key=report.worth).layers
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_layer_measured_alone_and_among_others_is_the_same() -> None:
    model, settings = make_backbone("llama"), {"most": 1, "window": 20, "num_retrieved": 8, "chunk_size": 2}
    many = measure_effect(model, _texts(), quiet=True, **settings)  # type: ignore[arg-type]
    one = measure_effect(model, _texts(), layers=[2], quiet=True, **settings)  # type: ignore[arg-type]
    assert one.single[0].text == pytest.approx(many.single[2].text, abs=1e-6)
    assert one.alone == many.alone and one.context == many.context


def test_facts_are_measured_where_there_is_a_tokenizer() -> None:
    model = make_backbone("llama")
    model.resize_token_embeddings(300)
    model.config.max_position_embeddings = 2048
    tokenizer = train_tokenizer(["My dog is called Comet."] * 20, 280)
    report = measure_effect(model, (), tokenizer, layers=[1], most=1, sessions=1, quiet=True)
    assert report.alone.text is None and report.single[0].facts != report.alone.facts


def test_sets_grow_by_the_layer_that_adds_most() -> None:
    settings = {"window": 20, "num_retrieved": 8, "chunk_size": 2}
    report = measure_effect(make_backbone("llama"), _texts(), most=3, quiet=True, **settings)  # type: ignore[arg-type]
    sizes = [set(effect.layers) for effect in report.sets]
    assert [len(size) for size in sizes] == [1, 2, 3] and sizes[0] < sizes[1] < sizes[2]
    assert set(report.best) in sizes
