"""Ranks against plain loops, and a layer that copies by construction."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longmem.evaluation import copying
from longmem.evaluation.copying import copy_loss, random_tokens, retrieval_by_layer
from longmem.modeling.alibi_gpt import AlibiGPTForCausalLM
from longmem.modeling.backbone import position_free_qkv
from longmem.modeling.probe import QKV

VOCAB = 260


def test_ranks_equal_counting_by_hand(tiny_backbone: AlibiGPTForCausalLM) -> None:
    tokens = random_tokens(VOCAB, 1, 24, seed=1)
    found = retrieval_by_layer(tiny_backbone, tokens, segment=24, chunk_size=4, num_chunks=2)
    first = position_free_qkv(tiny_backbone, tokens)
    second = position_free_qkv(tiny_backbone, tokens.roll(-12, dims=1))
    for layer, heads in found.items():
        keys, queries = first[layer].keys[0], second[layer].queries[0].roll(12, dims=1)
        for head in range(4):
            ranks, hits = [], 0
            for t in range(23):
                scores = [float(queries[head, t] @ keys[head, j]) for j in range(24)]
                ranks.append(1 + sum(score > scores[t + 1] for score in scores))
                means = [keys[head, 4 * c : 4 * c + 4].mean(dim=0) for c in range(6)]
                by_chunk = [float(queries[head, t] @ mean) for mean in means]
                hits += sum(score > by_chunk[(t + 1) // 4] for score in by_chunk) < 2
            assert heads.rank[head].item() == statistics.median(ranks)
            assert heads.recall[head].item() == pytest.approx(hits / 23)


def test_a_longer_distance_is_encoded_in_segments(tiny_backbone: AlibiGPTForCausalLM) -> None:
    tokens = random_tokens(VOCAB, 2, 70, seed=2)
    found = retrieval_by_layer(tiny_backbone, tokens, segment=16)
    assert all(heads.keys == 64 for heads in found.values())
    whole = position_free_qkv(tiny_backbone, tokens[:1, 16:32])
    assert torch.isfinite(whole[0].keys).all()


def _layer_one_copies(model: object, input_ids: Tensor) -> dict[int, QKV]:
    """Layer 1: a key is the token before it, a query the token itself; other layers: noise."""
    generator = torch.Generator().manual_seed(int(input_ids.sum()))
    before = F.pad(input_ids, (1, 0))[:, :-1]

    def one_hot(ids: Tensor) -> Tensor:
        return F.one_hot(ids, VOCAB)[:, None].float().expand(-1, 4, -1, -1)

    noise = torch.randn(4, len(input_ids), 4, input_ids.shape[1], 8, generator=generator)
    found = {layer: QKV(noise[layer], noise[layer].flip(2), noise[layer], 1.0) for layer in range(4)}
    found[1] = QKV(one_hot(input_ids), one_hot(before), one_hot(before), 1.0)
    return found


def test_the_layer_that_copies_is_found(tiny_backbone: AlibiGPTForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "position_free_qkv", _layer_one_copies)
    tokens = random_tokens(VOCAB, 2, 256, special=range(4))
    found = retrieval_by_layer(tiny_backbone, tokens, segment=256, chunk_size=1)
    assert found[1].rank.tolist() == [1.0] * 4
    assert found[1].recall.tolist() == [1.0] * 4
    assert found[1].score == pytest.approx(1.0)
    assert all(abs(found[layer].score) < 0.1 for layer in (0, 2, 3))


def test_copy_loss_is_the_loss_of_each_pass(tiny_backbone: AlibiGPTForCausalLM) -> None:
    tokens = random_tokens(VOCAB, 2, 16)
    first, second = copy_loss(tiny_backbone, tokens)
    twice = torch.cat([tokens, tokens], dim=1)
    logits = tiny_backbone.eval()(twice).logits[:, :-1]
    losses = -logits.log_softmax(-1).gather(2, twice[:, 1:, None])[..., 0]
    assert first == pytest.approx(losses[:, :15].mean().item(), abs=1e-5)
    assert second == pytest.approx(losses[:, 16:].mean().item(), abs=1e-5)


def test_random_tokens_do_not_repeat_while_the_vocabulary_lasts() -> None:
    tokens = random_tokens(100, 3, 96, special=(0, 1, 2))
    assert all(len(set(row)) == 96 for row in tokens.tolist())
    assert tokens.min() >= 3
    assert random_tokens(10, 1, 25).shape == (1, 25)
    assert torch.equal(random_tokens(100, 3, 96, seed=5), random_tokens(100, 3, 96, seed=5))
