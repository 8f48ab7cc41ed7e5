"""Making, saving and loading: what was trained alone, whole or not at all; every refusal is one line."""

import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from tests.family_table import FAMILIES, SETTINGS, disturbed, filled, ids, make_backbone
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from longmem import LongMem, LongMemConfig, MemTRM, MemTRMConfig, TrainingFree, TrainingFreeConfig
from longmem.errors import BackboneError, CheckpointError, ConfigError
from longmem.modeling.checkpoints import backbone_of
from longmem.modeling.loading import load_backbone
from longmem.modeling.weights import fingerprint_of, legacy_fingerprint


def trained(backbone: str | PreTrainedModel, seed: int = 1, **settings: Any) -> LongMem:
    return disturbed(LongMem.from_backbone(backbone, **{**SETTINGS, **settings}).eval(), 0.2, seed)  # type: ignore[no-any-return]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(ids(1), memory=filled(model, ids(1, seed=7))).logits  # type: ignore[no-any-return]


# saving


def test_the_auto_class_loads_shards_and_the_backbone_that_the_checkpoint_names_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stock loader would leave random weights in the backbone without a word."""
    monkeypatch.chdir(tmp_path)
    make_backbone("llama").save_pretrained("bb")
    models = [trained("bb"), trained(AutoModelForCausalLM.from_pretrained("bb"))]  # both know a relative path alone
    for model in models:
        model.save_pretrained("side/net", max_shard_size=20_000)
        shards = [load_file(file) for file in Path("side/net").glob("*.safetensors")]
        assert {name for shard in shards for name in shard} == set(model.sidenet.state_dict())
        assert all(sum(each.nbytes for each in shard.values()) <= 20_000 for shard in shards)
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir("/")
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "side" / "net")
        assert isinstance(loaded, LongMem) and torch.equal(logits(loaded), logits(model))
        assert loaded.config.backbone_name_or_path == str(tmp_path / "bb")


class PowerCut(Exception):
    pass


@pytest.mark.parametrize("size", ["5GB", "30KB"])
@pytest.mark.parametrize("over", [None, "5GB", "20KB"])
def test_a_save_cut_short_anywhere_leaves_what_was_there_or_nothing_that_loads(
    size: str, over: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings and weights of two saves are never mixed: both models share backbone, shapes and folder."""
    backbone = make_backbone("llama")
    old, new = trained(backbone, seed=1, num_retrieved=4), trained(backbone, seed=2, num_retrieved=8)
    whole = {str(logits(model).tolist()) for model in (old, new)}
    left: Iterator[int] = itertools.count()  # of the things that are done to the disk

    def watched(act: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **named: Any) -> Any:
            if next(left, None) is None:
                raise PowerCut
            return act(*arguments, **named)

        return step

    for owner, name in ((safetensors.torch, "save_file"), (os, "remove"), (os, "fsync"), (Path, "unlink"),
                        (LongMemConfig, "save_pretrained")):  # fmt: skip
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    outcomes: list[str] = []
    while not outcomes or outcomes[-1] != "saved":
        folder = tmp_path / str(len(outcomes))
        left = itertools.count()
        if over is not None:
            old.save_pretrained(folder, max_shard_size=over)
        left = iter(range(len(outcomes)))
        try:
            new.save_pretrained(folder, max_shard_size=size)
            outcomes.append("saved")
        except PowerCut:
            try:
                assert str(logits(LongMem.from_pretrained(folder, backbone=backbone)).tolist()) in whole
                outcomes.append("loaded")
            except CheckpointError:
                outcomes.append("refused")
    assert len(outcomes) > 5 and "refused" in outcomes
    assert outcomes.count("loaded") == (0 if over is None else 1), "only before the first thing is done"
    assert torch.equal(logits(LongMem.from_pretrained(folder, backbone=backbone)), logits(new))


# damaged or foreign checkpoints


def cut_in_half(name: str) -> Callable[[Path], Any]:
    def cut(folder: Path) -> None:
        file = next(folder.glob(name))
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return cut


def without(name: str) -> Callable[[Path], Any]:
    return lambda folder: next(folder.glob(name)).unlink()


def setting(**changed: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))

    return change


def other_heads(folder: Path) -> None:
    save_file({"memory_gate": torch.zeros(3)}, folder / "memory_gate.safetensors")


