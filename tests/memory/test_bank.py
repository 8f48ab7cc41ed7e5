"""Laws 4 to 7 and 12 on any history of writes, against a bank made of Python lists; then what they do not show."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as some
from tests.store.banks import same

from longmem.errors import LongMemError, MemoryBankError
from longmem.memory import ChunkOrigin, MemoryBank
from longmem.memory.session import JoinedMemory, SessionMemory
from longmem.types import PERIOD_TOKENS, AttentionKV

HEADS, DIM = 2, 3
"""Of each remembered layer."""


def bank(rows: int = 1, capacity: int = 16, size: int = 2, **settings) -> MemoryBank:
    return MemoryBank(rows, capacity, HEADS, DIM, size, **settings)


def kv(rows: int, length: int, seed: int = 0) -> AttentionKV:
    draw = torch.Generator().manual_seed(seed)
    return AttentionKV(*(torch.randn(rows, HEADS, length, DIM, generator=draw) for _ in range(2)))


def queries(rows: int, length: int = 4, heads: int = 4) -> torch.Tensor:
    return torch.randn(rows, heads, length, DIM, generator=torch.Generator().manual_seed(99))


def origins(memory: MemoryBank, row: int = 0) -> list[ChunkOrigin]:
    there = memory.search(queries(memory.rows), int(memory.chunks[row])).chunks[row].unique()
    return [memory.provenance(row, chunk) for chunk in there.tolist() if chunk >= 0]


@dataclass
class Chunk:
    document: str | None
    start: int
    tokens: list[torch.Tensor]
    ordinal: int  # of its document among those of the row: another name, or a text that begins again


@dataclass
class ListRow:
    """One row in plain Python: all closed chunks, oldest first, and the tail that waits."""

    slots: int
    size: int
    chunks: list[Chunk] = field(default_factory=list)
    tail: list[torch.Tensor] = field(default_factory=list)
    document: str | None = None
    next: int = 0
    open: bool = False

    def add(self, tokens: Sequence[torch.Tensor], document: str | None, jump: int) -> int:
        """Returns the offset of these tokens in their document."""
        goes_on = self.open and document == self.document
        if not goes_on or jump:
            self.close()
        self.document, self.open = document, True
        self.next = offset = (self.next if goes_on else 0) + jump
        for token in tokens:
            self.tail.append(token)
            self.next += 1
            if len(self.tail) == self.size:
                self.close()
        return offset

    def close(self) -> None:
        if self.tail:
            start, last = self.next - len(self.tail), self.chunks[-1] if self.chunks else Chunk(None, 0, [], 0)
            again = self.document != last.document or start <= last.start
            self.chunks.append(Chunk(self.document, start, self.tail, last.ordinal + again))
        self.tail = []

    @property
    def there(self) -> dict[int, Chunk]:
        """The newest chunks by their numbers: those that are not evicted."""
        return dict(list(enumerate(self.chunks))[-self.slots :])

    def best(self, query: torch.Tensor, head: int, num: int) -> list[tuple[float, list[torch.Tensor]]]:
        """Scores, by means taken before any rounding, and tokens of the best chunks."""
        every = [
            (float(sum(token[head, 0] @ query for token in chunk.tokens) / len(chunk.tokens)), chunk.tokens)
            for chunk in self.there.values()
        ]
        return sorted(every, key=lambda pair: pair[0], reverse=True)[:num]


@dataclass(frozen=True)
class Write:
    """What is said to the rows: how many tokens each, in which documents, how far on in these, whether these end.

    A second bank, which should be as the first, is given it in two parts and may be saved and loaded in between.
    """

    lengths: tuple[int, ...]
    left: bool
    documents: tuple[str | None, ...]
    jump: int
    end: bool
    cut: int
    reload: bool


HISTORIES = some.lists(
    some.builds(
        Write,
        lengths=some.tuples(*[some.integers(0, 7)] * 2),
        left=some.booleans(),
        documents=some.tuples(*[some.sampled_from(["a", "b", None])] * 2),
        jump=some.sampled_from([0, 0, 100, PERIOD_TOKENS]),
        end=some.booleans(),
        cut=some.integers(0, 8),
        reload=some.booleans(),
    ),
    max_size=6,
)


def padded(tokens: list[torch.Tensor], left: bool) -> AttentionKV:
    """Rows (t, n*Hkv, 2, D) of different lengths as one batch with a mask."""
    width = max(len(row) for row in tokens) + 1
    batch = torch.full((len(tokens), width, *tokens[0].shape[1:]), 1e3)
    mask = torch.zeros(len(tokens), width, dtype=torch.bool)
    for line, row in enumerate(tokens):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        batch[line, place], mask[line, place] = row, True
    return AttentionKV(batch[:, :, :, 0].transpose(1, 2), batch[:, :, :, 1].transpose(1, 2), mask)


# another document, further on in it than the one before had come: also a later period
@example(
    history=[Write((3, 2), False, ("a", "b"), 0, False, 1, True), Write((4, 5), True, ("b", "a"), 100, True, 2, False)],
    slots=5, size=2, num=6, layers=(3, 7), dtype=torch.bfloat16,
)  # fmt: skip
@settings(max_examples=120, deadline=None)
@given(
    history=HISTORIES,
    slots=some.integers(1, 5),
    size=some.integers(1, 4),
    num=some.integers(1, 6),
    layers=some.sampled_from([(3,), (3, 7)]),
    dtype=some.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_writes_in_any_parts_saved_and_loaded_anywhere_leave_what_python_lists_hold(
    history, slots, size, num, layers, dtype
):
    made = {"capacity": slots * size, "size": size, "memory_layers": layers, "dtype": dtype}
    once, parts = bank(2, **made), bank(2, **made)
    lists = [ListRow(slots, size) for _ in range(2)]
    for number, write in enumerate(history):
        draw = torch.Generator().manual_seed(number)
        tokens = [torch.randn(length, len(layers) * HEADS, 2, DIM, generator=draw) for length in write.lengths]
        offsets = [listed.add(*said, write.jump) for listed, *said in zip(lists, tokens, write.documents, strict=True)]
        both = {"documents": write.documents, "time": float(number)}
        segment = padded(tokens, write.left)
        once.add(segment, **both, offsets=offsets if write.jump else None)
        for place, cut in enumerate((slice(0, write.cut), slice(write.cut, None))):
            part = AttentionKV(segment.keys[:, :, cut], segment.values[:, :, cut], segment.mask[:, cut])
            parts.add(part, **both, offsets=offsets if write.jump and not place else None)
            if write.reload and not place:
                saved, parts = parts.state_dict(), bank(2, fingerprint="now it has a name", **made)
                parts.load_state_dict(saved)
        if write.end:
            for each in (once, parts):
                each.end_document()
            for listed in lists:
                listed.close()
                listed.open = False
    for memory in (once, parts):
        assert memory.chunks.tolist() == [len(listed.there) for listed in lists]
        assert memory.waiting.tolist() == [len(listed.tail) for listed in lists]
        assert memory.tokens.tolist() == [sum(len(c.tokens) for c in listed.there.values()) for listed in lists]
        for row, listed in enumerate(lists):
            for number, chunk in listed.there.items():
                origin = memory.provenance(row, number)
                assert (origin.document, origin.start_token, origin.length) == (
                    chunk.document, chunk.start, len(chunk.tokens),
                )  # fmt: skip
    asked = queries(2, 3)
    for layer in range(len(layers)):
        found = once.search(asked, num, layer=layer)
        same(found, parts.search(asked, num, layer=layer))
        for row, head, token in product(range(2), range(4), range(3)):
            own = layer * HEADS + head // 2
            best = lists[row].best(asked[row, head, token], own, num)
            scores = torch.tensor([score for score, _ in best])
            torch.testing.assert_close(found.scores[row, head, token, : len(best)], scores)
            real = found.mask[row, head, token]
            pairs = torch.stack([part[row, head, token][real] for part in (found.keys, found.values)], dim=1)
            wanted = [each[own].to(dtype) for _, tokens in best for each in tokens]
            assert len(pairs) == len(wanted) and all(map(torch.equal, pairs, wanted))
    for row, listed in enumerate(lists):
        periods = dict(zip(found.chunks[row].flatten().tolist(), found.period[row].flatten().tolist(), strict=True))
        ages = {n: (chunk.ordinal, chunk.start // PERIOD_TOKENS) for n, chunk in listed.there.items() if n in periods}
        for first, second in product(ages, repeat=2):
            assert (periods[first] < periods[second]) == (ages[first] < ages[second])


def test_a_document_goes_on_where_none_is_named_and_every_chunk_knows_when_it_was_written():
    memory = bank()
    memory.add(kv(1, 3), documents=["a"], offsets=[10], time=1.0)
    memory.add(kv(1, 2), time=2.0)
    memory.add(kv(1, 2), documents=["a"], offsets=[40], time=3.0)
    assert [(each.document, each.start_token, each.length, each.time) for each in origins(memory)] == [
        ("a", 10, 2, 1.0), ("a", 12, 2, 2.0), ("a", 14, 1, 3.0), ("a", 40, 2, 3.0),
    ]  # fmt: skip


def test_every_write_counts_as_a_new_version_and_searching_changes_nothing():
    memory, given = bank(), kv(1, 3)
    seen = [memory.version]
    for write in (
        lambda: memory.add(AttentionKV(given.keys.requires_grad_(), given.values)),
        memory.end_document,
        memory.reset,
        lambda: memory.load_state_dict(memory.state_dict()),
        lambda: memory.add(kv(1, 6)),
    ):
        write()
        seen.append(memory.version)
    assert seen == sorted(set(seen))
    first, second = (memory.search(queries(1).requires_grad_(), 2) for _ in range(2))
    same(first, second)
    assert memory.version == seen[-1] and not first.scores.requires_grad and not first.keys.requires_grad


def test_what_is_known_of_chunks_does_not_pile_up_and_every_tensor_is_counted():
    memory = bank(capacity=4)
    assert memory.nbytes == sum(each.nbytes for each in vars(memory).values() if isinstance(each, torch.Tensor))
    for number in range(500):
        memory.add(kv(1, 2), documents=[str(number)])
    assert len(memory.state_dict()["slots"]["runs"][0]) == 2
    with pytest.raises(MemoryBankError, match=r"chunk \(0\) is not in row 0; it holds 498 to 499"):
        memory.provenance(0, 0)


def test_a_bank_of_version_0_1_is_loaded():
    saved = torch.load(Path(__file__).parents[1] / "golden" / "bank-0.1.pt", weights_only=True)
    settings = {"capacity": 12, "memory_layers": (3,), "fingerprint": "f", "dtype": torch.float16}
    loaded, again = bank(2, **settings), bank(2, **settings)
    loaded.load_state_dict(saved)
    draw = torch.Generator().manual_seed(0)
    for step in range(4):
        pair = AttentionKV(*(torch.randn(2, 2, 5, 3, generator=draw) for _ in range(2)))
        again.add(pair, documents=["a", f"b{step // 2}"], time=float(step))
    for last in range(2):
        same(loaded.search(queries(2), 6), again.search(queries(2), 6))
        assert [origins(loaded, row) for row in range(2)] == [origins(again, row) for row in range(2)]
        for each in (loaded, again):
            each.add(kv(2, 3, last), time=9.0)


# what does not fit is told in one line: the value, the rule, the way out


def zero(*shape: int) -> AttentionKV:
    return AttentionKV(torch.zeros(shape), torch.zeros(shape))


def spoiled(which: int, number: float, token: int = 1) -> AttentionKV:
    """Keys (0) or values (1) of row 1 hold this number."""
    pair = [torch.ones(2, 2, 5, 3), torch.ones(2, 2, 5, 3)]
    pair[which][1, 0, token, 2] = number
    return AttentionKV(*pair)


SEGMENT = zero(2, 2, 5, 3)


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        (torch.zeros(2, 2, 5, 3), {}, "a Tensor has no keys and values to remember; give out.kv, or model.encode(ids)"),
        (zero(2, 4, 5, 3), {}, "keys (2, 4, 5, 3) must be (B, 2, T, 3), as this bank was made for"),
        (zero(3, 2, 5, 3), {}, "keys have 3 rows, the bank has 2; pass rows= to say which"),
        (zero(1, 2, 5, 3), {"rows": torch.tensor([2])}, "row (2) must lie in 0..1, the rows of this bank"),
        (SEGMENT, {"rows": torch.tensor([1])}, "rows (1 entries) must have one per row of the keys (2)"),
        (SEGMENT, {"documents": ["a"]}, "documents (1 entries) must have one per row written (2)"),
        (spoiled(0, float("nan")), {}, "keys of row 1 reach nan, a bank of torch.float16 holds 6.55e+04 at most"),
        (spoiled(1, -1e6), {}, "values of row 1 reach 1e+06, a bank of torch.float16 holds 6.55e+04"),
    ],
)
def test_a_segment_that_does_not_fit_is_refused_and_nothing_is_written(given, settings, message):
    memory = bank(2, dtype=torch.float16)
    memory.add(zero(2, 2, 3, 3), documents=["a", "b"])
    before = memory.state_dict()
    with pytest.raises(MemoryBankError) as caught:
        memory.add(given, **settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    after = memory.state_dict()
    assert (after["version"], after["lanes"]) == (before["version"], before["lanes"])
    assert torch.equal(after["tail"], before["tail"]) and memory.chunks.tolist() == [1, 1]


def test_padding_may_hold_anything_and_what_a_dtype_holds_is_taken():
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 0] = False
    memory, bad = bank(2, dtype=torch.float16), spoiled(0, float("nan"), token=0)
    memory.add(AttentionKV(bad.keys, bad.values, mask))
    memory.add(spoiled(1, 65504.0))
    assert torch.isfinite(memory.search(torch.ones(2, 2, 1, 3), 3).keys).all()
    with pytest.raises(MemoryBankError, match=r"reach 3e\+38, a bank of torch.float32 holds 1.7e\+38"):
        bank(2).add(spoiled(0, 3e38))  # two of them are added up for their mean


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: MemoryBank(1, 50, 2, 3), "capacity_tokens (50) must be a multiple of chunk_size (4); try 48 or 52"),
        (lambda: MemoryBank(0, 0, 2, 3), "rows (0) must be at least 1; capacity_tokens (0) must be at least 1"),
        (lambda: bank(1, index="two_stage"), "index ('two_stage') must be one of exact, faiss"),
        (lambda: bank(2).search(torch.zeros(2, 3, 4, 3), 1), "queries of 3 heads and head_dim 3 do not fit this"),
        (lambda: bank(2).search(torch.zeros(2, 2, 4, 3), 1, layer=1), "layer (1) must lie in 0..0, the layers of this"),
        (lambda: bank(2).provenance(1, 0), "chunk (0) is not in row 1; it is empty"),
        (lambda: bank(2).provenance(-1, 0), "row (-1) must lie in 0..1, the rows of this bank"),
        (lambda: SessionMemory(bank(1), bank(2)).provenance(2, 0), "row (2) must lie in 0..1, the rows of this bank"),
        (lambda: JoinedMemory([bank(1), None]).provenance(2, 0), "row (2) must lie in 0..1, the rows of this bank"),
        (
            lambda: bank(2).load_state_dict({"settings": {"memory_layer": 3, "eviction": "released"}}),
            "saved bank is of a kind of version 0.1 that is no more",
        ),
        (lambda: bank(3).load_state_dict(bank(2).state_dict()), "saved bank's rows is 2, this bank's is 3; load it"),
        (
            lambda: bank(1, fingerprint="a").load_state_dict(bank(1, fingerprint="b").state_dict()),
            "saved bank's fingerprint is b, this bank's is a; load it into one made as it was, for the backbone that",
        ),
        (lambda: SessionMemory(bank(2), bank(3)), "the memory has 2 rows, the session 3; pass base_rows="),
        (lambda: SessionMemory(bank(1), bank(1, size=4)), "chunk_size differs among memories that are read together: "),
        (lambda: SessionMemory(None, bank(1)).commit("talk"), "this session is over no store; make it with store"),
        (lambda: JoinedMemory([None]), "a list of 1 banks must hold one; pass memory=None to read nothing"),
        (lambda: JoinedMemory([bank(1, fingerprint="a"), bank(1, fingerprint="b")]), "fingerprint differs among"),
    ],
)
def test_what_memories_cannot_do_is_said_in_one_line(act, message):
    with pytest.raises(LongMemError) as caught:
        act()
    assert message in str(caught.value) and "\n" not in str(caught.value)
