"""Chunk keys, and finding those with the largest inner products: exactly, or by an index with the same methods.

What a memory is given to write or to search for, and which rows, is checked here, too.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from longmem.errors import ConfigError, MemoryBankError
from longmem.types import AttentionKV, RetrievedMemory


def mean_keys(chunks: Tensor, lengths: Tensor) -> Tensor:
    """Mean of the real keys of every chunk, before any rounding to the storage dtype.

    Args:
        chunks: (M, Hkv, 2, S, D) with zeros behind the real tokens, at least float32.
        lengths: (M,) real tokens per chunk, at least 1.

    Returns:
        (M, Hkv, D).
    """
    keys = chunks[:, :, 0]
    total = keys[:, :, 0].clone()
    # token by token, not by sum(): its order of adding depends on the shape, and adding in parts must equal adding
    # at once to the last bit
    for token in range(1, keys.shape[2]):
        total += keys[:, :, token]
    return total / lengths[:, None, None].to(total.dtype)


class Index:
    """Finds, for every query, the chunk keys with the largest inner product.

    The memory owns the keys and passes them to each search. ``written`` and ``cleared`` tell an index that keeps a
    structure of its own what has changed. One index serves one remembered layer. Threads may search at once.
    """

    def search(
        self, queries: Tensor, keys: Tensor, rows: Sequence[int], live: Sequence[int], num: int
    ) -> tuple[Tensor, Tensor]:
        """The ``num`` best keys of every query.

        Args:
            queries: (B, Hkv, Q, D).
            keys: (rows, Hkv, slots, D).
            rows: for each of the B lines, the row of ``keys`` to search.
            live: for each of the B lines, how many keys of that row are in use: the first ``live`` slots.
            num: R.

        Returns:
            scores (B, Hkv, Q, R) float32 and slots (B, Hkv, Q, R) long, best first. Where fewer than R keys are in
            use, the columns from ``live`` on are undefined: the bank masks them.
        """
        raise NotImplementedError

    def written(self, row: int, slots: Tensor) -> None:
        """Keys at ``[row, :, slots]`` have new values."""

    def cleared(self, row: int) -> None:
        """This row holds nothing any more."""


class ExactIndex(Index):
    """Every key is scored, a block of queries against a block of keys; memory taken does not grow with the bank.

    Picking R of many scores costs as much as computing them, so the scores of a block are first reduced to the
    maximum of each ``group`` of neighbouring keys. The R best keys lie in the R groups of largest maximum (each other
    group's maximum is beaten by R keys), so only those groups are looked at one by one.

    Args:
        scores_at_once: float32 scores held at a time; by default what stays in a CPU's cache, or keeps a GPU busy.
        group: neighbouring keys reduced together.
    """

    def __init__(self, scores_at_once: int | None = None, group: int = 64) -> None:
        self.scores_at_once, self.group = scores_at_once, group

    @torch.no_grad()
    def search(
        self, queries: Tensor, keys: Tensor, rows: Sequence[int], live: Sequence[int], num: int
    ) -> tuple[Tensor, Tensor]:
        shape = (*queries.shape[:3], num)
        scores = torch.zeros(shape, dtype=torch.float32, device=queries.device)
        slots = torch.zeros(shape, dtype=torch.long, device=queries.device)
        on_cpu = queries.device.type == "cpu"
        at_once = self.scores_at_once or (1 << 20 if on_cpu else 1 << 26)
        scratch = torch.empty(at_once, dtype=torch.float32, device=queries.device)
        together: dict[tuple[int, int], list[int]] = {}  # lines that read one row: its keys are gone through once
        for line, lane in enumerate(zip(rows, live, strict=True)):
            together.setdefault(lane, []).append(line)
        for (row, used), lines in together.items():
            # a CPU's cache holds one head of a segment, and all heads of the one token that is decoded: what comes
            # after the product then takes as many calls as for one; a GPU takes them together
            whole = queries.shape[1] * len(lines) * queries.shape[2] * self._padded(used)
            heads = 1 if on_cpu and whole > at_once else queries.shape[1]
            for head in range(0, queries.shape[1], heads):
                few = slice(head, head + heads)
                asked = queries[lines, few].transpose(0, 1)  # (h, lines, Q, D)
                best = torch.full((*asked.shape[:3], num), -torch.inf, dtype=torch.float32, device=queries.device)
                where = torch.zeros(best.shape, dtype=torch.long, device=queries.device)
                self._search_heads(
                    asked.flatten(1, 2), keys[row, few, :used], scratch, best.flatten(1, 2), where.flatten(1, 2)
                )
                scores[lines, few], slots[lines, few] = best.transpose(0, 1), where.transpose(0, 1)
        return scores, slots

    def _search_heads(self, queries: Tensor, keys: Tensor, scratch: Tensor, scores: Tensor, slots: Tensor) -> None:
        """Fill scores and slots (h, Q, R) for queries (h, Q, D) over keys (h, n, D), merging block after block."""
        heads, length, _ = queries.shape
        # wide enough that packing the keys for the matrix product pays, narrow enough for the scratch; a few queries
        # leave room for more keys at once
        room = scratch.numel() // heads // max(1, min(length, 64))
        columns = min(max(keys.shape[1], 1), max(self.group, room // self.group * self.group))
        lines = max(1, scratch.numel() // heads // self._padded(columns))
        for first in range(0, keys.shape[1], columns):
            block = keys[:, first : first + columns].to(torch.float32)
            found = min(scores.shape[2], block.shape[1])
            for start in range(0, length, lines):
                part = slice(start, start + lines)
                best, where = self._best(queries[:, part].to(torch.float32), block, found, scratch)
                if not first:
                    scores[:, part, :found], slots[:, part, :found] = best, where
                    continue
                both = torch.cat((scores[:, part], best), dim=-1)
                scores[:, part], order = torch.topk(both, scores.shape[2], dim=-1)
                slots[:, part] = torch.cat((slots[:, part], where + first), dim=-1).gather(-1, order)

    def _best(self, queries: Tensor, keys: Tensor, num: int, scratch: Tensor) -> tuple[Tensor, Tensor]:
        """The ``num`` best of a block: scores (h, q, num) and positions, for queries (h, q, D) and keys (h, c, D)."""
        heads, length, _ = queries.shape
        count, group = keys.shape[1], self.group
        width = self._padded(count)
        table = scratch[: heads * length * width].view(heads, length, width)
        for head in range(heads):
            torch.mm(queries[head], keys[head].T, out=table[head, :, :count])
        if count <= 2 * num * group:  # too few groups to gain by them
            best = torch.topk(table[:, :, :count], num, dim=-1)
            return best.values, best.indices
        table[:, :, count:] = -torch.inf
        groups = width // group
        chosen = torch.topk(table.view(heads, length, groups, group).amax(-1), num, dim=-1, sorted=False).indices
        line = torch.arange(heads * length, device=table.device).view(heads, length, 1) * groups
        candidates = table.view(-1, group).index_select(0, (chosen + line).flatten()).view(heads, length, num * group)
        best = torch.topk(candidates, num, dim=-1)
        return best.values, chosen.gather(-1, best.indices // group) * group + best.indices % group

    def _padded(self, count: int) -> int:
        return -(-count // self.group) * self.group


class FaissIndex(Index):
    """Reads a part of the keys when few queries come: an inverted file of 8-bit codes (IVF-SQ8) for each head.

    What the file finds is ranked anew by exact scores, so scores are exact and only recall is not. Searches of many
    queries, or of a row with few keys, are exact, because one matrix product is faster there. The file of a row is
    built at the first search that wants it. Keys written later are searched exactly; once they are an eighth of the
    row, the file is built anew. Needs the ``faiss`` extra; searches on the CPU.

    Args:
        least: keys in a row below which it is searched exactly.
        few: queries per key/value head up to which a search reads a part.
        share: of the lists of a file, read per query; more is slower and finds more.

    Raises:
        ConfigError: faiss is not installed.
    """

    def __init__(self, *, least: int = 32768, few: int = 8, share: float = 0.2) -> None:
        try:
            import faiss
        except ImportError as error:
            raise ConfigError(
                "index ('faiss') needs faiss, which is not installed; pip install 'longmem-lm[faiss]', or use 'exact'"
            ) from error
        self.least, self.few, self.share = least, few, share
        self._faiss: Any = faiss
        self._exact = ExactIndex()
        self._rows: dict[int, _Files] = {}
        self._building = threading.Lock()

    def __deepcopy__(self, _: Any) -> FaissIndex:  # for each remembered layer, before anything is written
        return FaissIndex(least=self.least, few=self.few, share=self.share)

    @torch.no_grad()
    def search(
        self, queries: Tensor, keys: Tensor, rows: Sequence[int], live: Sequence[int], num: int
    ) -> tuple[Tensor, Tensor]:
        if queries.shape[2] > self.few or min(live, default=0) < max(self.least, 16 * num):
            return self._exact.search(queries, keys, rows, live, num)
        shape = (*queries.shape[:3], num)
        scores = torch.zeros(shape, device=queries.device)
        slots = torch.zeros(shape, dtype=torch.long, device=queries.device)
        for line, (row, used) in enumerate(zip(rows, live, strict=True)):
            with self._building:
                files = self._rows.get(row)
                if files is None or len(files.changed) > files.covered // 8:
                    files = self._rows[row] = _Files(self._faiss, keys[row, :, :used].float().cpu(), self.share)
            for head, asked in enumerate(queries[line].float()):
                scores[line, head], slots[line, head] = files.search(asked, keys[row, head, :used], head, num)
        return scores, slots

    def written(self, row: int, slots: Tensor) -> None:
        if row in self._rows:
            self._rows[row].changed = torch.cat((self._rows[row].changed, slots.cpu())).unique()

    def cleared(self, row: int) -> None:
        self._rows.pop(row, None)


class _Files:
    """Inverted files over the keys (Hkv, n, D) that a row had when they were built.

    Attributes:
        covered: n.
        changed: (m,) slots that were written since.
    """

    def __init__(self, faiss: Any, keys: Tensor, share: float) -> None:
        self.covered, dim = keys.shape[1], keys.shape[2]
        self.changed = torch.zeros(0, dtype=torch.long)
        groups = max(1, round(2 * self.covered**0.5))
        self.settings = faiss.SearchParametersIVF(nprobe=max(1, round(share * groups)))
        self.files = []
        for each in keys:
            # the mean adds the same to every score of a query; without it, lists differ in what tells keys apart
            points = (each - each.mean(0)).numpy()
            means = faiss.Kmeans(dim, groups, niter=5, max_points_per_centroid=64, seed=0)
            means.train(points)
            lists = faiss.IndexFlatIP(dim)
            lists.add(means.centroids)
            file = faiss.IndexIVFScalarQuantizer(
                lists, dim, groups, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
            )
            file.train(points[:: max(1, self.covered // 65536)])
            file.add(points)
            self.files.append((file, lists))  # the file refers to its lists without keeping them

    def search(self, queries: Tensor, keys: Tensor, head: int, num: int) -> tuple[Tensor, Tensor]:
        """Scores and slots (Q, num) of the best keys (n, D) of a head for queries (Q, D)."""
        found = torch.from_numpy(self.files[head][0].search(queries.cpu().numpy(), 4 * num, params=self.settings)[1])
        found.masked_fill_(torch.isin(found, self.changed), -1)  # as where the file had no more
        slots = torch.cat((found, self.changed.expand(len(queries), -1)), dim=1).to(keys.device)
        scores = torch.einsum("qd,qcd->qc", queries, keys[slots.clamp_min(0)].float())
        best = scores.masked_fill_(slots < 0, -torch.inf).topk(num)
        return best.values, slots.gather(1, best.indices)


def make_indexes(index: str | Index, layers: int) -> list[Index]:
    """An index for each remembered layer: by its name ("exact", "faiss"), or the one given and copies of it.

    Raises:
        ConfigError: there is no index of this name, or what it needs is not installed.
    """
    if isinstance(index, Index):
        return [index, *(copy.deepcopy(index) for _ in range(layers - 1))]
    kinds: dict[str, Callable[[], Index]] = {"exact": ExactIndex, "faiss": FaissIndex}
    if index not in kinds:
        raise ConfigError(f"index ({index!r}) must be one of {', '.join(kinds)}")
    return [kinds[index]() for _ in range(layers)]


class Chunks(Protocol):
    """Chunks of several rows: what ``search_chunks`` reads."""

    storage: Tensor  # (rows, slots, n*Hkv, 2, S, D), keys and values; the last slot stands for "nothing found"
    keys: Tensor  # (rows, n*Hkv, slots, D), mean key of each chunk
    lengths: Tensor  # (rows, slots) real tokens in each chunk


@torch.no_grad()
def search_chunks(
    indexes: Sequence[Index],
    queries: Tensor,
    num_chunks: int,
    chunks: Chunks,
    rows: Sequence[int],
    live: Sequence[int],
    *,
    layer: int,
    live_version: Callable[[], int] = lambda: 0,
) -> RetrievedMemory:
    """The best chunks for every query head (B, H, T, D), from the heads of one remembered layer.

    Args:
        indexes: one for each remembered layer.
        rows, live: (B) rows of ``chunks`` to read, and how many of their chunks are in use.
        layer: its place among the remembered ones, which have equally many heads.
        live_version: see ``RetrievedMemory``.

    Raises:
        MemoryBankError: the queries do not fit the keys, or there is no such layer.
    """
    keys, device, layers = chunks.keys, chunks.keys.device, len(indexes)
    heads_kv, dim = keys.shape[1] // layers, keys.shape[3]
    batch, heads, length, width = queries.shape
    if width != dim or heads % heads_kv:  # a bank without a fingerprint may be another model's
        raise MemoryBankError(
            f"queries of {heads} heads and head_dim {width} do not fit this bank, which has {heads_kv} key/value heads "
            f"and head_dim {dim}; make it for this model"
        )
    first = within("layer", layer, layers) * heads_kv
    version = live_version()
    grouped = queries.detach().reshape(batch, heads_kv, -1, dim)
    with torch.autocast(queries.device.type, enabled=False):
        scores, slots = indexes[layer].search(grouped, keys[:, first : first + heads_kv], rows, live, num_chunks)
    shape = (batch, heads, length, num_chunks)
    exists = torch.arange(num_chunks, device=device) < torch.tensor(live, device=device)[:, None]
    exists = exists[:, None, None, :].expand(shape)
    return RetrievedMemory(
        chunk_ids=slots.reshape(shape).masked_fill_(~exists, chunks.storage.shape[1] - 1),
        chunk_mask=exists.clone(),
        scores=scores.reshape(shape).masked_fill_(~exists, 0.0),
        storage=chunks.storage,
        lengths=chunks.lengths,
        rows=torch.tensor(rows, device=device),
        version=version,
        live_version=live_version,
        first_head=first,
        layer_heads=heads_kv if layers > 1 else None,
    )


def rows_of(rows: Tensor | Sequence[int] | None, batch: int | None, count: int, what: str) -> list[int]:
    """Rows of a memory of ``count`` as plain numbers, one for each of ``batch``; by default all, in order.

    Raises:
        MemoryBankError: they do not fit; ``what`` came with them.
    """
    if rows is None:
        if batch is not None and batch != count:
            raise MemoryBankError(f"{what} have {batch} rows, the bank has {count}; pass rows= to say which")
        return list(range(count))
    chosen = [int(row) for row in (rows.tolist() if isinstance(rows, Tensor) else rows)]
    if batch is not None and len(chosen) != batch:
        raise MemoryBankError(f"rows ({len(chosen)} entries) must have one per row of the {what} ({batch})")
    return [within("row", row, count) for row in chosen]


def within(name: str, number: int, count: int) -> int:
    """The same number of a ``row`` or ``layer``, or a MemoryBankError where a memory has not so many."""
    if not 0 <= number < count:
        raise MemoryBankError(f"{name} ({number}) must lie in 0..{count - 1}, the {name}s of this bank")
    return number


def joined(kv: AttentionKV, heads: int, head_dim: int) -> Tensor:
    """Keys and values next to each other, (B, Hkv, 2, T, D), without gradient; a MemoryBankError if they do not fit."""
    given: Any = kv
    if not isinstance(given, AttentionKV):  # the whole output, for instance
        raise MemoryBankError(
            f"a {type(given).__name__} has no keys and values to remember; give out.kv, or model.encode(ids)"
        )
    if (kv.keys.shape[1], kv.keys.shape[3]) != (heads, head_dim):
        shape = tuple(kv.keys.shape)
        raise MemoryBankError(f"keys {shape} must be (B, {heads}, T, {head_dim}), as this bank was made for")
    return torch.stack((kv.keys.detach(), kv.values.detach()), dim=2)


def refuse_overflow(pair: Tensor, mask: Tensor | None, dtype: torch.dtype, chunk_size: int) -> None:
    """Refuse, with a MemoryBankError, numbers that memory cannot hold: one would make every later answer NaN.

    Args:
        pair: keys and values (B, Hkv, 2, T, D), to be stored as ``dtype``.
        mask: (B, T) bool, True at real tokens; padding may hold anything.
    """
    if mask is not None and not bool(mask.all()):
        pair = pair.masked_fill(~mask.to(pair.device, torch.bool)[:, None, None, :, None], 0.0)
    if not pair.numel():
        return
    most = torch.finfo(dtype).max
    most_key = min(most, torch.finfo(torch.float32).max / chunk_size)  # S keys are added in float32
    largest = pair.abs().amax(dim=(1, 3, 4)).double().cpu()  # (B, 2); NaN is below no limit
    for row, (key, value) in enumerate(largest.tolist()):
        for name, number, limit in (("keys", key, most_key), ("values", value, most)):
            if not number <= limit:
                raise MemoryBankError(
                    f"{name} of row {row} reach {number:.3g}, a bank of {dtype} holds {limit:.3g} at most; look for an "
                    "overflow in the model, or make the bank with dtype torch.bfloat16 or torch.float32"
                )