@pytest.mark.parametrize(
    ("kind", "harm", "says"),
    [
        (LongMem, without("sidenet-00002-*"), r"does not fit its config: missing \['layers.0"),
        (LongMem, cut_in_half("sidenet-00002-*"), "not a complete LongMem checkpoint"),
        (LongMem, lambda folder: (folder / "config.json").write_text("[]"), "not a complete LongMem checkpoint"),
        (LongMem, setting(backbone_config={}), "not a complete LongMem checkpoint"),
        (LongMem, setting(dtype="bf16"), "not a complete LongMem checkpoint"),
        (LongMem, setting(stride=0, memory_layers=[3, 1]), r"stride \(0\) must be .*; memory_layers \(\[3, 1\]\) must"),
        (LongMem, without("config.json"), "no config.json.*it needs config.json and sidenet.safetensors"),
        (TrainingFree, setting(model_type="longmem"), "not a complete TrainingFree .* that of a longmem model"),
        (MemTRM, other_heads, r"of another shape \['memory_gate'\]"),
        (MemTRM, cut_in_half("backbone/model.safetensors"), "could not be loaded"),
        (MemTRM, lambda it: make_backbone("llama", seed=5).save_pretrained(it / "backbone"), "damaged or of two runs"),
    ],
)
def test_a_damaged_checkpoint_is_refused(kind: Any, harm: Callable[[Path], Any], says: str, tmp_path: Path) -> None:
    model = kind.from_backbone(make_backbone("llama"), **{"fusion": "token"} if kind is TrainingFree else {})
    model.save_pretrained(tmp_path, max_shard_size="20KB" if kind is LongMem else "5GB")
    harm(tmp_path)
    given = {} if kind is MemTRM else {"backbone": make_backbone("llama")}
    with pytest.raises((CheckpointError, BackboneError), match=says) as problem:
        kind.from_pretrained(tmp_path, **given)
    assert "\n" not in str(problem.value)


def test_a_config_edited_wrongly_names_no_backbone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "longmem", "chunk_size": "4"}')
    with pytest.raises(CheckpointError, match=r"its config.json is damaged \(.*; write the checkpoint again"):
        backbone_of(str(tmp_path))


@pytest.mark.parametrize("kind", [LongMem, TrainingFree])
def test_another_backbone_or_one_with_another_weight_is_refused_by_name_and_none_is_asked_for(
    kind: Any, tmp_path: Path
) -> None:
    model = kind.from_backbone(make_backbone("llama"))
    model.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="names no backbone"):
        kind.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is neither a folder"):
        kind.from_pretrained(tmp_path / "nothing")
    scaled = make_backbone("llama")
    scaled.model.layers[0].self_attn.k_proj.weight.data.mul_(1.5)
    for other in (make_backbone("llama", seed=1), scaled):
        with pytest.raises(CheckpointError, match=rf"{model.fingerprint}.*{fingerprint_of(other)}; pass the backbone"):
            kind.from_pretrained(tmp_path, backbone=other)


# making


def packed() -> Any:
    """As gptq leaves a model: a linear layer that keeps its weight in integers."""
    model: Any = make_backbone("llama")
    model.quantization_method = "gptq"
    model.model.layers[0].self_attn.q_proj.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))
    return model


def made(kind: Any = LongMem, backbone: Any = "llama", **settings: Any) -> Callable[[Path], Any]:
    return lambda _: kind.from_backbone(
        make_backbone(backbone) if isinstance(backbone, str) else backbone(), **settings
    )


