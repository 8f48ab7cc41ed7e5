"""Loading backbones: where they are, how, and what is refused."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.family_table import make_backbone
from transformers import AutoModelForCausalLM, PreTrainedModel

from longmem import LongMem, TrainingFree
from longmem.errors import BackboneError, ConfigError
from longmem.modeling.alibi_gpt import AlibiGPTConfig, AlibiGPTForCausalLM
from longmem.modeling.loading import load_backbone


def test_backbones_loaded_in_threads_leave_transformers_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    AlibiGPTForCausalLM(AlibiGPTConfig(vocab_size=16, **shape)).save_pretrained(tmp_path)
    tie, fill = PreTrainedModel.tie_weights, torch.nn.init.normal_
    monkeypatch.setattr(PreTrainedModel, "tie_weights", tie)  # put back where this test fails
    loaded: list[PreTrainedModel] = []

    def load() -> None:
        for _ in range(10):
            loaded.append(load_backbone(str(tmp_path), None, None))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 40
    assert PreTrainedModel.tie_weights is tie
    assert torch.nn.init.normal_ is fill


def test_a_backbone_named_by_a_relative_path_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_backbone("llama").save_pretrained("bb")
    for model in (LongMem.from_backbone("bb"), LongMem.from_backbone(AutoModelForCausalLM.from_pretrained("bb"))):
        model.save_pretrained("side/net")
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "elsewhere")
        loaded = LongMem.from_pretrained(tmp_path / "side" / "net")
        assert loaded.config.backbone_name_or_path == str(tmp_path / "bb")
        monkeypatch.chdir(tmp_path)


def test_what_is_needed_to_find_a_backbone_is_remembered(tmp_path: Path) -> None:
    make_backbone("llama").save_pretrained(tmp_path / "root" / "deep" / "bb")
    TrainingFree.from_backbone(tmp_path / "root", subfolder="deep/bb").save_pretrained(tmp_path / "free")
    LongMem.from_backbone(tmp_path / "root", backbone_kwargs={"subfolder": "deep/bb"}).save_pretrained(
        tmp_path / "side"
    )
    assert LongMem.from_pretrained(tmp_path / "side").accepts(
        TrainingFree.from_pretrained(tmp_path / "free").fingerprint
    )


@pytest.mark.parametrize("kind", [LongMem, TrainingFree])
def test_arguments_of_transformers_work(kind: Any, tmp_path: Path) -> None:
    make_backbone("llama").save_pretrained(tmp_path / "bb")
    asked: dict[str, Any] = {"torch_dtype": torch.bfloat16, "attn_implementation": "eager"}
    made = kind.from_backbone(tmp_path / "bb", **asked)
    made.save_pretrained(tmp_path / "model")
    for model in (made, kind.from_pretrained(tmp_path / "model", **asked)):
        assert model.backbone.model.dtype == torch.bfloat16
        assert model.backbone.model.config._attn_implementation == "eager"
    spread = kind.from_pretrained(tmp_path / "model", device_map={"": "cpu"})
    assert spread.device.type == "cpu"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda bb, _: LongMem.from_backbone(bb, num_retreived=8), "did you mean num_retrieved"),
        (lambda bb, _: LongMem.from_backbone(bb, memory_layers="best"), '"auto"'),
        (lambda bb, _: LongMem.from_backbone(make_backbone("llama"), device_map="auto"), "loaded already"),
        (lambda _, m: LongMem.from_pretrained(m, nonsense=1), "from_pretrained has no argument nonsense"),
        (lambda _, m: LongMem.from_pretrained(m, output_loading_info=True), "no argument output_loading_info"),
        (lambda bb, m: LongMem.from_backbone(bb).save_pretrained(m, push_to_hub=True), "does not take push_to_hub"),
        (lambda bb, m: TrainingFree.from_backbone(bb).save_pretrained(m, nonsense=1), "does not take nonsense"),
        (lambda _, m: LongMem.from_pretrained(m, device_map={"": "meta"}), "meta device"),
        (lambda bb, _: LongMem.from_backbone(torch.nn.Linear(2, 2)), "no causal language model of transformers"),
    ],
)
def test_arguments_that_would_do_nothing_are_refused_in_one_line(call: Any, says: str, tmp_path: Path) -> None:
    make_backbone("llama").save_pretrained(tmp_path / "bb")
    LongMem.from_backbone(tmp_path / "bb").save_pretrained(tmp_path / "model")
    with pytest.raises((ConfigError, BackboneError), match=says) as problem:
        call(tmp_path / "bb", tmp_path / "model")
    assert "\n" not in str(problem.value) and len(str(problem.value)) < 400


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_a_model_inside_of_peft_is_refused_with_the_way_out() -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(make_backbone("llama"), settings)
    with pytest.raises(BackboneError, match="merge_and_unload") as problem:
        LongMem.from_backbone(tuned)
    assert len(str(problem.value)) < 200
    assert LongMem.from_backbone(tuned.merge_and_unload())(torch.tensor([[3, 4]])).logits.isfinite().all()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_a_folder_with_an_adapter_is_a_backbone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    make_backbone("llama").save_pretrained(tmp_path / "bb")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "bb")
    tuned = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    torch.nn.init.normal_(tuned.base_model.model.model.layers[3].self_attn.q_proj.lora_B["default"].weight)
    tuned.save_pretrained(tmp_path / "adapter")
    model = LongMem.from_backbone(tmp_path / "adapter")
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(model.backbone.model(ids).logits, tuned(ids).logits)
    model.save_pretrained(tmp_path / "side")
    loaded = LongMem.from_pretrained(tmp_path / "side")
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    assert not any("lora" in name for name in loaded.trainable_parameter_names())


def test_other_tools_find_the_backbones_sizes_in_the_config() -> None:
    config = LongMem.from_backbone(make_backbone("llama")).config
    assert (config.vocab_size, config.hidden_size, config.max_position_embeddings) == (97, 32, 128)
    assert config.pad_token_id == 0
    assert not hasattr(config, "nonsense")
