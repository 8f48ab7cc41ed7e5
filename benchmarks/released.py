"""A step as the released code does it, restated for the sake of a ratio taken in one process.

Written from our notes on what that code computes and where it spends its time (docs/differences.md), not from its
text. It takes the weights of a ``LongMem`` over an ``AlibiGPT`` made with the released settings, so that both compute
the same numbers: attention written out in float32, the head evaluated a second time and thrown away, queries of the
memory layer projected twice, one search per head, copies of the keys and values of every token and head, and copies of
every index when the store evicts.

B rows · T tokens · H heads · D head_dim · E width · S tokens per chunk · R retrieved chunks · N = B*T queries per head
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

from longmem.modeling.alibi_gpt import alibi_slopes
from longmem.modeling.longmem import LongMem


class ReleasedMemory:
    """One memory for all rows: per head a flat index of chunk means, and stores (slots, S, D) of keys and values."""

    def __init__(self, capacity_tokens: int, heads: int, head_dim: int, chunk_size: int) -> None:
        self.slots, self.heads, self.chunk_size = capacity_tokens // chunk_size, heads, chunk_size
        self.indexes = torch.zeros(heads, self.slots, head_dim)
        self.keys, self.values = (torch.zeros(heads, self.slots, chunk_size, head_dim) for _ in range(2))
        self.fill = 0

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Write a segment, keys and values (B, T, H, D): flattened row after row, the tail dropped."""
        tokens = keys.shape[0] * keys.shape[1]
        count = tokens // self.chunk_size
        if self.fill + count >= self.slots:
            self._evict(2 * tokens // self.chunk_size)
        chunks = [
            part.flatten(0, 1)[: count * self.chunk_size].transpose(0, 1).unflatten(1, (count, self.chunk_size))
            for part in (keys, values)
        ]
        self.indexes[:, self.fill : self.fill + count] = chunks[0].mean(2)
        self.keys[:, self.fill : self.fill + count] = chunks[0]
        self.values[:, self.fill : self.fill + count] = chunks[1]
        self.fill += count

    def _evict(self, count: int) -> None:
        left = self.fill - count
        for index in self.indexes:
            taken_out = index[: self.fill].clone()
            index[:left] = taken_out[count:].clone()
        for store in (self.keys, self.values):
            store[:, :left] = store[:, count : self.fill].clone()
            store[:, left:] = 0
        self.fill = left

    def retrieve(self, queries: Tensor, num_chunks: int) -> tuple[Tensor, Tensor]:
        """Copies of what queries (H, N, D) find: keys and values (H, N, K, D)."""
        keys, values = [], []
        for head in range(self.heads):
            found = torch.topk(
                queries[head] @ self.indexes[head, : self.fill].T, min(num_chunks, self.fill), dim=-1
            ).indices
            found = F.pad(found, (0, num_chunks - found.shape[1]), value=self.slots - 1)
            keys.append(self.keys[head][found].flatten(1, 2))
            values.append(self.values[head][found].flatten(1, 2))
        return torch.stack(keys), torch.stack(values)


class ReleasedStep:
    """Forward, backward and writing of one segment with the weights of ``model``.

    Args:
        model: over an ``AlibiGPT``, with ``side_activation="gelu"``, ``side_norm_eps=1e-5``, ``final_state="normed"``.
        memory: what it reads and then writes.
    """

    def __init__(self, model: LongMem, memory: ReleasedMemory) -> None:
        self.model, self.memory = model, memory
        self.heads = model.num_heads
        self.slopes = alibi_slopes(self.heads)
        self.activation = ACT2FN["gelu_new"]

    def logits(self, input_ids: Tensor, parts: dict[str, float] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, T, V), and keys and values (B, T, H, D) to be written."""
        parts = {} if parts is None else parts
        start = time.perf_counter()
        with torch.no_grad():
            states, keys, values = self._backbone(input_ids)
        parts["backbone"] = time.perf_counter() - start
        side, stride = self.model.sidenet, self.model.config.stride
        hidden = states[0]
        for index, layer in enumerate(side.layers):
            normed = layer.ln_1(hidden)
            reads = index == side.augmented_layers[0] and self.memory.fill > 0
            attended = self._attention(layer.attn, normed, self._found(layer.attn, normed, parts) if reads else None)
            ffn = layer.mlp.fc_out(F.gelu(layer.mlp.fc_in(normed)))
            hidden = hidden + (states[stride * (index + 1)] - states[stride * index]) + attended + ffn
        return self.model.get_output_embeddings()(side.final_norm(hidden)), keys, values

    def __call__(self, input_ids: Tensor, labels: Tensor) -> dict[str, float]:
        """One step without the optimiser; returns the seconds of its parts."""
        parts: dict[str, float] = {}
        logits, keys, values = self.logits(input_ids, parts)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
        start = time.perf_counter()
        self.memory.add(keys, values)
        parts["add"] = time.perf_counter() - start
        return parts

    def _backbone(self, input_ids: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """All states, the last one normed; keys and values (B, T, H, D) of the memory layer."""
        backbone: Any = self.model.backbone.model
        hidden = backbone.transformer.wte(input_ids)
        states, kept = [hidden], []
        for index, block in enumerate(backbone.transformer.h):
            normed = block.ln_1(hidden)
            if index == self.model.memory_layer:
                kept = [self._split(part(normed)) for part in (block.attn.k_proj, block.attn.v_proj)]
            ffn = block.mlp.fc_out(self.activation(block.mlp.fc_in(normed)))
            hidden = hidden + self._attention(block.attn, normed, None) + ffn
            states.append(hidden)
        states[-1] = backbone.transformer.ln_f(hidden)
        backbone.lm_head(states[-1])  # evaluated and thrown away
        return states, *kept

    def _found(self, attn: Any, normed: Tensor, parts: dict[str, float]) -> tuple[Tensor, Tensor]:
        """What the layer's own queries retrieve: (B, H, T, K, D), twice."""
        start = time.perf_counter()
        config = self.model.config
        with torch.no_grad():
            queries = self._split(attn.q_proj(normed)).permute(2, 0, 1, 3)  # (H, B, T, D)
            found = self.memory.retrieve(queries.flatten(1, 2), config.num_retrieved // config.chunk_size)
            shape = queries.shape[:3]
            keys, values = (part.unflatten(1, shape[1:]).transpose(0, 1) for part in found)
        parts["retrieve"] = time.perf_counter() - start
        return keys, values

    def _attention(self, attn: Any, normed: Tensor, found: tuple[Tensor, Tensor] | None) -> Tensor:
        """Causal ALiBi attention written out, (B, T, E); joint with what was found."""
        queries, keys, values = (
            self._split(part(normed)).transpose(1, 2).float() for part in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        length = normed.shape[1]
        queries = queries * attn.scaling
        scores = queries @ keys.transpose(-1, -2) + self.slopes.view(-1, 1, 1) * torch.arange(length)
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
        out = scores.softmax(-1) @ values
        if found is not None:
            weights = (queries[:, :, :, None] * found[0]).sum(-1).softmax(-1)
            recalled = (weights[..., None] * found[1]).sum(-2)
            share = torch.sigmoid(self.model.sidenet.memory_gate).view(-1, 1, 1)
            out = (1 - share) * out + share * recalled
        merged: Tensor = attn.out_proj(out.transpose(1, 2).flatten(2))
        return merged

    def _split(self, hidden: Tensor) -> Tensor:
        """(B, T, E) -> (B, T, H, D)."""
        return hidden.unflatten(-1, (self.heads, -1))
