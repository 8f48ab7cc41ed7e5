"""The shared fixtures are what they promise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedTokenizerFast

from longmem import AlibiGPTForCausalLM


def test_byte_tokenizer_gives_back_any_text(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Zoë said:\t“naïve” \n\n 1 + 1 = 2"
    ids = byte_tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert byte_tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_made_text_is_the_same_for_the_same_seed_and_its_names_come_back(made_text: Callable[..., str]) -> None:
    text = made_text(200, seed=3)
    assert text == made_text(200, seed=3) != made_text(200, seed=4)
    assert text.count(text.split()[0]) > 5


def test_tiny_backbone_reads_bytes(tiny_backbone: AlibiGPTForCausalLM, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = torch.tensor([byte_tokenizer("abc")["input_ids"]])
    assert tiny_backbone(ids).logits.shape == (1, 3, len(byte_tokenizer))
