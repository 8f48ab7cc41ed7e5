"""The released formats through ``longmem convert``, and the SideNet's start from its backbone."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tests.parity.reference import Case, Reference, close
from transformers import AutoModelForCausalLM

from longmem import LongMem, LongMemConfig
from longmem.cli.train import convert as command
from longmem.convert import SHARED, SIDE_NORM_EPS, backbone_from_fairseq, backbone_name, read_fairseq, side_name


def convert(*arguments: object) -> dict[str, object]:
    done = CliRunner().invoke(command, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def eval_case(reference: Reference) -> Case:
    """A case that starts with an empty memory, with logits of model and backbone."""
    for name, record in reference.record["cases"].items():
        case = Case(reference, name)
        if record["kind"] == "eval" and {"seg0.logits", "seg0.backbone_logits"} <= case.tensors.keys():
            return case
    raise AssertionError(f"{reference.path}: has no case with logits of its first segment")


def test_a_fresh_sidenet_starts_as_the_released_one_does(reference: Reference) -> None:
    config = reference.config
    backbone = backbone_from_fairseq(read_fairseq(reference.file("longmem.safetensors"), reference.path))
    model = LongMem(
        LongMemConfig(
            backbone_config=backbone.config,
            memory_layer=config["retrieval_layer_index"],
            stride=config["layer_reduction_factor"],
            chunk_size=config["chunk_size"],
            num_retrieved=config["k"],
            init="copy",
            final_state="normed",
            side_activation="gelu",
            side_norm_eps=SIDE_NORM_EPS,
        ),
        backbone,
    )
    ours = model.sidenet.state_dict()
    theirs = load_file(reference.file("sidenet_init.safetensors"))
    named = {side_name(name): value for name, value in theirs.items() if side_name(name) is not None}
    assert named.keys() == ours.keys()
    for name, value in named.items():
        assert torch.equal(ours[name], value), name
    assert model.augmented_layer == config["side_memory_layer"]


def test_a_longmem_checkpoint_opens_with_from_pretrained(reference: Reference, tmp_path: Path) -> None:
    case = eval_case(reference)
    input_ids = case.segment(case.tensors, 0).cpu()
    files = [reference.file("longmem.safetensors"), *reference.checkpoints("longmem")]
    for number, file in enumerate(files):
        out = tmp_path / str(number)
        settings = ("--settings", reference.path) if file.suffix == ".safetensors" else ()
        done = convert(file, "--out", out, *settings)
        assert done["kind"] == "longmem"
        model = LongMem.from_pretrained(out)
        assert model.config.num_retrieved == reference.config["k"]
        assert model.config.chunk_size == reference.config["chunk_size"]
        assert model.config.memory_layer == reference.config["retrieval_layer_index"]
        with torch.no_grad():
            close(model(input_ids).logits, case.tensors["seg0.logits"].cpu(), f"{file.name}: logits")
            alone = model.backbone.model(input_ids).logits
        close(alone, case.tensors["seg0.backbone_logits"].cpu(), f"{file.name}: backbone logits")


def test_a_backbone_checkpoint_opens_as_a_transformers_model(reference: Reference, tmp_path: Path) -> None:
    case = eval_case(reference)
    input_ids = case.segment(case.tensors, 0).cpu()
    whole = read_fairseq(reference.file("longmem.safetensors"), reference.path).backbone
    for number, file in enumerate(reference.checkpoints("backbone")):
        out = tmp_path / str(number)
        done = convert(file, "--out", out)
        model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        dtype = next(model.parameters()).dtype
        assert done["kind"] == "backbone"
        assert done["dtype"] == str(dtype).removeprefix("torch.")
        state = model.state_dict()
        assert state.keys() == whole.keys()
        for name, value in whole.items():
            assert torch.equal(state[name], value.to(dtype)), f"{file.name}: {name}"
        if dtype == torch.float32:
            with torch.no_grad():
                close(model(input_ids).logits, case.tensors["seg0.backbone_logits"].cpu(), f"{file.name}: logits")


def test_a_half_checkpoint_may_be_written_in_float32(reference: Reference, tmp_path: Path) -> None:
    for file in reference.checkpoints("backbone_namespace_fp16"):
        done = convert(file, "--out", tmp_path / "out", "--dtype", "float32")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
        stored = read_fairseq(file).backbone
        assert done["dtype"] == "float32"
        for name, value in model.state_dict().items():
            assert torch.equal(value, stored[name].float()), name


def test_the_two_shared_tensors_are_kept_once(reference: Reference, tmp_path: Path) -> None:
    official = load_file(reference.file("longmem.safetensors"))
    distinct = sum(
        value.numel() for name, value in official.items() if name not in SHARED and name != "decoder.version"
    )
    done = convert(reference.file("longmem.safetensors"), "--settings", reference.path, "--out", tmp_path / "out")
    assert done["parameters"] == distinct
    assert done["trained"] == sum(value.numel() for name, value in official.items() if side_name(name) is not None)
    assert done["ignored"] == []
    written = sum(
        value.numel() for file in (tmp_path / "out").rglob("*.safetensors") for value in load_file(file).values()
    )
    assert written == distinct


def test_a_sidenet_alone_takes_its_backbone_from_another_checkpoint(reference: Reference, tmp_path: Path) -> None:
    if not reference.checkpoints("backbone_plain"):
        pytest.skip("this reference has no backbone checkpoint")
    case = eval_case(reference)
    checkpoint = torch.load(reference.checkpoints("longmem_plain")[0], weights_only=True)
    checkpoint["model"] = {name: value for name, value in checkpoint["model"].items() if backbone_name(name) is None}
    torch.save(checkpoint, tmp_path / "side.pt")
    convert(tmp_path / "side.pt", "--backbone", reference.checkpoints("backbone_plain")[0], "--out", tmp_path / "out")
    with torch.no_grad():
        logits = LongMem.from_pretrained(tmp_path / "out")(case.segment(case.tensors, 0).cpu()).logits
    close(logits, case.tensors["seg0.logits"].cpu(), "logits")
