"""A GGUF file becomes a model folder once, complete or absent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.family_table import C, H, L, V, make_backbone
from transformers import AutoModelForCausalLM, AutoTokenizer

from longmem import LongMem
from longmem.errors import BackboneError
from longmem.modeling import loading as module
from longmem.modeling.loading import gguf_folder, is_gguf

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    model = make_backbone("llama")
    out = gguf.GGUFWriter(str(path), "llama")
    out.add_context_length(128)
    out.add_embedding_length(C)
    out.add_block_count(L)
    out.add_feed_forward_length(model.config.intermediate_size)
    out.add_head_count(H)
    out.add_head_count_kv(2)
    out.add_layer_norm_rms_eps(1e-6)
    out.add_rope_dimension_count(C // H)
    out.add_vocab_size(V)
    out.add_rope_freq_base(10000.0)
    out.add_tokenizer_model("gpt2")
    out.add_token_list([*(chr(33 + i) for i in range(90)), "AB", *(f"<{i}>" for i in range(V - 91))])
    out.add_token_types([1] * V)
    out.add_token_merges(["A B"])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, L)
    for name, tensor in model.state_dict().items():
        out.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.float().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LONGMEM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_folder_is_the_model_that_transformers_reads_from_the_file(file: Path) -> None:
    folder = gguf_folder(file)
    model = AutoModelForCausalLM.from_pretrained(folder)
    direct = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), direct.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name
    assert getattr(model.config, "quantization_config", None) is None
    assert AutoTokenizer.from_pretrained(folder)("ABC", add_special_tokens=False)["input_ids"] == [90, 34]


def test_a_file_is_converted_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = gguf_folder(file)
    monkeypatch.setattr(module, "_convert", lambda *_: pytest.fail("converted again"))
    assert gguf_folder(file) == folder


def test_reading_a_large_file_to_know_it_shows_progress(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf_folder(file)
    monkeypatch.setattr("longmem.progress.EVERY", {True: 0.0, False: 0.0})
    capsys.readouterr()
    gguf_folder(file)
    size = file.stat().st_size
    assert f"checking: {size:,} of {size:,} bytes" in capsys.readouterr().err


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path: Path, cache: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but not really")
    with pytest.raises(BackboneError, match=r"broken\.gguf cannot be read as a GGUF model"):
        gguf_folder(broken)
    with pytest.raises(BackboneError, match=r"is not a file; give the path of a \.gguf file"):
        gguf_folder(tmp_path / "none.gguf")
    assert is_gguf("models/Model.GGUF") and not is_gguf("models/gguf")
    assert list((cache / "gguf").iterdir()) == []


def test_a_file_is_a_backbone_that_is_found_again(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(file.parent)
    model = LongMem.from_backbone(file.name, num_retrieved=8)
    model.save_pretrained(tmp_path / "side")
    monkeypatch.chdir(tmp_path)
    loaded = LongMem.from_pretrained("side")
    assert loaded.config.backbone_name_or_path == str(file)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
