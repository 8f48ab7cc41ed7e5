"""The two baselines whose own layer reads memory: a trained one (``MemTRM``) and an untrained one (``TrainingFree``).

The laws of LongMem, over the whole family table, as far as they have a SideNet's place in them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.family_table import FAMILIES, SETTINGS, filled, ids, make_backbone
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from longmem import (
    AlibiGPTConfig,
    AlibiGPTForCausalLM,
    LongMem,
    MemoryBank,
    MemTRM,
    MemTRMConfig,
    TrainingFree,
    TrainingFreeConfig,
)
from longmem.errors import BackboneError, CheckpointError, ConfigError, LongMemError, MemoryBankError, StoreError
from longmem.modeling.augmented import AugmentedLM
from longmem.store import MemoryStore

NOT_RECOMPUTED = ("alibi_gpt",)
ROWS = torch.arange(3)
FILLS = (0, 10, 80)  # tokens that each row of a bank was given: it is empty, partly filled, has lost its oldest


def gates(heads: int = 4) -> list[float]:
    return [0.2 + 0.15 * head for head in range(heads)]


@pytest.fixture(params=list(FAMILIES), scope="module")
def backbone(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_backbone(request.param)


@torch.no_grad()
@pytest.mark.parametrize("made", [MemTRM, TrainingFree])
def test_gate_shut_is_the_plain_backbone(made: type[AugmentedLM], backbone: PreTrainedModel) -> None:
    model = made.from_backbone(backbone, **SETTINGS).eval()
    model.memory_gate.fill_(-torch.inf)
    assert torch.equal(model(ids(), memory=filled(model, ids(seed=1))).logits, backbone(ids()).logits)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_gradient_reaches_the_whole_memtrm_and_through_its_queries(name: str) -> None:
    backbone = make_backbone(name)
    model = MemTRM.from_backbone(backbone, **SETTINGS).train()
    bank = filled(model, ids(seed=1))
    assert set(model.trainable_parameter_names()) == {name for name, _ in model.named_parameters()}
    assert {id(p) for p in backbone.parameters()} | {id(model.memory_gate)} == {id(p) for p in model.parameters()}
    model(ids(), labels=ids(), memory=bank).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    # layers above see nothing of it: what only they could tell the memory layer's queries is not there without memory
    assert not without
    assert model.memory_gate.grad is not None and (model.memory_gate.grad != 0).all()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    torch.optim.SGD(model.trainable_parameters(), lr=0.1).step()
    changed = [name for name, tensor in backbone.state_dict().items() if not torch.equal(before[name], tensor)]
    assert len(changed) > len(before) / 2


@pytest.mark.parametrize("name", ["alibi_gpt", "llama", "gemma2", "bloom", "falcon-rope-gqa"])
def test_gradients_of_a_memtrm_are_those_of_differences(name: str) -> None:
    """Along a random direction of all weights; the memory stands still, as in training."""
    model = MemTRM.from_backbone(make_backbone(name).double(), gate=gates(), **SETTINGS).eval()
    bank = filled(model, ids(1, seed=1))
    text = ids(1, 6)
    parameters = model.trainable_parameters()
    random = torch.Generator().manual_seed(0)
    directions = [torch.randn(p.shape, generator=random, dtype=p.dtype) for p in parameters]

    def loss() -> Tensor:
        logits: Tensor = model(text, memory=bank).logits[:, :-1]
        return -logits.log_softmax(-1).gather(2, text[:, 1:, None]).mean()

    @torch.no_grad()
    def loss_at(step: float) -> float:
        for sign in (1, -1):
            if sign < 0:
                found = loss().item()
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += sign * step * direction
        return found

    found = torch.autograd.grad(loss(), parameters)
    slope = sum(float((g * d).sum()) for g, d in zip(found, directions, strict=True))
    # families compute norms and softmax in float32, whatever their weights are in
    assert slope == pytest.approx((loss_at(1e-4) - loss_at(-1e-4)) / 2e-4, rel=5e-3)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_training_free_has_nothing_to_train_and_changes_no_byte(name: str) -> None:
    backbone = make_backbone(name)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    model = TrainingFree.from_backbone(backbone, gate=0.3, **SETTINGS).train()
    assert not model.trainable_parameters() and not model.trainable_parameter_names()
    assert not backbone.training
    out = model(ids(), labels=ids(), memory=filled(model, ids(seed=1)))
    assert out.loss.isfinite() and not out.loss.requires_grad
    with torch.no_grad():
        model.generate(ids(), memory=filled(model, ids(seed=1)), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())


def test_keys_of_a_memtrm_go_stale_and_those_of_a_longmem_do_not() -> None:
    """What the paper decouples: after one step of training, is what lies in memory what would be written now?"""
    for made, same in ((LongMem, True), (MemTRM, False)):
        model: Any = made.from_backbone(make_backbone("llama"), **SETTINGS).train()
        bank = MemoryBank.for_model(model, rows=2, capacity_tokens=64, fingerprint=None)
        optimiser = torch.optim.SGD(model.trainable_parameters(), lr=0.1)
        out = model(ids(), labels=ids(), memory=bank)
        out.loss.backward()
        bank.add(out.kv)
        optimiser.step()
        now = filled(model, ids())
        stored, fresh = (each.search(torch.ones(2, 4, 1, 8), 6) for each in (bank, now))
        assert torch.equal(stored.storage[:, :6], fresh.storage[:, :6]) == same


@torch.no_grad()
@pytest.mark.parametrize("made", [MemTRM, TrainingFree])
def test_one_backbone_under_several_models_is_read_as_if_each_were_alone(made: type[AugmentedLM]) -> None:
    backbone = make_backbone("llama")
    expected = backbone(ids()).logits
    model, again = (made.from_backbone(backbone, fusion="softmax", **SETTINGS).eval() for _ in range(2))
    bank = filled(model, ids(seed=1))
    read = model(ids(), memory=bank).logits
    torch.testing.assert_close(again(ids(), memory=bank).logits, read, atol=1e-6, rtol=0)
    side = LongMem.from_backbone(backbone, fusion="softmax", **SETTINGS).eval()
    assert side(ids(), memory=bank).logits.isfinite().all()
    assert torch.equal(backbone(ids()).logits, expected)


@torch.no_grad()
def test_training_free_reads_the_bank_of_a_longmem_over_the_same_backbone() -> None:
    backbone = make_backbone("llama")
    side = LongMem.from_backbone(backbone, **SETTINGS).eval()
    free = TrainingFree.from_backbone(backbone, gate=0.5, **SETTINGS)
    assert (free.memory_layer, free.fingerprint) == (side.memory_layer, side.fingerprint)
    bank = filled(side, ids(seed=1))
    before = side(ids(), memory=bank).logits
    assert torch.equal(free(ids(), memory=bank).logits, free(ids(), memory=filled(free, ids(seed=1))).logits)
    assert torch.equal(side(ids(), memory=bank).logits, before)


@torch.no_grad()
def test_a_store_of_theirs_is_a_bank_and_a_training_free_model_reads_that_of_a_longmem(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    config = AlibiGPTConfig(vocab_size=260, hidden_size=32, num_hidden_layers=4, num_attention_heads=4)
    torch.manual_seed(0)
    backbone = AlibiGPTForCausalLM(config).eval()
    side = LongMem.from_backbone(backbone, **SETTINGS).eval()
    free = TrainingFree.from_backbone(backbone, gate=0.5, **SETTINGS)
    coupled = trained(AlibiGPTForCausalLM(config))
    text = "The key lies under the seventh stone. " * 3
    for name, writer in (("side", side), ("coupled", coupled)):
        with MemoryStore.open(
            tmp_path / name, model=writer, tokenizer=byte_tokenizer, segment_tokens=32, dtype="float32"
        ) as store:
            store.add_document("ada", text, name="stones")
    query = torch.tensor([byte_tokenizer("The key lies")["input_ids"]])
    for name, reader in (("side", free), ("coupled", coupled)):
        with MemoryStore.open(tmp_path / name, model=reader, tokenizer=byte_tokenizer, mode="read") as store:
            kept = store.bank("ada")
            in_memory = MemoryBank.for_model(reader, rows=1, capacity_tokens=128)
            tokens = torch.tensor(byte_tokenizer(text)["input_ids"])
            for segment in tokens.split(32):
                in_memory.add(reader.encode(segment[None]))
            in_memory.end_document()
            found = reader(query, memory=kept).logits
            torch.testing.assert_close(found, reader(query, memory=in_memory).logits, atol=1e-6, rtol=0)
            assert (found - reader(query).logits).abs().max() > 1e-6
    with pytest.raises(StoreError, match=coupled.fingerprint):
        MemoryStore.open(tmp_path / "side", model=coupled, tokenizer=byte_tokenizer, mode="read")


def line(problem: pytest.ExceptionInfo[LongMemError]) -> str:
    text = str(problem.value)
    assert "\n" not in text
    return text


def trained(backbone: PreTrainedModel) -> MemTRM:
    model = MemTRM.from_backbone(backbone, **SETTINGS).train()
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter += 0.01
    return model.eval()


def test_training_gives_a_memtrm_another_fingerprint_and_its_old_banks_are_refused() -> None:
    model = MemTRM.from_backbone(make_backbone("llama"), **SETTINGS).train()
    start, bank = model.fingerprint, filled(model, ids())
    model(ids(), memory=bank)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter += 0.01
    model.eval()
    assert model.config.start_fingerprint == start != model.fingerprint
    assert model.fingerprint == model.backbone.fingerprint()
    with pytest.raises(MemoryBankError) as problem:
        model(ids(), memory=bank)
    assert start in line(problem) and model.fingerprint in line(problem) and "write the text again" in line(problem)


def test_a_trained_memtrm_keeps_where_it_started_from(tmp_path: Path) -> None:
    make_backbone("llama").save_pretrained(tmp_path / "start")
    start = LongMem.from_backbone(tmp_path / "start").fingerprint
    model = MemTRM.from_backbone(tmp_path / "start", **SETTINGS).train()
    with torch.no_grad():
        model.memory_gate += 1
        for parameter in model.backbone.parameters():
            parameter += 0.01
    model.eval().save_pretrained(tmp_path / "model")
    for _ in range(2):
        loaded = MemTRM.from_pretrained(tmp_path / "model")
        assert (loaded.config.start_name_or_path, loaded.config.start_fingerprint) == (str(tmp_path / "start"), start)
        assert loaded.fingerprint == model.fingerprint != start
        torch.testing.assert_close(loaded.memory_share, torch.full((4,), 1.0).sigmoid())
        # what its memory belongs to is what was trained, and lies beside its settings
        assert loaded.config.backbone_name_or_path == str(tmp_path / "model" / "backbone")
        free = TrainingFree.from_backbone(tmp_path / "model" / "backbone", **SETTINGS)
        assert free.fingerprint == loaded.fingerprint
        loaded.save_pretrained(tmp_path / "model")


@pytest.mark.parametrize("made", [LongMem, MemTRM, TrainingFree])
def test_banks_of_another_backbone_or_layer_are_refused_by_name(made: Any) -> None:
    model, other = (made.from_backbone(make_backbone("llama", seed=seed), **SETTINGS) for seed in (0, 1))
    with pytest.raises(MemoryBankError) as problem:
        model(ids(), memory=filled(other, ids()))
    assert model.fingerprint in line(problem) and other.fingerprint in line(problem)
    another = made.from_backbone(make_backbone("llama"), memory_layer=2, **SETTINGS)
    assert another.fingerprint == model.fingerprint
    with pytest.raises(MemoryBankError, match=r"holds keys of layer 2, this model remembers layer \d; keys of one"):
        model(ids(), memory=filled(another, ids()))


def test_training_free_settings_of_another_backbone_are_refused_by_name(tmp_path: Path) -> None:
    model = TrainingFree.from_backbone(make_backbone("llama"), **SETTINGS)
    model.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="names no backbone"):
        TrainingFree.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError) as problem:
        TrainingFree.from_pretrained(tmp_path, backbone=make_backbone("llama", seed=1))
    assert model.fingerprint in line(problem) and "pass the backbone that it names" in line(problem)


def _cut(folder: Path) -> None:
    weights = folder / "backbone" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def _swap(folder: Path) -> None:
    make_backbone("llama", seed=5).save_pretrained(folder / "backbone")


def _other_heads(folder: Path) -> None:
    save_file({"memory_gate": torch.zeros(3)}, folder / "memory_gate.safetensors")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (_cut, "not a complete MemTRM checkpoint"),
        (lambda folder: (folder / "memory_gate.safetensors").unlink(), "not a complete MemTRM checkpoint"),
        (lambda folder: (folder / "config.json").unlink(), "not a complete MemTRM checkpoint"),
        (_swap, "damaged or of two runs"),
        (_other_heads, r"gates for \(3,\) heads, the backbone has 4"),
    ],
)
def test_a_damaged_memtrm_checkpoint_is_refused(harm: Callable[[Path], Any], says: str, tmp_path: Path) -> None:
    trained(make_backbone("llama")).save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "memory_gate.safetensors")) == {"memory_gate"}
    harm(tmp_path)
    with pytest.raises(CheckpointError, match=says) as problem:
        MemTRM.from_pretrained(tmp_path)
    line(problem)


def test_a_save_that_is_cut_short_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over an older one, at the worst moment: between the weights and the config that names them."""
    trained(make_backbone("llama")).save_pretrained(tmp_path)

    class PowerCut(Exception):
        pass

    def cut(*_: object, **__: object) -> None:
        raise PowerCut

    other = trained(make_backbone("llama", seed=1))
    monkeypatch.setattr(MemTRMConfig, "save_pretrained", cut)
    with pytest.raises(PowerCut):
        other.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="not a complete MemTRM checkpoint"):
        MemTRM.from_pretrained(tmp_path)