def loaded(**settings: Any) -> Callable[[Path], Any]:
    return lambda folder: LongMem.from_pretrained(folder / "model", **settings)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (made(memory_layer=-1), "memory_layer -1 is out of range, the backbone has 4 layers counted from 0; these"),
        (made(backbone="gemma2", memory_layer=2), "sliding_attention layer, or has no keys of its own"),
        (made(backbone="opt-post-norm", init="zero"), 'use init "copy"'),
        (made(backbone="bloom", fusion="softmax"), 'use fusion "gate"'),
        (made(init="zero", trained="attention"), 'init ("zero") needs a feed-forward of its own'),
        (made(stride=9), "stride (9) must not be larger than the backbone's 4 layers; try 2"),
        (made(memory_layers=(2, 3)), "one of them twice"),
        (made(memory_layers=[1.5]), "memory_layers ([1.5]) must be different layers"),
        (made(memory_layers="best"), '"auto"'),
        (made(device_map="auto"), "loaded already"),
        (made(dtype="bf16"), "dtype (bf16) is none of torch; try bfloat16"),
        (made(side_activation="gelo"), "side_activation (gelo) is no activation of transformers"),
        (made(side_norm_eps=-1.0), "side_norm_eps (-1.0) must be a number above 0"),
        (made(num_retrieved="8", stride=2.0), "stride (2.0) must be a whole number, at least 1; num_retrieved ('8') "),
        (
            made(recency=None, memory_temperature=0),
            "recency (None) must be a number from 0 on; 0 reads old and new alike; memory_temperature (0) must be a nu",
        ),
        (made(TrainingFree, gate=[0.1, 0.2, 0.3]), "gate (3 shares) must be one share, or one for each of the 4 heads"),
        (made(backbone=packed), "quantised by gptq, whose layers cannot be copied"),
        (made(MemTRM, packed), "the weights of this one are quantised or kept elsewhere"),
        (made(MemTRM, lambda: cpu_offload(make_backbone("llama"), execution_device="cpu")), "MemTRM trains the back"),
        (
            made(backbone=lambda: MambaForCausalLM(MambaConfig(hidden_size=8, num_hidden_layers=1))),
            "not a decoder-only",
        ),
        (made(backbone=lambda: made()("llama")), "a LongMem reads memory already, over a backbone of its own: load it"),
        (made(backbone=lambda: torch.nn.Linear(2, 2)), "no causal language model of transformers"),
        (made(backbone=lambda: "no/such/folder"), "could not be loaded"),
        (lambda _: TrainingFree(TrainingFreeConfig()), "use TrainingFree.from_backbone"),
        (
            lambda _: LongMemConfig(num_retrieved=50, fusion="sum"),
            "num_retrieved (50) must be a multiple of chunk_size (4); try 48 or 52; fusion ('sum') must be one",
        ),
        (lambda _: TrainingFreeConfig(gate=1.5), "gate (1.5) must be between 0 (memory unread) and 1"),
        (lambda _: MemTRMConfig(gate=0), "gate (0) must be above 0 and below 1"),
        (lambda _: MemTRMConfig(fusion="token"), 'fusion ("token") is not for MemTRMConfig'),
        (loaded(nonsense=1), "unexpected keyword argument 'nonsense'"),
        (loaded(recencey=1), "recencey is no setting of LongMemConfig; did you mean recency?"),
        (loaded(stride=1), "stride (1) cannot be changed in a trained model, only recency, num_retrieved, chunk_size,"),
        (loaded(recency=-1), "recency (-1) must be a number from 0 on"),
        (loaded(device_map={"": "meta"}), "meta device"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(call: Callable[[Path], Any], says: str, tmp_path: Path) -> None:
    if call.__qualname__.startswith("loaded"):
        make_backbone("llama").save_pretrained(tmp_path / "bb")
        LongMem.from_backbone(tmp_path / "bb").save_pretrained(tmp_path / "model")
    with pytest.raises((BackboneError, ConfigError)) as problem:
        call(tmp_path)
    assert says in str(problem.value)
    assert "\n" not in str(problem.value) and len(str(problem.value)) < 400


@pytest.mark.parametrize("kind", [LongMem, MemTRM, TrainingFree])
def test_how_memory_is_read_may_be_changed_when_a_model_is_loaded(kind: Any, tmp_path: Path) -> None:
    make_backbone("llama").save_pretrained(tmp_path / "bb")
    model = kind.from_backbone(tmp_path / "bb", **SETTINGS).eval()
    model.save_pretrained(tmp_path / "model")
    changed = {"recency": 3.0, "num_retrieved": 4, "memory_temperature": 0.5}
    loaded = kind.from_pretrained(tmp_path / "model", **changed)
    model.config.recency, model.config.num_retrieved = 3.0, 4
    before, model.config.memory_temperature = logits(model), 0.5
    assert not torch.equal(logits(model), before)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("kind", [LongMem, TrainingFree])
def test_arguments_of_transformers_work_and_what_finds_the_backbone_is_remembered(kind: Any, tmp_path: Path) -> None:
    make_backbone("llama").save_pretrained(tmp_path / "root" / "deep" / "bb")
    asked: dict[str, Any] = {"torch_dtype": torch.bfloat16, "attn_implementation": "eager"}
    first = kind.from_backbone(tmp_path / "root", subfolder="deep/bb", **asked)
    old = kind.from_backbone(tmp_path / "root", backbone_kwargs={"subfolder": "deep/bb"})  # as 0.1 was called
    assert old.fingerprint == first.fingerprint and old.config.backbone_kwargs == first.config.backbone_kwargs
    first.save_pretrained(tmp_path / "model")
    for model in (first, kind.from_pretrained(tmp_path / "model", **asked)):
        assert model.backbone.model.dtype == torch.bfloat16
        assert model.backbone.model.config._attn_implementation == "eager"
    assert kind.from_pretrained(tmp_path / "model", device_map={"": "cpu"}).device.type == "cpu"
    assert (first.config.vocab_size, first.config.hidden_size, first.config.max_position_embeddings) == (97, 32, 128)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_an_adapters_folder_is_a_backbone_and_a_model_inside_of_peft_is_refused_with_the_way_out(
    tmp_path: Path,
) -> None:
    make_backbone("llama").save_pretrained(tmp_path / "bb")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "bb")
    tuned = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    torch.nn.init.normal_(tuned.base_model.model.model.layers[3].self_attn.q_proj.lora_B["default"].weight)
    tuned.save_pretrained(tmp_path / "adapter")
    model = LongMem.from_backbone(tmp_path / "adapter")
    torch.testing.assert_close(model.backbone.model(ids()).logits, tuned(ids()).logits)
    model.save_pretrained(tmp_path / "side")
    again = LongMem.from_pretrained(tmp_path / "side")
    assert torch.equal(again(ids()).logits, model.eval()(ids()).logits)
    assert not any("lora" in name for name in again.trainable_parameter_names())
    with pytest.raises(BackboneError, match="merge_and_unload"):
        LongMem.from_backbone(tuned)
    assert LongMem.from_backbone(tuned.merge_and_unload())(ids()).logits.isfinite().all()


