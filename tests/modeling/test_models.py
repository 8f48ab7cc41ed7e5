"""What the three kinds of model promise beside the laws: where they start, what they train, several layers, threads."""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.family_table import FAMILIES, SETTINGS, disturbed, filled, ids, make_backbone
from torch import Tensor

from longmem import LongMem, LongMemConfig, MemoryBank, MemTRM, SessionMemory, TrainingFree
from longmem.errors import MemoryBankError
from longmem.modeling.weights import fingerprint_of

KINDS = [LongMem, MemTRM, TrainingFree]
TWO = {"llama": (1, 3), "gpt2": (1, 3), "gemma2": (1, 3), "qwen3": (1, 2), "alibi_gpt": (1, 3), "lfm2": (2, 5)}
"""Two layers that are remembered, in families that differ in what a layer is."""
DELTA = {"init": "delta", "fusion": "token"}
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def made(kind: Any, family: str = "llama", **settings: Any) -> Any:
    torch.manual_seed(1)
    return kind.from_backbone(make_backbone(family), **{**SETTINGS, **settings}).eval()


# where a SideNet starts, and what is trained


@torch.no_grad()
@pytest.mark.parametrize("trained", ["all", "attention"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("family", TWO)
def test_a_delta_sidenet_starts_as_the_backbone_and_at_stride_1_as_the_calibrated_reader(
    family: str, stride: int, trained: str
) -> None:
    model = made(LongMem, family, memory_layers=TWO[family], stride=stride, trained=trained, **DELTA)
    assert {*TWO[family]} <= {*model.sidenet.sources} and min(model.sidenet.sources) == TWO[family][0]
    backbone = model.backbone.model
    torch.testing.assert_close(model(ids()).logits, backbone(ids()).logits)
    if stride == 2 or family == "lfm2":  # between its layers with attention are others
        return
    reader = TrainingFree.from_backbone(backbone, memory_layers=TWO[family], fusion="token", **SETTINGS)
    assert reader.gates is not None
    for gate in model.sidenet.gates.parameters():
        gate.normal_(std=0.3)
    reader.gates.load_state_dict(model.sidenet.gates.state_dict())
    bank = filled(model, ids(2, 20, seed=1))  # over one backbone, they read each other's memory
    ours, theirs = (each(ids(), memory=bank).logits for each in (model, reader))
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, model(ids()).logits, atol=1e-4)


@pytest.mark.parametrize(("kind", "settings"), [
    (LongMem, {"init": "delta", "stride": 1, "trained": "attention"}), (TrainingFree, {}),
])  # fmt: skip
def test_attention_or_gates_alone_are_trained_saved_and_loaded(kind: Any, settings: Any, tmp_path: Path) -> None:
    make_backbone("llama").save_pretrained(tmp_path / "backbone")
    model = kind.from_backbone(tmp_path / "backbone", memory_layers=(1, 3), fusion="token", **settings, **SETTINGS)
    model = disturbed(model, 0.02 if kind is LongMem else 0.5)
    names = model.trainable_parameter_names()
    assert names and not any("mlp" in name for name in names)
    assert kind is LongMem or all(name.startswith("gates.") for name in names)
    memory = filled(model, ids(2, 20, seed=1))
    model(ids(), labels=ids(), memory=memory).loss.backward()
    assert all(weight.grad is not None for weight in model.trainable_parameters())
    assert all(weight.grad is None for weight in model.backbone.parameters())
    model.save_pretrained(tmp_path / "model")
    assert kind is LongMem or (tmp_path / "model" / "gates.safetensors").stat().st_size < 4096
    again, empty = kind.from_pretrained(tmp_path / "model"), MemoryBank.for_model(model, rows=2, capacity_tokens=64)
    with torch.no_grad():
        expected = model(ids(), memory=memory).logits
        assert torch.equal(again(ids(), memory=memory).logits, expected)
        assert torch.equal(model(ids(), memory=empty).logits, model(ids()).logits)
    assert not torch.equal(expected, model(ids()).logits)


def test_a_bfloat16_backbone_with_a_float32_sidenet_runs() -> None:
    model = LongMem.from_backbone(make_backbone("llama").to(torch.bfloat16), side_dtype=torch.float32, **SETTINGS)
    out = model(ids(), labels=ids(), memory=filled(model, ids(2, 20, seed=1)))
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    assert {p.grad.dtype for p in model.trainable_parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("name", list(FAMILIES))
def test_gradient_reaches_the_whole_memtrm_and_through_its_queries(name: str) -> None:
    model = made(MemTRM, name).train()
    backbone = model.backbone.model
    assert {id(p) for p in backbone.parameters()} | {id(model.memory_gate)} == {id(p) for p in model.parameters()}
    model(ids(), labels=ids(), memory=filled(model, ids(seed=1))).loss.backward()
    # layers above see nothing of it: what only they could tell the memory layer's queries is not there without memory
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert (model.memory_gate.grad != 0).all()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    torch.optim.SGD(model.trainable_parameters(), lr=0.1).step()
    changed = [name for name, tensor in backbone.state_dict().items() if not torch.equal(before[name], tensor)]
    assert len(changed) > len(before) / 2


def test_a_trained_memtrm_has_another_fingerprint_and_keeps_where_it_started_from(tmp_path: Path) -> None:
    make_backbone("llama").save_pretrained(tmp_path / "start")
    model = MemTRM.from_backbone(tmp_path / "start", **SETTINGS).train()
    start, bank = model.fingerprint, filled(model, ids())
    model(ids(), memory=bank)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    model.eval()
    assert start == LongMem.from_backbone(tmp_path / "start").fingerprint
    assert start != model.fingerprint == fingerprint_of(model.backbone.model)
    with pytest.raises(MemoryBankError, match=rf"{start}.*{model.fingerprint}.*write the text again"):
        model(ids(), memory=bank)
    model.save_pretrained(tmp_path / "model")
    for _ in range(2):
        loaded = MemTRM.from_pretrained(tmp_path / "model")
        assert (loaded.config.start_name_or_path, loaded.config.start_fingerprint) == (str(tmp_path / "start"), start)
        assert loaded.fingerprint == model.fingerprint and torch.equal(loaded.memory_gate, model.memory_gate)
        # what its memory belongs to is what was trained, and is beside its settings
        assert loaded.config.backbone_name_or_path == str(tmp_path / "model" / "backbone")
        free = TrainingFree.from_backbone(tmp_path / "model" / "backbone", **SETTINGS)
        assert free.fingerprint == loaded.fingerprint
        loaded.save_pretrained(tmp_path / "model")


# memory of several layers: each has its own keys, its own gates and its own place


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", TWO)
def test_every_layer_gives_its_own_keys_and_is_read_at_its_own_place_with_its_own_gates(kind: Any, family: str) -> None:
    model = made(kind, family, memory_layers=TWO[family], **{"stride": 1} if kind is LongMem else {})
    model.memory_gate.normal_()
    heads, bank, kv = model.num_heads, filled(model, ids(seed=1)), model.encode(ids())
    assert model.memory_layers == TWO[family] and model.memory_gate.shape == (2 * heads,)
    for layer, part in zip(TWO[family], kv.keys.chunk(2, dim=1), strict=True):
        alone = LongMem.from_backbone(model.backbone.model, memory_layers=layer, stride=1, **SETTINGS)
        assert torch.equal(alone.encode(ids()).keys, part)
    out = model(ids(), memory=bank, explain=True)
    assert torch.equal(out.kv.keys, kv.keys) and torch.equal(out.kv.values, kv.values), "whatever was read"
    assert [read.layer for read in out.reads] == list(TWO[family]) == list(out.explanation.layers)
    gates, (first, second) = model.memory_gate.clone(), (read.retrieved for read in out.reads)
    assert (first.first_head, second.first_head) == (0, model.memory_heads)
    assert not torch.equal(first.scores, second.scores)
    for place, read in enumerate(out.reads):
        own = slice(place * heads, (place + 1) * heads)
        torch.testing.assert_close(read.share[0, :, 0], torch.sigmoid(gates[own]))
        model.memory_gate[own] = -torch.inf  # a shut gate leaves only the other layer's reading
        one = model(ids(), memory=bank).logits
        assert not torch.equal(one, out.logits) and not torch.equal(one, model(ids()).logits)
        model.memory_gate.copy_(gates)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", TWO)
def test_generation_with_a_cache_equals_without_and_goes_on_in_a_session(kind: Any, family: str) -> None:
    model = made(kind, family, memory_layers=TWO[family], **{"stride": 1} if kind is LongMem else {})
    bank = filled(model, ids(1, seed=1))
    cached, plain = (
        model.generate(ids(1, 8), memory=bank, use_cache=cache, max_new_tokens=5, **GREEDY) for cache in (True, False)
    )
    assert torch.equal(cached, plain)
    session = SessionMemory.for_model(model, base=bank, rows=1, capacity_tokens=64)
    window = {"max_new_tokens": 12, "window": 16, "window_move": 8, **GREEDY}
    alone, spoken = (model.generate(ids(1, 20), memory=memory, **window) for memory in (bank, session))
    assert torch.equal(alone, spoken) and session.bank.tokens.item() >= 16


def test_files_of_one_layer_load() -> None:
    assert LongMemConfig(memory_layer=3).memory_layers == LongMemConfig(memory_layers=3).memory_layers == (3,)
    old = LongMemConfig.from_dict({"memory_layer": 3, "model_type": "longmem"})
    assert old.memory_layers == (3,) and "memory_layer" not in old.to_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_of_another_backbone_or_of_other_layers_is_refused_by_name(kind: Any) -> None:
    model, one = made(kind, memory_layers=(1, 3)), made(kind, memory_layers=3)
    other = kind.from_backbone(make_backbone("llama", seed=1), memory_layers=(1, 3), **SETTINGS).eval()
    for memory, says in (
        (filled(other, ids()), rf"{other.fingerprint}.*{model.fingerprint}.*write the text again"),
        ("notes", r"memory \(a str\) cannot be searched; give a MemoryBank"),
        (filled(one, ids()), "holds keys of layer 3, this model remembers layers 1, 3"),
        (filled(model, ids(), chunk_size=16), r"chunk_size \(16\) must not exceed num_retrieved \(8\)"),
    ):
        with pytest.raises(MemoryBankError, match=says):
            model(ids(), memory=memory)


# one model for several threads, and several copies of one model


@pytest.mark.parametrize("kind", KINDS)
def test_threads_that_share_a_model_never_read_each_others_memory_or_window(kind: Any) -> None:
    model, segment = made(kind, fusion="softmax" if kind is LongMem else "gate"), ids(1, 16, seed=99)
    model.memory_gate.data.fill_(2.0)
    banks: dict[Any, Any] = {None: None} | {seed: filled(model, ids(1, 64, seed)) for seed in range(3)}
    settings: dict[str, Any] = {"max_new_tokens": 3, "window": 12, "window_move": 6, **GREEDY}
    settings |= {"output_logits": True, "return_dict_in_generate": True}

    @torch.no_grad()
    def logits(tenant: int | None) -> Tensor:
        return model(segment, memory=banks[tenant]).logits  # type: ignore[no-any-return]

    def continued(tenant: int | None) -> Tensor:
        return model.generate(segment, memory=banks[tenant], **settings).logits[-1]  # type: ignore[no-any-return]

    for ask in (logits, continued):
        alone = {tenant: ask(tenant) for tenant in banks}
        assert len({tuple(each.flatten().tolist()) for each in alone.values()}) == len(banks)
        with ThreadPoolExecutor(4) as pool:
            for tenant, answer in [(tenant, pool.submit(ask, tenant)) for _ in range(8) for tenant in banks]:
                torch.testing.assert_close(answer.result(), alone[tenant], atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("used", [False, True])
def test_a_copy_answers_alike_and_is_its_own(way: Callable[[Any], Any], kind: Any, used: bool) -> None:
    model, segment = made(kind, fusion="softmax" if kind is LongMem else "gate"), ids(1, 16, seed=99)
    model.memory_gate.fill_(2.0)
    if used:  # a model that has run holds more than one that has not
        model(segment)
    other, bank = way(model), filled(model, ids(1, 64, 0))
    expected = model(segment, memory=bank).logits
    assert torch.equal(other(segment, memory=bank).logits, expected)
    other.memory_gate.fill_(-3.0)
    assert torch.equal(model(segment, memory=bank).logits, expected)
    assert not torch.equal(other(segment, memory=bank).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", [LongMem, TrainingFree])
def test_hidden_states_and_attentions_come_back_and_the_users_own_backbone_stays_free_of_us(kind: Any) -> None:
    backbone = make_backbone("llama")
    backbone.set_attn_implementation("eager")
    model = kind.from_backbone(backbone, fusion="softmax", **SETTINGS).eval()
    model(ids(1, 16), memory=filled(model, ids(1, 64, 0)))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in backbone.modules())
    assert pickle.loads(pickle.dumps(backbone)).config._attn_implementation == "eager"
    asked: dict[str, Any] = {"output_hidden_states": True, "output_attentions": True}
    expected, found = backbone(ids(1, 8), **asked), model(ids(1, 8), **asked)
    for name in ("hidden_states", "attentions"):
        assert all(map(torch.equal, getattr(found, name), getattr(expected, name)))
        assert len(getattr(found, name)) == len(getattr(expected, name))
    out = model.generate(ids(1, 8), max_new_tokens=2, return_dict_in_generate=True, **asked, **GREEDY)
    assert len(out.hidden_states) == 2 and len(out.attentions[0]) == 4