def test_settings_that_break_rules_are_reported_together() -> None:
    with pytest.raises(ConfigError) as problem:
        TrainingFreeConfig(num_retrieved=50, chunk_size=4, fusion="sum", gate=1.5)  # type: ignore[arg-type]
    assert problem.value.problems == [
        "num_retrieved (50) must be a multiple of chunk_size (4); try 48 or 52",
        "fusion ('sum') must be one of gate, softmax, token",
        "gate (1.5) must be between 0 (memory unread) and 1 (nothing but memory)",
    ]
    with pytest.raises(ConfigError, match=r"gate \(0\) must be above 0 and below 1"):
        MemTRMConfig(gate=0)
    with pytest.raises(ConfigError, match=r"gate \(3 shares\) must be one share, or one for each of the 4 heads"):
        TrainingFree.from_backbone(make_backbone("llama"), gate=[0.1, 0.2, 0.3])


def test_layers_that_cannot_be_remembered_are_refused_with_those_that_can() -> None:
    with pytest.raises(BackboneError, match="these would do: 1, 3"):
        MemTRM.from_backbone(make_backbone("gemma2"), memory_layer=2)
    with pytest.raises(BackboneError, match=r"use TrainingFree\.from_backbone"):
        TrainingFree(TrainingFreeConfig())


@pytest.mark.parametrize("name", list(FAMILIES))
def test_recomputing_layers_gives_the_same_gradients_or_is_refused(name: str) -> None:
    model = MemTRM.from_backbone(make_backbone(name), **SETTINGS).train()
    bank = filled(model, ids(seed=1))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(ids(), labels=ids(), memory=bank, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.trainable_parameters() if p.grad is not None]

    plain = gradients()
    if name in NOT_RECOMPUTED:
        with pytest.raises(ConfigError, match="cannot recompute layer by layer"):
            model.gradient_checkpointing_enable()
        return
    model.gradient_checkpointing_enable()
    recomputed = gradients()
    assert len(plain) == len(recomputed)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    model.gradient_checkpointing_disable()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


@torch.no_grad()
@pytest.mark.parametrize("made", [MemTRM, TrainingFree])
def test_a_bfloat16_backbone_runs(made: type[AugmentedLM]) -> None:
    model = made.from_backbone(make_backbone("llama").to(torch.bfloat16), gate=0.5, **SETTINGS).eval()
    out = model(ids(), memory=filled(model, ids(seed=1)))
    assert out.logits.dtype == torch.bfloat16 and out.logits.isfinite().all()
