"""Laws 4 to 7 and 12 on whole histories: any sequence of writes against a bank made of Python lists."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product

import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from tests.store.banks import same

from longmem.memory import MemoryBank
from longmem.types import AttentionKV

HEADS, DIM = 2, 3
Chunk = tuple[str | None, int, list[torch.Tensor]]
"""Document, first token there, tokens."""


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

    def add(self, tokens: Sequence[torch.Tensor], document: str | None) -> None:
        if not self.open or document != self.document:
            self.close()
            self.next = 0
        self.document, self.open = document, True
        for token in tokens:
            self.tail.append(token)
            self.next += 1
            if len(self.tail) == self.size:
                self.close()

    def close(self) -> None:
        if self.tail:
            self.chunks.append((self.document, self.next - len(self.tail), self.tail))
        self.tail = []

    @property
    def there(self) -> dict[int, Chunk]:
        """The newest chunks by their numbers: those that are not evicted."""
        return dict(list(enumerate(self.chunks))[-self.slots :])

    def best(self, query: torch.Tensor, head: int, num: int) -> list[list[torch.Tensor]]:
        def score(chunk: list[torch.Tensor]) -> float:
            return float(sum(token[head, 0] @ query for token in chunk) / len(chunk))

        return sorted((tokens for _, _, tokens in self.there.values()), key=score, reverse=True)[:num]


@dataclass(frozen=True)
class Write:
    """What is said to the rows: how many tokens each, in which documents, and whether these end."""

    lengths: tuple[int, ...]
    left: bool
    documents: tuple[str | None, ...]
    end: bool


LENGTHS = some.tuples(*[some.integers(0, 7)] * 2)
DOCUMENTS = some.tuples(*[some.sampled_from(["a", "b", None])] * 2)
HISTORIES = some.lists(some.builds(Write, LENGTHS, some.booleans(), DOCUMENTS, some.booleans()), max_size=5)


def tokens_of(write: Write, seed: int) -> list[torch.Tensor]:
    """Per row (t, Hkv, 2, D)."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(length, HEADS, 2, DIM, generator=draw) for length in write.lengths]


def padded(tokens: list[torch.Tensor], left: bool) -> AttentionKV:
    """Rows of different lengths as one batch with a mask."""
    width = max(len(row) for row in tokens) + 1
    batch = torch.full((len(tokens), width, HEADS, 2, DIM), 1e3)
    mask = torch.zeros(len(tokens), width, dtype=torch.bool)
    for line, row in enumerate(tokens):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        batch[line, place], mask[line, place] = row, True
    return AttentionKV(batch[:, :, :, 0].transpose(1, 2), batch[:, :, :, 1].transpose(1, 2), mask)


def play(history: list[Write], slots: int, size: int) -> tuple[MemoryBank, list[ListRow]]:
    bank = MemoryBank(2, slots * size, HEADS, DIM, size)
    lists = [ListRow(slots, size) for _ in range(2)]
    for number, write in enumerate(history):
        tokens = tokens_of(write, number)
        bank.add(padded(tokens, write.left), documents=write.documents, time=0.0)
        for row, listed in enumerate(lists):
            listed.add(tokens[row], write.documents[row])
        if write.end:
            bank.end_document()
            for listed in lists:
                listed.close()
                listed.open = False
    return bank, lists


def ask(rows: int) -> torch.Tensor:
    return torch.randn(rows, 4, 3, DIM, generator=torch.Generator().manual_seed(123))


def assert_same(first: MemoryBank, second: MemoryBank) -> None:
    same(*(bank.search(ask(2), 3) for bank in (first, second)))


@settings(max_examples=60, deadline=None)
@given(history=HISTORIES, slots=some.integers(1, 5), size=some.integers(1, 4), num=some.integers(1, 6))
def test_any_history_of_writes_leaves_what_python_lists_would_hold(history, slots, size, num):
    bank, lists = play(history, slots, size)
    queries = ask(2)
    found = bank.search(queries, num)
    assert bank.chunks.tolist() == [len(listed.there) for listed in lists]
    assert bank.waiting.tolist() == [len(listed.tail) for listed in lists]
    assert bank.tokens.tolist() == [sum(len(tokens) for _, _, tokens in listed.there.values()) for listed in lists]
    for row, listed in enumerate(lists):
        periods = dict(zip(found.chunks[row].flatten().tolist(), found.period[row].flatten().tolist(), strict=True))
        assert [periods[number] for number in sorted(periods)] == sorted(periods.values()), "by age"
        for number, (document, start, tokens) in listed.there.items():
            origin = bank.provenance(row, number)
            assert (origin.document, origin.start_token, origin.length) == (document, start, len(tokens))
        for head, token in product(range(4), range(3)):
            best = listed.best(queries[row, head, token], head // 2, num)
            real = found.mask[row, head, token]
            pairs = torch.stack([part[row, head, token][real] for part in (found.keys, found.values)], dim=1)
            wanted = [each[head // 2] for chunk in best for each in chunk]
            assert len(pairs) == len(wanted) and all(map(torch.equal, pairs, wanted))


@settings(max_examples=40, deadline=None)
@given(
    length=some.integers(0, 30),
    cuts=some.lists(some.integers(0, 30), max_size=4),
    slots=some.integers(1, 5),
    size=some.integers(1, 4),
    dtype=some.sampled_from([torch.float32, torch.bfloat16]),
)
def test_adding_in_any_parts_equals_adding_at_once(length, cuts, slots, size, dtype):
    draw = torch.Generator().manual_seed(length)
    keys, values = (torch.randn(2, HEADS, length, DIM, generator=draw) for _ in range(2))
    once, parts = (MemoryBank(2, slots * size, HEADS, DIM, size, dtype=dtype) for _ in range(2))
    once.add(AttentionKV(keys, values))
    edges = [0, *sorted(min(cut, length) for cut in cuts), length]
    for first, last in pairwise(edges):
        parts.add(AttentionKV(keys[:, :, first:last], values[:, :, first:last]))
    assert parts.chunks.tolist() == [min(length // size, slots)] * 2
    assert_same(once, parts)
    once.end_document()
    parts.end_document()
    assert_same(once, parts)


@settings(max_examples=30, deadline=None)
@given(history=HISTORIES, after=HISTORIES, slots=some.integers(1, 5), size=some.integers(1, 4))
def test_a_loaded_bank_goes_on_as_the_saved_one(history, after, slots, size):
    bank, _ = play(history, slots, size)
    copy = MemoryBank(2, slots * size, HEADS, DIM, size)
    copy.load_state_dict(bank.state_dict())
    assert_same(bank, copy)
    for number, write in enumerate(after):
        for each in (bank, copy):
            each.add(padded(tokens_of(write, 50 + number), write.left), documents=write.documents, time=1.0)
    assert_same(bank, copy)
    for row, live in enumerate(bank.chunks.tolist()):
        for chunk in bank.search(ask(2), max(1, live)).chunks[row].unique().tolist():
            assert chunk < 0 or bank.provenance(row, chunk) == copy.provenance(row, chunk)
