"""The arithmetic behind the recipes' headers, against sums worked by hand and against models that exist."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.family_table import FAMILIES, make_backbone
from transformers import AutoModelForCausalLM, LlamaConfig

from longmem import AlibiGPTConfig, LongMem, LongMemConfig, MemoryBank, MemTRMConfig
from longmem.errors import ConfigError
from longmem.training.estimate import MIB, RESERVE, Estimate, Work, bank_bytes, estimate
from longmem.training.hardware import GIB, HARDWARE, Hardware
from longmem.training.recipe import Recipe
from longmem.training.sizes import Sizes

PAPER = AlibiGPTConfig()
PAPER_WORK = Work(rows=8, segment=1024, tokens=26_214_400_000, memory=65536)
ONE = Hardware("one", memory=80 * GIB, flops=100e12, flops_single=10e12, bandwidth=1e12, utilisation=0.5)


@pytest.fixture(scope="module")
def paper() -> Estimate:
    return estimate((LongMemConfig(backbone_config=PAPER, memory_layer=17), PAPER_WORK), ONE)


def test_the_papers_parameters_are_counted_to_the_last_one(paper: Estimate) -> None:
    assert paper.parameters == 407_072_768
    assert paper.trained == 151_083_024
    assert paper.parameters + paper.trained == 558_155_792


def test_a_row_of_the_papers_memory_takes_256_mib_and_its_chunk_keys_64() -> None:
    # 65,536 tokens x 16 heads x 64 numbers x (key + value) x 2 bytes; 16,384 chunks x 16 x 64 x 4 bytes
    assert 256 * MIB == 65536 * 16 * 64 * 2 * 2
    assert 64 * MIB == 16384 * 16 * 64 * 4
    sizes = Sizes.of(PAPER)
    assert bank_bytes(sizes, 4, PAPER_WORK) == 8 * (256 + 64) * MIB
    assert bank_bytes(sizes, 4, Work(rows=8, segment=1024, tokens=1, memory=65536, banks=1)) == (256 + 64) * MIB


def test_the_papers_work_per_token_is_as_worked_by_hand(paper: Estimate) -> None:
    layer = 4 * 1024 * 1024 + (1024 * 4096 + 4096) + (4096 * 1024 + 1024) + 2 * 1024
    assert layer == 12_590_080
    projections = 4 * 1024 * 1024
    attention = 4 * 1024 * 1024  # 4 x 1,024 tokens x 16 heads x 64
    head = 51200 * 1024 + 51200
    assert paper.flops == {
        "backbone": 24 * (2 * layer + attention) + 2 * projections,
        "head": 4 * head,
        "SideNet": 3 * 12 * (2 * layer + attention) + 6 * projections,
        "search": 2 * 16384 * 16 * 64,
        "memory attention": 3 * 4 * 64 * 16 * 64,
    }
    assert sum(paper.flops.values()) == pytest.approx(2.04e9, rel=0.01)
    # scores of 16 heads x 16,384 chunks written and read, 64 MiB of chunk keys per 256 queries, 64 pairs read twice
    assert paper.reads == 2 * 4 * 16 * 16384 + 64 * MIB / 256 + 2 * 16 * 64 * 64 * 2 * 2


def test_the_papers_memory_on_the_device_is_as_worked_by_hand(paper: Estimate) -> None:
    positions = 8 * 1024
    assert paper.bytes == {
        "backbone": 407_072_768 * 2,
        "dequantised": 0,
        "gathered": 0,
        "trained weights": 151_083_024 * (4 + 2),
        "gradients": 151_083_024 * 4,
        "optimiser": 151_083_024 * 8,
        "residual states": 14 * positions * 1024 * 2,
        "activations": 12 * positions * (2 * 1024 + 4 * 1024 + 2 * 4096) * 2,
        "logits": positions * 51200 * 2 * (2 + 4),
        "mask": 16 * 1024 * 1024 * (4 + 2),
        "bank": 8 * 320 * MIB,
        "search scratch": 256 * MIB,
        "reserve": RESERVE,
    }
    assert paper.total_bytes == sum(paper.bytes.values())
    assert paper.fits
    assert 14 * GIB < paper.total_bytes < 15 * GIB


def test_hours_are_work_over_what_the_machine_does(paper: Estimate) -> None:
    seconds = sum(paper.flops.values()) / 50e12 + paper.reads / 1e12
    assert paper.tokens_per_second == pytest.approx(1 / seconds)
    assert paper.hours == pytest.approx(26_214_400_000 * seconds / 3600)


def test_precision_auto_is_half_only_where_the_machine_has_bf16() -> None:
    recipe = Recipe.parse(
        {
            "task": "pretrain",
            "data": {"paths": ["x"]},
            "model": {"layers": 1},
            "optim": {"steps": 1, "precision": "auto"},
        }
    )
    assert estimate(recipe, "a100-80gb").peak == 312e12
    assert estimate(recipe, "v100-32gb").peak == 15.7e12


def test_more_devices_take_proportionally_less_time() -> None:
    config = (LongMemConfig(backbone_config=PAPER, memory_layer=17), PAPER_WORK)
    assert estimate(config, "a100-80gb").hours == pytest.approx(8 * estimate(config, "8x-a100-80gb").hours)


def test_without_memory_nothing_is_searched_or_stored() -> None:
    work = Work(rows=8, segment=1024, tokens=1000)
    control = estimate((LongMemConfig(backbone_config=PAPER, memory_layer=17), work), ONE)
    assert control.flops["search"] == control.flops["memory attention"] == control.reads == 0
    assert control.bytes["bank"] == control.bytes["search scratch"] == 0


def test_checkpointing_trades_activations_for_work(paper: Estimate) -> None:
    work = Work(rows=8, segment=1024, tokens=1, memory=65536, gradient_checkpointing=True)
    less = estimate((LongMemConfig(backbone_config=PAPER, memory_layer=17), work), ONE)
    assert less.bytes["activations"] < paper.bytes["activations"] / 5
    assert less.flops["SideNet"] == pytest.approx(paper.flops["SideNet"] * 4 / 3)


def test_pretraining_trains_everything() -> None:
    found = estimate((PAPER, Work(rows=4, segment=1024, tokens=1000)), ONE)
    assert found.trained == found.parameters == 407_072_768
    assert found.bytes["optimiser"] == 407_072_768 * 8
    assert found.flops["layers"] == 3 * 24 * (2 * 12_590_080 + 4 * 1024 * 1024)


def test_too_large_a_run_is_told_not_to_fit() -> None:
    small = Hardware("small", memory=4 * GIB, flops=1e12, flops_single=1e11, bandwidth=1e11)
    found = estimate((LongMemConfig(backbone_config=PAPER, memory_layer=17), PAPER_WORK), small)
    assert not found.fits
    assert any("DOES NOT FIT" in line for line in found.lines())


@pytest.mark.parametrize("name", FAMILIES)
def test_counted_parameters_are_those_of_the_model_that_is_built(name: str) -> None:
    backbone = make_backbone(name)
    expected = sum(parameter.numel() for parameter in backbone.parameters())
    work = Work(rows=1, segment=8, tokens=8, memory=64)
    found = estimate((LongMemConfig(backbone_config=backbone.config), work), ONE)
    assert found.parameters == expected
    model = LongMem.from_backbone(backbone)
    assert found.trained == sum(parameter.numel() for parameter in model.trainable_parameters())
    sizes = Sizes.of_model(backbone)
    assert (sizes.heads, sizes.heads_kv, sizes.head_dim) == (model.num_heads, model.memory_heads, model.memory_head_dim)


def test_a_real_bank_takes_the_bytes_that_are_estimated() -> None:
    config = AlibiGPTConfig(vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=4)
    bank = MemoryBank(2, 1024, 4, 8, 4, dtype=torch.bfloat16)
    estimated = bank_bytes(Sizes.of(config), 4, Work(rows=2, segment=8, tokens=8, memory=1024))
    # chunk lengths and the null chunk are the bank's own; they vanish in a bank of any size
    assert estimated <= bank.nbytes <= estimated * 1.15


def test_a_recipe_is_estimated_by_its_own_settings() -> None:
    recipe = Recipe.parse(
        {
            "task": "pretrain",
            "data": {"paths": ["x"], "vocab_size": 500, "window": 64},
            "model": {"hidden_size": 32, "layers": 2, "heads": 4},
            "optim": {"steps": 10, "rows": 4, "accumulate": 2},
        }
    )
    found = estimate(recipe, "8x-a100-80gb")
    built = AutoModelForCausalLM.from_config(
        AlibiGPTConfig(vocab_size=500, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    )
    assert found.parameters == sum(parameter.numel() for parameter in built.parameters())
    assert found.work.tokens == 10 * 4 * 2 * 64 * 8
    assert found.hardware == HARDWARE["8x-a100-80gb"]


def test_an_adaptation_recipe_reads_its_backbones_config(tmp_path: Path) -> None:
    AlibiGPTConfig(vocab_size=500, hidden_size=32, num_hidden_layers=4, num_attention_heads=4).save_pretrained(tmp_path)
    recipe = Recipe.parse(
        {
            "task": "adapt",
            "data": {"paths": ["x"], "window": 64},
            "backbone": {"path": str(tmp_path)},
            "sidenet": {"memory_size": 1024},
            "optim": {"tokens": 4096, "rows": 2},
        }
    )
    found = estimate(recipe, ONE)
    assert found.work.tokens == 4096
    assert found.bytes["bank"] == 2 * (1024 * 32 * 2 * 2 + 256 * 32 * 4)


def test_unknown_hardware_is_answered_with_the_known_names() -> None:
    with pytest.raises(ConfigError, match="hardware \\('abacus'\\) is not known; try one of 2-cpu-cores"):
        estimate((PAPER, PAPER_WORK), "abacus")


LLAMA = LlamaConfig(
    vocab_size=32_000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16,
    num_key_value_heads=4, tie_word_embeddings=False,
)  # fmt: skip
MATRICES = 2 * 1024 * 1024 + 2 * 1024 * 256 + 3 * 1024 * 2816
"""Of a layer: queries and outputs, keys and values of 4 heads of 64, feed-forward with its gate."""
LLAMA_LAYER = MATRICES + 2 * 1024
EMBEDDINGS = 32_000 * 1024


def llama(hardware: Hardware = ONE, **work: object) -> Estimate:
    asked = Work(**{"rows": 2, "segment": 512, "tokens": 1_000_000, "memory": 4096, **work})  # type: ignore[arg-type]
    return estimate((LongMemConfig(backbone_config=LLAMA, memory_layer=5), asked), hardware)


def test_several_segments_at_once_are_a_larger_batch_over_as_many_banks() -> None:
    one, four = llama(), llama(segments=4)
    for part in ("activations", "logits", "residual states"):
        assert four.bytes[part] == 4 * one.bytes[part]
    assert four.bytes["logits"] == 2 * 4 * 512 * 32_000 * 2 * (2 + 4)
    # 4 heads x 64 numbers
    assert one.bytes["bank"] == 2 * (4096 * 256 * 2 * 2 + 1024 * 256 * 4)
    assert four.bytes["bank"] == one.bytes["bank"]
    assert four.flops == one.flops and four.hours == one.hours
    assert llama(segments=4, memory=0).bytes["bank"] == 0


def test_a_backbone_in_4_bits_keeps_embeddings_and_norms_as_they_are() -> None:
    plain, four, eight = llama(), llama(quantised="4bit"), llama(quantised="8bit")
    others = 2 * EMBEDDINGS + 1024 + 8 * 2 * 1024
    assert plain.parameters == others + 8 * MATRICES
    assert plain.bytes["backbone"] == 2 * plain.parameters
    # half a byte, a byte of scale for 64 weights, four for 64 x 256
    assert four.bytes["backbone"] == round(8 * MATRICES * (0.5 + 1 / 64 + 4 / 16384)) + 2 * others
    # a byte, and a float32 scale for each output
    outputs = 1024 + 2 * 256 + 1024 + 2 * 2816 + 1024
    assert eight.bytes["backbone"] == 8 * MATRICES + 4 * 8 * outputs + 2 * others
    # the largest matrix is unpacked to be computed with
    assert four.bytes["dequantised"] == 1024 * 2816 * 2
    assert plain.bytes["dequantised"] == eight.bytes["dequantised"] == 0
    # the SideNet is copied from what the weights stand for, and is trained as ever
    assert four.trained == plain.trained and four.bytes["optimiser"] == plain.bytes["optimiser"]


def test_matrices_that_are_quantised_are_counted_in_every_family() -> None:
    for name in FAMILIES:
        backbone = make_backbone(name)
        sizes, head = Sizes.of_model(backbone), backbone.get_output_embeddings()
        # experts are stacked tensors, which bitsandbytes leaves alone; all other layers are matrices and little else
        inside = [m for m in backbone.modules() if m is not head and type(m).__name__ in ("Linear", "Conv1D")]
        assert sizes.matrices == sum(m.weight.numel() for m in inside), name
        assert sizes.matrices or name.startswith("falcon"), "whose linear layers are of a class of their own"
        assert sizes.outputs == sum(m.nf if hasattr(m, "nf") else m.out_features for m in inside), name


def test_fsdp_divides_weights_gradients_and_moments_and_gathers_a_layer_at_a_time() -> None:
    eight = replace(ONE, name="eight", devices=8)
    alone, ddp, fsdp = llama(), llama(eight), llama(eight, divided=True)
    assert ddp.bytes == alone.bytes, "every process of DDP holds everything"
    trained = 4 * LLAMA_LAYER + 1024 + 16
    assert fsdp.trained == trained
    assert fsdp.bytes["backbone"] == -(-2 * fsdp.parameters // 8)
    assert fsdp.bytes["trained weights"] == fsdp.bytes["gradients"] == -(-4 * trained // 8)
    assert fsdp.bytes["optimiser"] == trained
    # two layers of the backbone, embeddings, head and norm; two of the SideNet in bf16, a gradient in bf16 and float32
    assert fsdp.bytes["gathered"] == 2 * (2 * EMBEDDINGS + 1024 + 2 * LLAMA_LAYER) + LLAMA_LAYER * (4 + 2 + 4)
    for part in ("activations", "logits", "bank", "residual states"):
        assert fsdp.bytes[part] == ddp.bytes[part]
    assert fsdp.total_bytes < ddp.total_bytes
    assert fsdp.traffic == (2 * fsdp.parameters + trained * (2 + 2 + 4)) * 7 / 8
    assert ddp.traffic == 0
    assert any("between devices" in line for line in fsdp.lines())
    assert not any("between devices" in line for line in ddp.lines())


def test_pretraining_divided_by_fsdp_is_as_worked_by_hand() -> None:
    work = Work(rows=2, segment=512, tokens=1000, divided=True)
    found = estimate((LLAMA, work), replace(ONE, devices=4))
    rest = 2 * EMBEDDINGS + 1024
    assert found.bytes["trained weights"] == 4 * found.parameters // 4
    assert found.bytes["gathered"] == rest * (4 + 4) + LLAMA_LAYER * (2 + 2 + 2 + 4)
    assert found.traffic == (8 * LLAMA_LAYER * (2 + 2 + 4) + rest * 8) * 3 / 4
    assert estimate((LLAMA, work), ONE).bytes["gathered"] == 0, "there is nobody to share with"


def test_a_memtrm_divided_is_refused() -> None:
    work = Work(rows=1, segment=64, tokens=1000, memory=256, divided=True)
    with pytest.raises(ConfigError, match=r"which FSDP2 cannot divide; set optim.parallel = 'ddp'"):
        estimate((MemTRMConfig(backbone_config=LLAMA, memory_layer=5), work), ONE)


def test_a_recipe_with_segments_quantisation_or_fsdp_is_estimated_with_them(tmp_path: Path) -> None:
    AlibiGPTConfig(vocab_size=500, hidden_size=32, num_hidden_layers=4, num_attention_heads=4).save_pretrained(tmp_path)

    def work(**changed: dict[str, object]) -> Work:
        settings: dict[str, dict[str, object]] = {
            "data": {"paths": ["x"], "window": 64},
            "backbone": {"path": str(tmp_path)},
            "optim": {"steps": 5, "rows": 2, "accumulate": 3},
        }
        for section, values in changed.items():
            settings[section] |= values
        return estimate(Recipe.parse({"task": "adapt", **settings}), replace(ONE, devices=4)).work

    assert work().tokens == 5 * 2 * 3 * 64 * 4
    assert work(optim={"segments": 4}).tokens == 4 * work().tokens
    assert work(optim={"segments": 4}).segments == 4
    assert work(backbone={"quantised": "4bit"}).quantised == "4bit"
    assert work(optim={"parallel": "fsdp"}).divided
    assert not work().divided
