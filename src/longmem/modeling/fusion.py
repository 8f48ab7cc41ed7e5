"""Memory fusion: how a head mixes what it sees with what it remembers (paper, section 3.3).

B rows · H heads · T tokens · D head_dim
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


def fuse(local_out: Tensor, memory_out: Tensor, found: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Mix local attention with attention over memory: out = (1 - share) * local + share * memory.

    Args:
        local_out: causal attention over the segment, (B, H, T, D).
        memory_out: attention over the retrieved tokens, (B, H, T, D).
        found: (B, H, T) bool, False where a token retrieved nothing.
        logits: broadcast to (B, H, T); their sigmoid is the share given to memory. By the setting ``fusion`` they are
            the gate of each head ("gate": the paper, with the sign of the released code), ``competing`` ("softmax"),
            or a ``TokenGate``'s ("token").

    Returns:
        the mixed heads, bit for bit ``local_out`` wherever nothing was found, and the shares (B, H, T), 0 there.
    """
    share = torch.where(found, torch.sigmoid(logits), 0.0)
    weight = share.unsqueeze(-1).to(local_out.dtype)
    mixed = (1 - weight) * local_out + weight * memory_out.to(local_out.dtype)
    # where() rather than a zero weight: an empty bank must give local_out bit for bit
    return torch.where(found.unsqueeze(-1), mixed, local_out), share


def competing(local_lse: Tensor, memory_lse: Tensor, found: Tensor, memory_gate: Tensor) -> Tensor:
    """The logits (B, H, T) with which ``fuse`` is one softmax over local and retrieved tokens together.

    Let a and b be the log-sum-exps of the local and the memory scores. One softmax over both is the local output and
    the memory output mixed with share sigmoid(b - a). So the share of a token depends on how well its query matches.
    FoT/LongLLaMA also attend to local and memory keys at once.

    Args:
        local_lse: (B, H, T), log of the local softmax's denominator.
        memory_lse: (B, H, T), the same over memory; -inf where nothing was ``found``.
        memory_gate: (H,), added to the memory scores.
    """
    return torch.where(found, memory_lse.float(), 0.0) - local_lse.float() + memory_gate.float().view(1, -1, 1)


class TokenGate(nn.Module):
    """Every token decides for itself how much of each head it gives to memory.

    share = sigmoid(bias + memory_lse_weight * m - local_lse_weight * l
                    + query_vector . q + local_vector . u + memory_vector . v)

    with l and m the log-sum-exps of local and memory scores, q the query without its position, u and v the two outputs.
    Both weights 1 and all else 0 is one softmax over local and retrieved tokens (``competing``). A layer has
    3H + 3HD numbers.

    Args:
        heads: H.
        head_dim: D.
        bias: where the heads' biases start, (H,) or one for all. 0 is one softmax; at -8 memory is hardly read.
    """

    def __init__(self, heads: int, head_dim: int, *, bias: Tensor | float = 0.0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.as_tensor(bias, dtype=torch.float32).expand(heads).clone())
        self.local_lse_weight = nn.Parameter(torch.ones(heads))
        self.memory_lse_weight = nn.Parameter(torch.ones(heads))
        self.query_vector = nn.Parameter(torch.zeros(heads, head_dim))
        self.local_vector = nn.Parameter(torch.zeros(heads, head_dim))
        self.memory_vector = nn.Parameter(torch.zeros(heads, head_dim))

    def forward(
        self,
        queries: Tensor,
        local_out: Tensor,
        local_lse: Tensor,
        memory_out: Tensor,
        memory_lse: Tensor,
        found: Tensor,
    ) -> Tensor:
        """Logits (B, H, T) for ``fuse``: position-free ``queries`` (B, H, T, D), all else as in the functions above."""
        return (
            self.bias.float().view(-1, 1)
            + self.memory_lse_weight.float().view(-1, 1) * torch.where(found, memory_lse.float(), 0.0)
            - self.local_lse_weight.float().view(-1, 1) * local_lse.float()
            + torch.einsum("bhtd,hd->bht", queries.float(), self.query_vector.float())
            + torch.einsum("bhtd,hd->bht", local_out.float(), self.local_vector.float())
            + torch.einsum("bhtd,hd->bht", memory_out.float(), self.memory_vector.float())
        )


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
    length, total, device = queries.shape[2], keys.shape[2], queries.device
    square = mask is None and length in (1, total)  # what torch's fused attention knows as causal without a mask
    fused = softcap is None and (device.type == "cpu" or (device.type == "cuda" and square))
    if mask is None and length > 1 and not (fused and square):
        mask = torch.ones(length, total, dtype=torch.bool, device=device).tril(total - length)
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.finfo(queries.dtype).min
        mask = torch.zeros(mask.shape, dtype=queries.dtype, device=device).masked_fill_(~mask, lowest)
    if mask is not None:
        mask = mask[..., :total]
    if fused:
        return _fused_lse(queries, keys, mask, length > 1 and mask is None, scaling)
    scores = torch.matmul(queries, keys.transpose(-1, -2)).float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores if mask is None else scores + mask.float()).logsumexp(dim=-1)


def _fused_lse(queries: Tensor, keys: Tensor, mask: Tensor | None, causal: bool, scaling: float) -> Tensor:
    """The same from torch's fused attention, which keeps no scores; its own gradient leaves the log-sum-exp out.

    With the keys as values, attention gives out = P K, which is the gradient of the log-sum-exp to the queries; and
    what a gradient q of out gives to the values, P^T q, is its gradient to the keys.
    """
    device = queries.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        queries, keys = queries.to(dtype), keys.to(dtype)
        mask = None if mask is None else mask.to(dtype)
    fixed = queries.detach()
    if device == "cuda":
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            fixed, keys.detach(), keys, None, True, 0.0, causal, scale=scaling
        )
        lse = lse[..., : queries.shape[2]]
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            fixed, keys.detach(), keys, 0.0, causal, attn_mask=mask, scale=scaling
        )
    if not (torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad)):
        return cast(Tensor, lse)
    # zero, with the gradients that the log-sum-exp has
    slope = (queries * out.detach()).sum(-1) + (fixed * out).sum(-1) - 2 * (fixed * out.detach()).sum(-1)
    return cast(Tensor, lse.detach() + scaling * slope.float())
