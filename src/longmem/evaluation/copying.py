"""Can a backbone copy, and which of its layers' keys would be worth remembering?

A model that has learned to copy from its context finds, from the current token, the token that followed an earlier
occurrence of it. The layer whose position-free queries find that token's key is the layer whose keys are worth
keeping: memory is searched with exactly such queries, over exactly such keys. Both are measured on text that is
repeated: the loss of the second pass against the first, and the rank of the right key among all keys of the first pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from longmem.modeling.backbone import position_free_qkv


@dataclass(frozen=True)
class HeadRanks:
    """How well the heads of one layer find the token that followed an earlier occurrence.

    Attributes:
        rank: (H,) median rank of the right key among the keys of the first pass; 1 is best.
        recall: (H,) share of queries whose right chunk is among the best ``num_chunks``.
        keys: how many keys there are to choose from; a blind head's median rank is half of it.
        chance: the recall of a blind head.
    """

    rank: Tensor
    recall: Tensor
    keys: int
    chance: float

    @property
    def score(self) -> float:
        """How far the best quarter of the heads gets from a blind rank (0) to the first (1), on a log scale.

        A quarter, because memory has a gate for every head: a few that find the right key are enough.
        """
        blind = self.keys / 2
        best = self.rank.topk(max(1, len(self.rank) // 4), largest=False).values
        return 1 - best.log().mean().item() / math.log(blind)


@torch.no_grad()
def copy_loss(model: PreTrainedModel, token_ids: Tensor) -> tuple[float, float]:
    """Mean loss, in nats, of the first and the second pass of text (B, n) that is read twice in one window.

    Both passes are scored on the same n-1 targets; the first token has no context in the first pass.
    """
    length = token_ids.shape[1]
    logits = model(torch.cat([token_ids, token_ids], dim=1), use_cache=False).logits[:, :-1]
    targets = torch.cat([token_ids[:, 1:], token_ids], dim=1)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)
    return losses[:, : length - 1].mean().item(), losses[:, length:].mean().item()


@torch.no_grad()
def retrieval_by_layer(
    model: PreTrainedModel, token_ids: Tensor, *, segment: int, chunk_size: int = 4, num_chunks: int = 16
) -> dict[int, HeadRanks]:
    """Rank and recall of the right key for every head of every layer.

    Text of n tokens is encoded twice, in separate segments, as memory and the text that reads it are. The right key for
    the query of token t in the second pass is that of token t+1 in the first, where the model should look to copy. The
    second pass is cut half a segment later, so that no query has the context of its key.

    Args:
        token_ids: (B, n) text; n is the distance over which it repeats. Tokens beyond whole segments are left out.
        segment: tokens encoded at once; at most the model's window.
        num_chunks: R, chunks that a query may retrieve; the paper retrieves 64 tokens in chunks of 4.
    """
    segment = min(segment, token_ids.shape[1])
    length = token_ids.shape[1] // segment * segment
    ranks: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for row in token_ids[:, :length]:  # row by row: all layers' keys are held at once
        first = position_free_qkv(model, row.view(-1, segment))
        second = position_free_qkv(model, row.roll(-(segment // 2)).view(-1, segment))
        for layer in first:
            # (segments, H, T, D) -> (H, segments * T, D)
            queries = second[layer].queries.transpose(0, 1).flatten(1, 2).roll(segment // 2, dims=1)
            keys = first[layer].keys.transpose(0, 1).flatten(1, 2)
            ranks.setdefault(layer, []).append(_ranks(queries, keys, chunk_size))
    chance = min(1.0, num_chunks / max(1, length // chunk_size))
    found = {}
    for layer, rows in ranks.items():
        by_token, by_chunk = (torch.cat(each, dim=1) for each in zip(*rows, strict=True))
        recall = (by_chunk <= num_chunks).float().mean(dim=1)
        found[layer] = HeadRanks(by_token.median(dim=1).values, recall, length, chance)
    return found


def random_tokens(vocab_size: int, rows: int, length: int, *, seed: int = 0, special: Sequence[int] = ()) -> Tensor:
    """(rows, length) token ids drawn at random, none twice in a row of the result while the vocabulary lasts."""
    generator = torch.Generator().manual_seed(seed)
    ordinary = torch.tensor([token for token in range(vocab_size) if token not in set(special)])
    times = range(math.ceil(length / len(ordinary)))
    draws = [[ordinary[torch.randperm(len(ordinary), generator=generator)] for _ in times] for _ in range(rows)]
    return torch.stack([torch.cat(parts)[:length] for parts in draws])


def _ranks(queries: Tensor, keys: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Ranks (H, n-1) of the next token's key and (H, n') of its chunk, from queries (H, n, D) and keys (Hkv, n, D).

    Equal scores share their mean rank. A last, short chunk is left out, and so are the queries that look for it.
    """
    heads, length, _ = queries.shape
    whole = length // chunk_size * chunk_size
    group = heads // keys.shape[0]
    following = torch.arange(1, length, device=keys.device)
    by_token, by_chunk = [], []
    for head in range(heads):
        own = keys[head // group].float()
        chunks = own[:whole].view(-1, chunk_size, own.shape[1]).mean(dim=1)
        asked = queries[head, :-1].float()
        by_token.append(_rank(asked @ own.T, following))
        by_chunk.append(_rank(asked[: whole - 1] @ chunks.T, following[: whole - 1] // chunk_size))
    return torch.stack(by_token).cpu(), torch.stack(by_chunk).cpu()


def _rank(scores: Tensor, right: Tensor) -> Tensor:
    """(Q, N) scores, (Q,) right answers -> (Q,) ranks."""
    wanted = scores.gather(1, right[:, None])
    above, level = (scores > wanted).sum(dim=1), (scores == wanted).sum(dim=1)
    return above.float() + (level + 1) / 2
