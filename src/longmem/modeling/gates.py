"""``TokenGate``: every token decides for itself how much of each head it gives to memory.

B rows · H heads · T tokens · D head_dim
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longmem.modeling.fusion import Fused, mix


class TokenGate(nn.Module):
    """The share of memory in each head, from what the token saw locally and what it found.

    share = sigmoid(bias + memory_lse_weight * m - local_lse_weight * l
                    + query_vector . q + local_vector . u + memory_vector . v)

    with l and m the log-sum-exps of local and memory scores, q the query without its position, u and v the two outputs.
    Both weights 1 and all else 0 is one softmax over local and retrieved tokens (``fuse_softmax``). A layer has
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
    ) -> Fused:
        """Mix both outputs.

        Args:
            queries: position-free, (B, H, T, D).
            local_out: attention over the window, (B, H, T, D).
            local_lse: (B, H, T), log of the local softmax's denominator.
            memory_out: attention over what was retrieved, (B, H, T, D).
            memory_lse: (B, H, T); -inf where nothing was found.
            found: (B, H, T) bool.

        Returns:
            (B, H, T, D), bit for bit ``local_out`` where nothing was found, and the shares (B, H, T).
        """
        logit = (
            self.bias.float().view(-1, 1)
            + self.memory_lse_weight.float().view(-1, 1) * torch.where(found, memory_lse.float(), 0.0)
            - self.local_lse_weight.float().view(-1, 1) * local_lse.float()
            + torch.einsum("bhtd,hd->bht", queries.float(), self.query_vector.float())
            + torch.einsum("bhtd,hd->bht", local_out.float(), self.local_vector.float())
            + torch.einsum("bhtd,hd->bht", memory_out.float(), self.memory_vector.float())
        )
        return mix(local_out, memory_out, found, torch.sigmoid(logit))
