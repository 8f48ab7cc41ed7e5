"""Laws 1, 2, 3, 4, 9, 10 and 13 of the design over the whole family table, and 7 for the model itself.

``reader`` is every kind of model: a LongMem, and the baselines whose own layer reads memory.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.family_table import FAMILIES, SETTINGS, V, filled, ids, make_backbone
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from longmem import LongMem, MemoryBank, MemTRM, TrainingFree
from longmem.modeling.families import Family, arguments_of

SOFTMAX = [name for name in FAMILIES if not name.startswith(("bloom", "mpt", "falcon", "gptj"))]


class Identity(nn.Module):
    """Stands for a SideNet layer that does nothing."""

    def forward(self, hidden_states: Tensor, **_: object) -> Tensor:
        return hidden_states


@pytest.fixture(params=list(FAMILIES), scope="module")
def backbone(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_backbone(request.param)


@pytest.fixture(scope="module")
def model(backbone: PreTrainedModel) -> LongMem:
    torch.manual_seed(1)
    made = LongMem.from_backbone(backbone, **SETTINGS).eval()
    with torch.no_grad():
        made.sidenet.memory_gate.normal_()
    return made


@pytest.fixture(params=[LongMem, MemTRM, TrainingFree], scope="module")
def reader(request: pytest.FixtureRequest, backbone: PreTrainedModel, model: LongMem) -> Any:
    if request.param is LongMem:
        return model
    return request.param.from_backbone(backbone, gate=[0.2, 0.35, 0.5, 0.65], **SETTINGS).eval()


def test_the_table_has_at_least_24_configurations() -> None:
    assert len(FAMILIES) >= 24


@torch.no_grad()
def test_wrapping_leaves_the_backbone_as_it_was(backbone: PreTrainedModel, reader: Any) -> None:
    fresh = copy.deepcopy(backbone.state_dict())
    reader(ids(), memory=filled(reader, ids(seed=1)))
    assert all(torch.equal(fresh[name], tensor) for name, tensor in backbone.state_dict().items())
    twin = make_backbone_like(backbone)
    assert torch.equal(backbone(ids()).logits, twin(ids()).logits)


def make_backbone_like(model: PreTrainedModel) -> PreTrainedModel:
    twin: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(model.config)).eval()
    twin.load_state_dict(model.state_dict())
    return twin


@torch.no_grad()
def test_empty_bank_equals_no_bank_bit_for_bit(reader: Any) -> None:
    empty = MemoryBank.for_model(reader, rows=2, capacity_tokens=64)
    assert torch.equal(reader(ids(), memory=empty).logits, reader(ids()).logits)
    if not isinstance(reader, LongMem):
        assert torch.equal(reader(ids()).logits, reader.backbone.model(ids()).logits)


@torch.no_grad()
def test_a_filled_bank_changes_the_answer_and_a_second_call_repeats_it(reader: Any) -> None:
    bank = filled(reader, ids(seed=1))
    first = reader(ids(), memory=bank)
    assert torch.equal(first.logits, reader(ids(), memory=bank).logits)
    assert (first.logits - reader(ids()).logits).abs().max() > (1e-3 if isinstance(reader, LongMem) else 1e-4)
    assert first.share is not None and first.share.shape == (2, reader.num_heads, 12)
    torch.testing.assert_close(first.share[1, :, 5], reader.memory_share)


@torch.no_grad()
def test_no_token_sees_its_future(reader: Any) -> None:
    bank = filled(reader, ids(seed=1))
    changed = ids()
    changed[:, 7] = (changed[:, 7] + 1) % V
    before, after = reader(ids(), memory=bank).logits, reader(changed, memory=bank).logits
    torch.testing.assert_close(before[:, :7], after[:, :7], atol=1e-6, rtol=0)
    assert (before[:, 7:] - after[:, 7:]).abs().max() > 1e-4


@torch.no_grad()
def test_a_row_is_what_it_is_alone(reader: Any) -> None:
    bank = filled(reader, ids(seed=1))
    both = reader(ids(), memory=bank).logits
    for row in range(2):
        alone = reader(ids()[row : row + 1], memory=bank, memory_rows=torch.tensor([row])).logits
        torch.testing.assert_close(both[row : row + 1], alone, atol=2e-6, rtol=0)


@torch.no_grad()
def test_a_row_without_memory_is_untouched_by_its_neighbour(reader: Any) -> None:
    bank = filled(reader, ids(seed=1))
    bank.reset(torch.tensor([0]))
    torch.testing.assert_close(reader(ids(), memory=bank).logits[0], reader(ids()).logits[0], atol=2e-6, rtol=0)


def test_identity_sidenet_gives_the_backbones_logits(backbone: PreTrainedModel) -> None:
    model = LongMem.from_backbone(backbone, **SETTINGS).eval()
    model.sidenet.layers = nn.ModuleList(Identity() for _ in model.sidenet.layers)
    torch.testing.assert_close(model(ids()).logits, backbone(ids()).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_residuals_telescope_for_every_stride(stride: int) -> None:
    backbone = make_backbone("llama")
    model = LongMem.from_backbone(backbone, stride=stride, init="zero", **SETTINGS).eval()
    torch.testing.assert_close(model(ids()).logits, backbone(ids()).logits, atol=1e-5, rtol=1e-5)


def test_copied_layer_replayed_is_the_backbones_layer(model: LongMem) -> None:
    run = model.backbone.run(ids(), use_cache=False)
    for layer, source in zip(model.sidenet.layers, model.sidenet.sources, strict=True):
        out = layer(**run.calls[source])
        assert torch.equal(out[0] if isinstance(out, tuple) else out, run.inputs[source + 1])
    assert len(model.sidenet.sources) == 2


@torch.no_grad()
def test_kept_keys_are_those_of_the_backbone_without_position(reader: Any) -> None:
    """Position-free, and independent of what was read: a segment can be encoded alone, and early."""
    encoded = reader.encode(ids())
    for memory in (None, filled(reader, ids(seed=1))):
        kv = reader(ids(), memory=memory).kv
        assert torch.equal(kv.keys, encoded.keys) and torch.equal(kv.values, encoded.values)
    assert encoded.keys.shape == (2, reader.memory_heads, 12, reader.memory_head_dim)
    assert not encoded.keys.requires_grad


@pytest.mark.parametrize("kind", [LongMem, MemTRM, TrainingFree])
@torch.no_grad()
def test_retrieving_everything_with_an_open_gate_is_dense_position_free_attention(
    kind: Any, backbone: PreTrainedModel
) -> None:
    model = kind.from_backbone(backbone, chunk_size=2, num_retrieved=64, memory_size=64).eval()
    model.memory_gate.fill_(60.0)
    bank = filled(model, ids(seed=1))
    seen: dict[str, Any] = {}
    family = Family.of(backbone)
    if kind is LongMem:
        source, layer = model.sidenet.sources[model.augmented_layer], model.sidenet.layers[model.augmented_layer]
    else:
        source, layer = model.memory_layer, Family.of(model.backbone.mirror).layers[model.memory_layer]
    attention = family.attention(layer)
    probe = family.probe(source, attention if kind is LongMem else None)
    handles = [
        attention.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(call=(module, args, kwargs)), with_kwargs=True
        ),
        family.output_projection(attention).register_forward_pre_hook(lambda module, args: seen.update(fused=args[0])),
    ]
    model(ids(), memory=bank)
    for handle in handles:
        handle.remove()
    kv, qkv = model.encode(ids(seed=1)), probe(*seen["call"])
    group = model.num_heads // kv.keys.shape[1]
    keys, values = (part.repeat_interleave(group, 1) for part in (kv.keys, kv.values))
    scores = qkv.queries @ keys.transpose(-1, -2) * qkv.scaling
    if qkv.softcap is not None:
        scores = qkv.softcap * torch.tanh(scores / qkv.softcap)
    dense = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2) * output_gate(*seen["call"])
    torch.testing.assert_close(seen["fused"], dense, atol=1e-5, rtol=1e-4)


def output_gate(attention: Any, args: Any, kwargs: Any) -> Tensor | float:
    """What a family multiplies its heads by after attention (Qwen3.5: the second half of each head's query)."""
    if not type(attention).__name__.startswith("Qwen3_5"):
        return 1.0
    mixed: Tensor = attention.q_proj(arguments_of(attention, args, kwargs)["hidden_states"])
    return torch.sigmoid(mixed.unflatten(-1, (-1, 2, attention.head_dim))[..., 1, :].flatten(2))


def test_a_training_step_changes_the_sidenet_and_nothing_else(backbone: PreTrainedModel) -> None:
    model = LongMem.from_backbone(backbone, **SETTINGS).train()
    bank = filled(model, ids(seed=1))
    frozen = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    out = model(ids(), labels=ids(), memory=bank)
    out.loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    torch.optim.SGD(model.trainable_parameters(), lr=0.1).step()
    assert all(name.startswith("sidenet.") for name in model.trainable_parameter_names())
    assert all(torch.equal(frozen[name], tensor) for name, tensor in backbone.state_dict().items())
    assert all(p.grad is None for p in backbone.parameters())


@torch.no_grad()
def test_save_and_load_give_the_same_logits(backbone: PreTrainedModel, reader: Any, tmp_path: Path) -> None:
    backbone.save_pretrained(tmp_path / "backbone")
    reader.save_pretrained(tmp_path / "model")
    bank, given = filled(reader, ids(seed=1)), {"backbone": tmp_path / "backbone"}
    expected = reader(ids(), memory=bank).logits
    loaded = type(reader).from_pretrained(tmp_path / "model", **({} if isinstance(reader, MemTRM) else given))
    assert torch.equal(loaded(ids(), memory=bank).logits, expected)
    size = sum(f.stat().st_size for f in (tmp_path / "model").glob("*.safetensors"))
    if isinstance(reader, LongMem):
        assert size < 4.2 * sum(p.numel() for p in reader.trainable_parameters()) + 8192
    elif isinstance(reader, TrainingFree):
        assert size == 0
    else:
        by_name = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert isinstance(by_name, MemTRM) and torch.equal(by_name(ids(), memory=bank).logits, expected)
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / "model" / "backbone").eval()
        assert torch.equal(alone(ids()).logits, reader(ids()).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", SOFTMAX)
@pytest.mark.parametrize("kind", [LongMem, MemTRM, TrainingFree])
def test_one_softmax_with_a_closed_gate_ignores_memory(name: str, kind: Any) -> None:
    model = kind.from_backbone(make_backbone(name), fusion="softmax", **SETTINGS).eval()
    bank = filled(model, ids(seed=1))
    plain, read = model(ids()).logits, model(ids(), memory=bank)
    assert (read.logits - plain).abs().max() > (1e-3 if kind is LongMem else 1e-4)
    assert read.share.std() > 1e-4, "every token chooses its own share"
    model.memory_gate.fill_(-200.0)
    torch.testing.assert_close(model(ids(), memory=bank).logits, plain, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["alibi_gpt", "gpt2", "opt"])
def test_one_softmax_is_attention_over_local_and_memory_at_once(name: str) -> None:
    """Without rotary positions, retrieving the segment's own past equals attending to it twice."""
    model = LongMem.from_backbone(make_backbone(name), fusion="softmax", chunk_size=1, num_retrieved=64).eval()
    bank = MemoryBank.for_model(model, rows=2, capacity_tokens=64)
    bank.add(model.encode(ids(seed=1)))
    shares = model(ids(), memory=bank).share
    assert shares is not None and (shares > 0).all() and (shares < 1).all()
    assert shares.std() > 1e-3
