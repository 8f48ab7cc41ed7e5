"""Memory of several layers: each has its own keys, its own gates and its own place, in every model and memory."""

from typing import Any

import pytest
import torch
from tests.family_table import SETTINGS, filled, ids, make_backbone

from longmem import LongMem, LongMemConfig, MemTRM, SessionMemory, TrainingFree
from longmem.errors import MemoryBankError

FAMILIES = {"llama": (1, 3), "gpt2": (1, 3), "gemma2": (1, 3), "qwen3": (1, 3), "alibi_gpt": (1, 3), "lfm2": (2, 5)}
KINDS = [LongMem, MemTRM, TrainingFree]
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(params=list(FAMILIES), scope="module")
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=KINDS, scope="module")
def model(request: pytest.FixtureRequest, family: str) -> Any:
    torch.manual_seed(1)
    made = request.param.from_backbone(make_backbone(family), memory_layers=FAMILIES[family], **SETTINGS).eval()
    with torch.no_grad():
        made.memory_gate.normal_()
    return made


@torch.no_grad()
def test_one_pass_yields_the_keys_of_all_layers_one_after_the_other_whatever_was_read(model: Any, family: str) -> None:
    assert model.memory_layers == FAMILIES[family] and model.memory_gate.shape == (2 * model.num_heads,)
    kv = model.encode(ids())
    assert kv.keys.shape == (2, 2 * model.memory_heads, 12, model.memory_head_dim)
    parts = kv.keys.chunk(2, dim=1)
    for layer, part in zip(model.memory_layers, parts, strict=True):
        alone = LongMem.from_backbone(model.backbone.model, memory_layers=layer, stride=1, **SETTINGS)
        assert torch.equal(alone.encode(ids()).keys, part)
    out = model(ids(), memory=filled(model, ids(seed=1)))
    assert torch.equal(out.kv.keys, kv.keys) and torch.equal(out.kv.values, kv.values)


@torch.no_grad()
def test_each_layer_is_read_at_its_own_place_with_its_own_gates(model: Any) -> None:
    bank, heads = filled(model, ids(seed=1)), model.num_heads
    out = model(ids(), memory=bank, explain=True)
    assert [read.layer for read in out.reads] == list(model.memory_layers)
    for place, read in enumerate(out.reads):
        torch.testing.assert_close(read.share[0, :, 0], torch.sigmoid(model.memory_gate[place * heads :][:heads]))
    first, second = (read.retrieved for read in out.reads)
    assert (first.first_head, second.first_head) == (0, model.memory_heads)
    assert not torch.equal(first.scores, second.scores)
    assert out.explanation.layers == model.memory_layers and out.explanation.chunks.shape[1] == 2 * heads
    best = out.explanation.token(-1)[0]
    assert set(best.layers) <= set(model.memory_layers) and best.origin.document == "a"
    gates = model.memory_gate.clone()
    for place in range(2):  # a shut gate leaves only the other layer's reading
        model.memory_gate[place * heads : (place + 1) * heads] = -torch.inf
        one = model(ids(), memory=bank).logits
        assert not torch.equal(one, out.logits) and not torch.equal(one, model(ids()).logits)
        model.memory_gate.copy_(gates)


@torch.no_grad()
def test_generation_with_cache_equals_without_and_sessions_go_on(model: Any) -> None:
    bank, prompt = filled(model, ids(1, seed=1)), ids(1, 8)
    cached = model.generate(prompt, memory=bank, use_cache=True, **GREEDY)
    assert torch.equal(cached, model.generate(prompt, memory=bank, use_cache=False, **GREEDY))
    window = {**GREEDY, "max_new_tokens": 12, "window": 16, "window_move": 8}
    whole = model.generate(ids(1, 20), memory=bank, **window)
    session = SessionMemory.for_model(model, base=bank, rows=1, capacity_tokens=64)
    assert torch.equal(whole, model.generate(ids(1, 20), memory=session, **window))
    assert session.bank.tokens.item() >= 16


def test_files_of_one_layer_load() -> None:
    assert LongMemConfig(memory_layer=3).memory_layers == LongMemConfig(memory_layers=3).memory_layers == (3,)
    old = LongMemConfig.from_dict({"memory_layer": 3, "model_type": "longmem"})
    assert old.memory_layers == (3,) and "memory_layer" not in old.to_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_of_another_backbone_or_of_other_layers_is_refused_by_name(kind: Any) -> None:
    model, other = (
        kind.from_backbone(make_backbone("llama", seed=seed), memory_layers=(1, 3), **SETTINGS).eval()
        for seed in (0, 1)
    )
    with pytest.raises(MemoryBankError, match=rf"{other.fingerprint}.*{model.fingerprint}.*write the text again"):
        model(ids(), memory=filled(other, ids()))
    one = kind.from_backbone(make_backbone("llama"), memory_layers=3, **SETTINGS).eval()
    assert one.fingerprint == model.fingerprint
    with pytest.raises(MemoryBankError, match=r"memory \(a str\) cannot be searched; give a MemoryBank"):
        model(ids(), memory="notes")
    with pytest.raises(MemoryBankError, match="holds keys of layer 3, this model remembers layers 1, 3"):
        model(ids(), memory=filled(one, ids()))
    with pytest.raises(MemoryBankError, match=r"chunk_size \(16\) must not exceed num_retrieved \(8\)"):
        model(ids(), memory=filled(model, ids(), chunk_size=16))
