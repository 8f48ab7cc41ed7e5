"""Ways to search a part of the keys that were compared: how many key bytes each reads for a recall of 0.95.

Each is set with hindsight, on the very queries it is judged by, with one setting for all heads: a lower bound of what
it would read in use. Bytes count against reading all keys in float32; exact scores of the candidates are included.

n keys · D head_dim · m queries · R retrieved chunks
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from longmem.memory import ExactIndex
from longmem.memory.blocks import felt_distance, like_together

WIDTH = 64
Ranked = tuple[Tensor, float]
"""For every best key (m, R) the share of key bytes read before it is; and what is read in any case."""


def compare(keys: Tensor, heard: Tensor, asked: Tensor, num: int = 16, recall: float = 0.95) -> list[dict[str, Any]]:
    """One record per way: the share of key bytes for this recall, by ways of growing size of effort.

    Args:
        keys: (H, n, D).
        heard: (H, m, D), queries that a way may learn from.
        asked: (H, m, D), queries it is judged by.
    """
    heads, count, _ = keys.shape
    _, best = ExactIndex().search(asked[None], keys[None], [0], [count], num)
    best = best[0]
    records = []
    for name, way in WAYS.items():
        began = time.process_time()
        variants: dict[str, list[Ranked]] = {}
        for head in range(heads):
            for variant, ranked in way(keys[head], heard[head], asked[head], best[head]):
                variants.setdefault(variant, []).append(ranked)
        seconds = time.process_time() - began
        for variant, ranked in variants.items():
            shares = torch.cat([each.flatten() for each, _ in ranked]).sort().values
            fixed = ranked[0][1]
            needed = float(shares[min(len(shares) - 1, int(recall * len(shares)))]) + fixed
            records.append({"way": name, "variant": variant, "key_bytes_read": needed, "of_these_fixed": fixed,
                            "cpu_seconds_to_try": seconds})  # fmt: skip
    return records


def _by_groups(scores: Tensor, homes: Tensor, sizes: Tensor, best: Tensor) -> Tensor:
    """Keys read, as a share, when groups are taken by their scores (m, G) until the one with each best key is."""
    order = scores.argsort(dim=1, descending=True)
    read = sizes[order].cumsum(1).double() / sizes.sum()
    place = torch.empty_like(order)
    place.scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    return read.gather(1, place.gather(1, homes[best])).float()


def _estimates(blocks: Tensor, asked: Tensor) -> Iterator[tuple[str, Tensor, float]]:
    """Scores of blocks (G, w, D), and bytes read for them, by what is kept of each block."""
    share = 1 / blocks.shape[1]
    mean = blocks.mean(1)
    near = asked @ mean.T
    yield "mean", near, share
    spread = (asked**2 @ blocks.var(1, unbiased=False).T).sqrt()
    yield "mean + 1.5 std", near + 1.5 * spread, 2 * share
    low, high = blocks.amin(1), blocks.amax(1)
    yield "box bound", asked.clamp_min(0) @ high.T + asked.clamp_max(0) @ low.T, 2 * share
    radius = (blocks - mean[:, None]).norm(dim=-1).amax(1)
    yield "mean + radius", near + asked.norm(dim=1, keepdim=True) * radius, share


def segments(keys: Tensor, heard: Tensor, asked: Tensor, best: Tensor) -> Iterator[tuple[str, Ranked]]:
    """Neighbours in the text, 64 chunks (256 tokens) together."""
    yield from _blocks(keys, torch.arange(len(keys)), asked, best)


def tree_plain(keys: Tensor, heard: Tensor, asked: Tensor, best: Tensor) -> Iterator[tuple[str, Ranked]]:
    """Blocks of a halving tree, keys compared by the plain distance."""
    yield from _blocks(keys, like_together(keys, _groups(keys)), asked, best)


def tree_felt(keys: Tensor, heard: Tensor, asked: Tensor, best: Tensor) -> Iterator[tuple[str, Ranked]]:
    """The same by the distance that 256 queries heard feel."""
    yield from _blocks(keys, like_together(keys @ felt_distance(heard), _groups(keys)), asked, best)


def _groups(keys: Tensor) -> int:
    return len(keys) // WIDTH


def _blocks(keys: Tensor, order: Tensor, asked: Tensor, best: Tensor) -> Iterator[tuple[str, Ranked]]:
    homes = torch.empty_like(order)
    homes[order] = torch.arange(len(order)) // WIDTH
    sizes = torch.full((_groups(keys),), WIDTH)
    blocks = keys[order].view(_groups(keys), WIDTH, -1)
    for name, scores, fixed in _estimates(blocks, asked):
        yield name, (_by_groups(scores, homes, sizes, best), fixed)


def k_means(keys: Tensor, heard: Tensor, asked: Tensor, best: Tensor) -> Iterator[tuple[str, Ranked]]:
    """Lists around centres, which queries choose by inner product."""
    felt = felt_distance(heard)
    back = torch.linalg.inv(felt)
    unit = keys / keys.norm(dim=1, keepdim=True)
    for name, points, questions in (
        ("plain distance", keys, asked),
        ("centred, directions only", _directions(keys), asked),
        ("directions only", unit, asked),
        ("felt distance", keys @ felt, asked @ back),
    ):
        centres = _centres(points, _groups(keys))
        homes = _nearest(points, centres)
        sizes = torch.bincount(homes, minlength=len(centres))
        yield name, (_by_groups(questions @ centres.T, homes, sizes, best), 1 / WIDTH)


def centres_of_queries(keys: Tensor, heard: Tensor, asked: Tensor, best: Tensor) -> Iterator[tuple[str, Ranked]]:
    """Every key is listed under the query, of 256 heard, that scores it highest against its usual score."""
    scores = keys @ heard.T
    homes = ((scores - scores.mean(0)) / scores.std(0)).argmax(1)
    sizes = torch.bincount(homes, minlength=heard.shape[0])
    near = torch.nn.functional.normalize(asked, dim=1) @ torch.nn.functional.normalize(heard, dim=1).T
    yield "256 lists", (_by_groups(near, homes, sizes, best), heard.shape[0] / len(keys))


def few_dimensions(keys: Tensor, heard: Tensor, asked: Tensor, best: Tensor) -> Iterator[tuple[str, Ranked]]:
    """All keys by some of their dimensions, the best of them exactly."""
    dim = keys.shape[1]
    values = keys - keys.mean(0)
    draw = torch.Generator().manual_seed(0)
    turned = torch.linalg.qr(torch.randn(dim, dim, generator=draw)).Q
    felt = felt_distance(heard)
    back = torch.linalg.inv(felt)
    most = torch.linalg.eigh((values @ felt).T @ (values @ felt)).eigenvectors.flip(1)
    for kept in (dim // 4, dim // 2):
        for name, ours, theirs in (
            (f"random rotation, {kept} of {dim}", turned[:, :kept], turned[:, :kept]),
            (f"principal as felt, {kept} of {dim}", felt @ most[:, :kept], back @ most[:, :kept]),
        ):
            rough = (asked @ theirs) @ (keys @ ours).T
            yield name, (_ranks(rough, best), kept / dim)


def eight_bits(keys: Tensor, heard: Tensor, asked: Tensor, best: Tensor) -> Iterator[tuple[str, Ranked]]:
    """All keys in 8 bits, a scale for each dimension, the best of them exactly."""
    mean = keys.mean(0)
    step = (keys - mean).abs().amax(0) / 127
    rough = asked @ (((keys - mean) / step).round() * step).T
    yield "centred", (_ranks(rough, best), 0.25)


def _ranks(rough: Tensor, best: Tensor) -> Tensor:
    """Share of keys whose rough scores (m, n) are above that of each best one."""
    own = rough.gather(1, best)
    return torch.stack([(rough > each[:, None]).sum(1) for each in own.unbind(1)], 1) / rough.shape[1]


def _directions(keys: Tensor) -> Tensor:
    return torch.nn.functional.normalize(keys - keys.mean(0), dim=1)


def _centres(points: Tensor, count: int, rounds: int = 5) -> Tensor:
    """k-means on a sample of at most 32 points for each centre."""
    draw = torch.Generator().manual_seed(0)
    some = points[torch.randperm(len(points), generator=draw)[: 32 * count]]
    centres = some[:count].clone()
    for _ in range(rounds):
        homes = _nearest(some, centres)
        sums = torch.zeros_like(centres).index_add_(0, homes, some)
        sizes = torch.bincount(homes, minlength=count)
        centres = torch.where(sizes[:, None] > 0, sums / sizes.clamp_min(1)[:, None], centres)
    return centres


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    half = (centres**2).sum(1) / 2
    return torch.cat([(part @ centres.T - half).argmax(1) for part in points.split(4096)])


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Iterator[tuple[str, Ranked]]]] = {
    "segments of the text": segments,
    "tree, plain distance": tree_plain,
    "tree, felt distance": tree_felt,
    "k-means": k_means,
    "centres of queries": centres_of_queries,
    "few dimensions": few_dimensions,
    "8 bits": eight_bits,
}
