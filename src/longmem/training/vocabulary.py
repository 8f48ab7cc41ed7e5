"""Give a language model another tokenizer and keep what its layers know.

The new token's rows of embedding and head are the mean of the rows of the old tokens that spell it (fast vocabulary
transfer, Gee et al. 2022, https://aclanthology.org/2022.emnlp-industry.41); a token that both vocabularies have keeps
its rows. A short further training then mends the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor
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
    rows = [_means(table, pieces) for table in _tables(model)]
    model.resize_token_embeddings(len(new), mean_resizing=False)
    for table, means in zip(_tables(model), rows, strict=True):
        table.copy_(means)
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


def _tables(model: PreTrainedModel) -> list[Tensor]:
    """What has a row for each token: the weights of embedding and head, once where they are tied, and the bias."""
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    found = (parameter for part in parts if part is not None for parameter in part.parameters())
    return list({id(parameter): parameter for parameter in found}.values())


def _means(table: Tensor, pieces: list[list[int]]) -> Tensor:
    """(V old, ...) -> (V new, ...); a token that nothing spells gets the mean of all."""
    everything = table.mean(dim=0)
    return torch.stack([table[torch.tensor(ids)].mean(dim=0) if ids else everything for ids in pieces])
