"""Loading backbones."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

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
