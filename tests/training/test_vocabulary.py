"""Another tokenizer for a trained model."""

from __future__ import annotations

import pytest
import torch
from tests.family_table import make_backbone
from transformers import PreTrainedTokenizerFast

from longmem.data.tokens import train_tokenizer
from longmem.modeling.alibi_gpt import AlibiGPTConfig, AlibiGPTForCausalLM
from longmem.training.vocabulary import change_vocabulary, same_vocabulary, spelled


@pytest.fixture(scope="module")
def tokenizers() -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    old = train_tokenizer(["the cat sat on the mat, the cat sat "] * 50, 270)
    return old, train_tokenizer(["def cat(mat): return the[mat] "] * 50, 280)


def test_a_token_is_spelled_by_the_old_ones(
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast],
) -> None:
    old, new = tokenizers
    assert not same_vocabulary(old, new)
    pieces = spelled(old, new)
    for token, number in new.get_vocab().items():
        if number not in new.all_special_ids and "�" not in new.decode([number]):
            assert old.decode(pieces[number]) == new.decode([number]), token
    assert pieces[new.eos_token_id] == [old.eos_token_id]


def test_embedding_head_and_bias_are_means_of_the_old_rows(
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast],
) -> None:
    old, new = tokenizers
    torch.manual_seed(0)
    config = AlibiGPTConfig(vocab_size=len(old), hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = AlibiGPTForCausalLM(config)
    torch.nn.init.normal_(model.get_output_embeddings().bias)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    change_vocabulary(model, old, new)
    pieces = spelled(old, new)
    after = model.state_dict()
    for name, weight in after.items():
        if len(before[name]) == len(weight):
            assert torch.equal(weight, before[name])
            continue
        assert len(weight) == len(new)
        for number, ids in enumerate(pieces):
            expected = before[name][ids].mean(0) if ids else before[name].mean(0)
            torch.testing.assert_close(weight[number], expected)
    assert model.config.vocab_size == len(new)
    assert model.config.eos_token_id == new.eos_token_id


def test_tied_embeddings_stay_tied(tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]) -> None:
    old, new = tokenizers
    model = make_backbone("gpt2")
    model.resize_token_embeddings(len(old))
    change_vocabulary(model, old, new)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model(torch.tensor([[len(new) - 1]])).logits.shape[-1] == len(new)
