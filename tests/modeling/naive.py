"""The paper in plain loops, to be checked by hand: the oracle of the fast path.

Everything is for one row, one head, one token at a time, on plain lists of vectors; no cache, no blocks, no masks.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longmem.modeling.alibi_gpt import alibi_slopes

Chunk = list[tuple[Tensor, Tensor]]
"""The (key, value) pairs, each (D,), of consecutive tokens."""


def chunks_of(keys: Tensor, values: Tensor, chunk_size: int) -> list[Chunk]:
    """Cut one head's keys and values (T, D) into chunks; a shorter last one holds what is left (section 3.3)."""
    pairs = list(zip(keys, values, strict=True))
    return [pairs[i : i + chunk_size] for i in range(0, len(pairs), chunk_size)]


def chunk_key(chunk: Chunk) -> Tensor:
    """What stands for a chunk in the search: the mean of its keys, (D,)."""
    total = torch.zeros_like(chunk[0][0])
    for key, _ in chunk:
        total = total + key
    return total / len(chunk)


def search(query: Tensor, memory: Sequence[Chunk], num_chunks: int) -> list[int]:
    """Indices of the chunks with the largest inner products, best first."""
    ranked = sorted(range(len(memory)), key=lambda i: -float(query @ chunk_key(memory[i])))
    return ranked[:num_chunks]


def attend(query: Tensor, pairs: Chunk, biases: Sequence[float], scaling: float) -> Tensor:
    """Softmax attention of one query over (key, value) pairs, (D,)."""
    scores = [float(query @ key) * scaling + bias for (key, _), bias in zip(pairs, biases, strict=True)]
    largest = max(scores)
    weights = [torch.tensor(score - largest).exp() for score in scores]
    total = torch.zeros_like(query)
    for weight, (_, value) in zip(weights, pairs, strict=True):
        total = total + weight * value
    return total / torch.stack(weights).sum()


def joint_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    memory: Sequence[Sequence[Chunk]],
    num_chunks: int,
    gate: Tensor,
    scaling: float,
    slopes: Sequence[float],
    recency: float,
    segments: Sequence[int],
) -> Tensor:
    """Local attention mixed with attention over what each token retrieves (section 3.3), for one row.

    Args:
        queries: (H, T, D), as are keys and values.
        memory: the chunks of each head.
        gate: (H,); its sigmoid is the share given to memory.
        slopes: ALiBi slope of each head.
        recency: what a chunk loses to one of a later segment that is found and whose mean key matches as well.
        segments: the segment of each chunk.

    Returns:
        (H, T, D).
    """
    out = torch.zeros_like(queries)
    for head in range(queries.shape[0]):
        for token in range(queries.shape[1]):
            query = queries[head, token]
            seen: Chunk = [(keys[head, j], values[head, j]) for j in range(token + 1)]
            local = attend(query, seen, [-slopes[head] * (token - j) for j in range(token + 1)], scaling)
            found = search(query, memory[head], num_chunks)
            if not found:
                out[head, token] = local
                continue
            remembered: Chunk = [pair for index in found for pair in memory[head][index]]
            means = {index: float(query @ chunk_key(memory[head][index])) * scaling for index in found}
            lost = dict.fromkeys(found, 0.0)
            for index in found:
                for other in found:
                    if segments[other] > segments[index]:
                        alike = min(1.0, math.exp(means[other] - means[index]))
                        lost[index] = max(lost[index], recency * alike)
            # memory as a whole is not read less for it
            back = math.log(
                sum(math.exp(means[index]) for index in found)
                / sum(math.exp(means[index] - lost[index]) for index in found)
            )
            biases = [back - lost[index] for index in found for _ in memory[head][index]]
            read = attend(query, remembered, biases, scaling)
            share = torch.sigmoid(gate[head])
            out[head, token] = (1 - share) * local + share * read
    return out


class NaiveLongMem:
    """A ``LongMem`` over an ``AlibiGPT``, one row at a time, with lists for a memory.

    Args:
        model: whose weights are read; ``fusion`` must be ``gate``.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        self.memory: list[list[Chunk]] = [[] for _ in range(model.num_heads)]
        self.segments: list[int] = []  # of each chunk

    def step(self, input_ids: Tensor) -> Tensor:
        """Logits (T, V) of one segment (T,); reads memory first, writes the segment afterwards."""
        backbone = self.model.backbone.model
        states = [backbone.transformer.wte(input_ids)]
        cached: tuple[Tensor, Tensor] | None = None
        for index, block in enumerate(backbone.transformer.h):
            normed = block.ln_1(states[-1])
            _, keys, values = self._heads(block.attn, normed)
            if index == self.model.memory_layer:
                cached = (keys, values)
            states.append(self._block(block, states[-1], memory=None))
        side = self.model.sidenet
        ends = [*states[:-1], backbone.transformer.ln_f(states[-1])] if side.final_state == "normed" else states
        hidden = states[0]
        for index, layer in enumerate(side.layers):
            reads = self.memory if index == self.model.augmented_layer else None
            last = index == len(side.layers) - 1
            end = ends[-1] if last else ends[self.model.config.stride * (index + 1)]
            hidden = self._block(layer, hidden, reads) + (end - states[self.model.config.stride * index])
        logits: Tensor = backbone.lm_head(side.final_norm(hidden))
        assert cached is not None
        for head, (keys, values) in enumerate(zip(*cached, strict=True)):
            chunks = chunks_of(keys, values, self.config.chunk_size)
            self.memory[head] += chunks
        self.segments += [self.segments[-1] + 1 if self.segments else 0] * len(chunks)
        return logits

    def _block(self, block: Any, hidden: Tensor, memory: Sequence[Sequence[Chunk]] | None) -> Tensor:
        normed = block.ln_1(hidden)
        queries, keys, values = self._heads(block.attn, normed)
        heads = queries.shape[0]
        gate = self.model.sidenet.memory_gate
        empty: list[list[Chunk]] = [[] for _ in range(heads)]
        slopes = alibi_slopes(heads).tolist()
        mixed = joint_attention(
            queries, keys, values, memory or empty, self.config.num_chunks, gate, block.attn.scaling, slopes,
            self.config.recency, self.segments,
        )  # fmt: skip
        attended: Tensor = block.attn.out_proj(mixed.transpose(0, 1).flatten(1))
        out: Tensor = hidden + attended + block.mlp(normed)
        return out

    def _heads(self, attention: Any, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, values = (heads[0] for heads in attention.project(normed[None]))
        return queries, keys, values
