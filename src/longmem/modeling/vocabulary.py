"""Give a language model another tokenizer and keep what its layers know.

The new token's rows of embedding and head are the mean of the rows of the old tokens that spell it (fast vocabulary
transfer, Gee et al. 2022, https://aclanthology.org/2022.emnlp-industry.41); a token that both vocabularies have keeps
its rows. A short further training then mends the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def same_vocabulary(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> bool:
    """Whether equal ids stand for equal tokens."""
    return bool(old.get_vocab() == new.get_vocab())


@torch.no_grad()
def change_vocabulary(
    model: PreTrainedModel, old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Resize embedding and head to a new tokenizer, in place, and fill them from the old rows."""
    pieces = spelled(old, new)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, nn.Embedding)
    tied = isinstance(head, nn.Linear) and head.weight is embedding.weight
    rows = _means(embedding.weight, pieces)
    head_rows = _means(head.weight, pieces) if isinstance(head, nn.Linear) and not tied else None
    biases = _means(head.bias[:, None], pieces)[:, 0] if isinstance(head, nn.Linear) and head.bias is not None else None
    model.resize_token_embeddings(len(new), mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, nn.Embedding) and (head is None or isinstance(head, nn.Linear))
    embedding.weight.copy_(rows)
    if head is not None and head_rows is not None:
        head.weight.copy_(head_rows)
    if head is not None and biases is not None:
        head.bias.copy_(biases)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(new, name))
        if model.generation_config is not None:
            setattr(model.generation_config, name, getattr(new, name))
    return model


def spelled(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> list[list[int]]:
    """For every id of ``new``, the ids of ``old`` that spell it; empty where nothing does."""
    known, special = old.get_vocab(), dict(zip(new.all_special_ids, new.all_special_tokens, strict=True))
    roles = {getattr(new, role): getattr(old, role) for role in ("bos_token", "eos_token", "pad_token", "unk_token")}
    found: list[list[int]] = [[] for _ in range(len(new))]
    for token, number in new.get_vocab().items():
        name = roles.get(token) or token if number in special else token
        if name in known:
            found[number] = [known[name]]
        elif number not in special:
            found[number] = old(new.decode([number]), add_special_tokens=False)["input_ids"]
    return found


def _means(table: Tensor, pieces: list[list[int]]) -> Tensor:
    """(V old, C) -> (V new, C); a token that nothing spells gets the mean of all."""
    everything = table.mean(dim=0)
    return torch.stack([table[torch.tensor(ids)].mean(dim=0) if ids else everything for ids in pieces])
