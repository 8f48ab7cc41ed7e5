"""What a forward with memory gives back.

B rows · T tokens · C width · H heads · Hkv key/value heads · D head_dim
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from longmem.modeling.explain import Explanation
from longmem.types import AttentionKV, RetrievedMemory


@dataclass
class LongMemOutput(CausalLMOutputWithPast):
    """The backbone's output with what memory needs.

    Attributes:
        kv: position-free keys and values of the memory layer, (B, Hkv, T, D); write them with ``bank.add(out.kv)``.
        retrieved: what the augmented layer found; None without memory.
        share: (B, H, T), the share of each token and head given to memory; None without memory.
        explanation: what each token and head read, with ``explain=True``; None without memory.
        side_hidden: SideNet input and layer outputs, (B, T, C) each, with ``output_side_hidden=True``.
    """

    kv: AttentionKV | None = None
    retrieved: RetrievedMemory | None = None
    share: Tensor | None = None
    explanation: Explanation | None = None
    side_hidden: tuple[Tensor, ...] | None = None


def padding_of(attention_mask: Tensor | None, input_ids: Tensor | None) -> Tensor | None:
    """(B, T) bool, False at the pads among the T tokens of a call; None where all are real.

    A static cache brings masks (B, 1, T, slots) that say what each token sees; what is written comes from calls
    without a cache.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2 or input_ids is None:
        return None
    return attention_mask[:, -input_ids.shape[1] :].bool()