def test_backbones_loaded_in_threads_leave_transformers_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_backbone("alibi_gpt").save_pretrained(tmp_path)
    tie, fill = PreTrainedModel.tie_weights, torch.nn.init.normal_
    monkeypatch.setattr(PreTrainedModel, "tie_weights", tie)  # put back where this test fails
    with ThreadPoolExecutor(24) as pool:
        list(pool.map(lambda _: load_backbone(str(tmp_path), None, None), range(24)))
    assert PreTrainedModel.tie_weights is tie and torch.nn.init.normal_ is fill


# fingerprints depend on what keys and values depend on, and on nothing else


@pytest.mark.parametrize("name", list(FAMILIES))
def test_settings_that_change_no_key_keep_the_fingerprint(name: str) -> None:
    model = make_backbone(name)
    before = fingerprint_of(model)
    harmless = {"pad_token_id": 2, "attention_dropout": 0.1, "initializer_range": 0.5, "use_cache": False}
    for field, value in {**harmless, "note": "a field of the user's own"}.items():
        setattr(model.config, field, value)
    assert fingerprint_of(model) == before == fingerprint_of(model.bfloat16())
    assert fingerprint_of(make_backbone(name, seed=1)) != before


@pytest.mark.parametrize(
    ("field", "value"),
    [("rope_parameters", {"rope_type": "default", "rope_theta": 9.0}), ("rms_norm_eps", 0.1), ("hidden_act", "gelu")],
)
def test_settings_that_change_keys_change_it(field: str, value: Any) -> None:
    model = make_backbone("llama")
    before = fingerprint_of(model)
    setattr(model.config, field, value)
    assert fingerprint_of(model) != before


@torch.no_grad()
def in_4_bits(model: PreTrainedModel) -> PreTrainedModel:
    """As a quantised copy has its weights: blocks of 32 in 15 steps."""
    for blocks in (parameter.view(-1, 32) for parameter in model.parameters() if parameter.ndim > 1):
        low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
        step = (high - low) / 15
        blocks.copy_(((blocks - low) / step).round() * step + low)
    return model


@pytest.mark.parametrize("harm", [lambda model: model.half(), in_4_bits], ids=["half", "4 bits"])
def test_the_same_weights_in_another_precision_are_taken_with_a_warning(harm: Any, tmp_path: Path) -> None:
    make_backbone("llama").save_pretrained(tmp_path / "backbone")
    LongMem.from_backbone(tmp_path / "backbone").save_pretrained(tmp_path / "side")
    model = harm(AutoModelForCausalLM.from_pretrained(tmp_path / "backbone"))
    own = fingerprint_of(model)
    with pytest.warns(UserWarning, match="the same weights in another precision") as warned:
        loaded = LongMem.from_pretrained(tmp_path / "side", backbone=model)
    written = LongMem.from_pretrained(tmp_path / "side")
    assert loaded.fingerprint == written.fingerprint != own
    assert own in str(warned[0].message) and written.fingerprint in str(warned[0].message)
    assert loaded.accepts(written.fingerprint) and not written.accepts("another")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # asked for by name, it is what was meant
        half = LongMem.from_pretrained(tmp_path / "side", dtype=torch.float16)
    assert half.fingerprint == written.fingerprint and half.dtype == torch.float16


def test_fingerprints_written_before_stay_valid() -> None:
    model = LongMem.from_backbone(make_backbone("llama"), **SETTINGS)
    before = legacy_fingerprint(model.backbone.model)
    assert before != model.fingerprint
    assert model(ids(), memory=filled(model, ids(), fingerprint=before)).logits.isfinite().all()
