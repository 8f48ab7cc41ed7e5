"""Memory fusion: how a head mixes what it sees with what it remembers (paper, section 3.3).

B rows · H heads · T tokens · D head_dim
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Fused(NamedTuple):
    """The mixed heads (B, H, T, D), and the share (B, H, T) of each that comes from memory."""

    out: Tensor
    share: Tensor


def fuse(local_out: Tensor, memory_out: Tensor, found: Tensor, memory_gate: Tensor) -> Fused:
    """Mix local attention with attention over memory by a static gate per head.

    Args:
        local_out: causal attention over the segment, (B, H, T, D).
        memory_out: attention over the retrieved tokens, (B, H, T, D).
        found: (B, H, T) bool, False where a token retrieved nothing.
        memory_gate: logit (H,); its sigmoid is the share given to memory, as in the released code.

    Returns:
        the mixed heads, bit for bit ``local_out`` wherever nothing was found, and the shares, 0 there.
    """
    share = torch.sigmoid(memory_gate.float()).view(1, -1, 1).expand(found.shape)
    return mix(local_out, memory_out, found, share)


def fuse_softmax(
    local_out: Tensor, local_lse: Tensor, memory_out: Tensor, memory_lse: Tensor, found: Tensor, memory_gate: Tensor
) -> Fused:
    """One softmax over local and retrieved tokens together, with a bias per head on the memory scores.

    Let a and b be the log-sum-exps of the local and the memory scores. One softmax over both is the local output and
    the memory output mixed with share sigmoid(b - a). So the share of a token depends on how well its query matches.
    FoT/LongLLaMA also attend to local and memory keys at once.

    Args:
        local_out, memory_out, found: as in ``fuse``.
        local_lse: (B, H, T), log of the local softmax's denominator.
        memory_lse: (B, H, T), the same over memory; -inf where nothing was found.
        memory_gate: (H,), added to the memory scores.
    """
    difference = torch.where(found, memory_lse.float(), 0.0) - local_lse.float()
    share = torch.sigmoid(difference + memory_gate.float().view(1, -1, 1))
    return mix(local_out, memory_out, found, share)


def mix(local_out: Tensor, memory_out: Tensor, found: Tensor, share: Tensor) -> Fused:
    """Local and memory outputs mixed by ``share`` (B, H, T), which counts only where something was found."""
    share = torch.where(found, share, 0.0)
    weight = share.unsqueeze(-1).to(local_out.dtype)
    mixed = (1 - weight) * local_out + weight * memory_out.to(local_out.dtype)
    # where() rather than a zero weight: an empty bank must give local_out bit for bit
    return Fused(torch.where(found.unsqueeze(-1), mixed, local_out), share)


def local_lse(
    queries: Tensor, keys: Tensor, mask: Tensor | None, *, scaling: float, softcap: float | None = None
) -> Tensor:
    """Log of the local softmax's denominator, (B, H, T).

    Args:
        queries: (B, H, T, D), with their positions.
        keys: (B, Hkv, T_keys, D).
        mask: additive or boolean (True = visible), broadcast to (B, H, T, T_keys); None is causal.
    """
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    scores = torch.matmul(queries, keys.transpose(-1, -2)).float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        past = keys.shape[2] - queries.shape[2]
        mask = torch.ones(queries.shape[2], keys.shape[2], dtype=torch.bool, device=queries.device).tril(past)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask.float()[..., : keys.shape[2]]
    return scores.logsumexp(dim=-1)
