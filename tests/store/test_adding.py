"""Adding: in parts, in any company and by workers as at once, once only; nothing of other namespaces shows."""

from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from tests.conftest import make_pair
from tests.family_table import V, tiny_gpt
from tests.generation.models import longmem
from tests.store.small import NumberModel, chunks_of, open_small, quick_folder, words

from longmem import LongMem
from longmem.errors import LongMemError, StoreError
from longmem.store import MemoryStore, NewDocument, Progress, adding
from longmem.store.encode import Encoder, new_layout
from longmem.store.store import Stats

PIECE = 16 * 8
"""Tokens of a whole content in a small store."""


@pytest.fixture
def store() -> Iterator[MemoryStore]:
    with quick_folder() as folder, open_small(folder / "memory") as opened:
        yield opened


@pytest.mark.parametrize("first", [1, 3, 8, 9, PIECE - 1, PIECE, 2 * PIECE + 20])
@pytest.mark.parametrize("second", [1, 8, 11, PIECE + 3])
def test_adding_in_parts_is_adding_at_once(store: MemoryStore, first: int, second: int) -> None:
    ids = np.random.default_rng(first * 1000 + second).integers(0, 256, first + second + 5)
    store.add_document("alice", ids=ids, name="at once")
    store.add_document("alice", ids=ids[:first], name="in parts")
    receipt = store.append("alice", ids=ids[first : first + second], name="in parts")
    assert receipt.status == "appended" and receipt.revision == 2
    last = store.append("alice", ids=ids[first + second :], name="in parts")
    assert (last.tokens, last.revision) == (len(ids), 3)
    chunks = chunks_of(store, "alice")
    assert chunks["at once"].crc() == chunks["in parts"].crc()
    assert store.token_ids("alice", "in parts").tolist() == ids.tolist()
    assert store.verify().clean


class CountingModel(NumberModel):
    """Counts the segments that are encoded, whatever fills up the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 0

    def encode(self, input_ids: torch.Tensor) -> Any:
        self.tokens += int(input_ids.bool().any(1).sum()) * input_ids.shape[1]
        return super().encode(input_ids)


def test_equal_texts_are_encoded_once_in_a_namespace_and_across(tmp_path: Path) -> None:
    model = CountingModel()
    with open_small(tmp_path / "memory", model=model) as store:
        store.add_document("alice", words(1, 500), name="a")
        encoded, bytes_before = model.tokens, store.stats().file_bytes
        store.add_document("alice", words(1, 500), name="b")
        store.add_document("bob", words(1, 500), name="c")
        assert model.tokens == encoded and store.stats().file_bytes == bytes_before
        assert chunks_of(store, "alice")["a"].crc() == chunks_of(store, "bob")["c"].crc()
        again = store.add_document("bob", words(1, 500), name="c", expires=9e9)
        assert (again.status, store.document("bob", "c").expires, model.tokens) == ("updated", 9e9, encoded)


def test_nothing_tells_a_namespace_that_another_has_the_same_text(tmp_path: Path) -> None:
    """Bob does the same in a store of his own and in one where Alice has had his texts for long."""
    seen = []
    for shared in (False, True):
        with open_small(tmp_path / f"{shared}") as store:
            if shared:
                store.add_document("alice", words(1, 500), name="a", time=1.0)
                store.add_document("alice", words(2, 100), name="b", time=2.0)
            receipts = [
                store.add_document("bob", words(1, 500), name="mine", time=3.0),
                store.add_document("bob", words(1, 500), name="again", time=4.0),
                store.add_document("bob", words(2, 100), name="more", time=5.0),
                store.append("bob", words(3, 20), name="more"),
            ]
            documents = [{**vars(info), "id": None} for info in store.documents("bob")]
            stats = store.stats("bob")
            forgotten = [(each.name, each.tokens) for each in store.forget("bob", name="mine")]
            seen.append((receipts, documents, stats, forgotten))
    assert seen[0] == seen[1]
    assert isinstance(seen[0][2], Stats) and seen[0][2].file_bytes is None


def test_many_documents_stream_through(store: MemoryStore) -> None:
    """Receipts come long before the last document is read, so memory does not grow with their number."""
    numbers = iter(range(30))
    stream = store.add_documents("alice", (NewDocument(f"{number}", words(number, 200)) for number in numbers))
    next(stream)
    assert next(numbers) < 8
    assert len(list(stream)) == 28


def test_an_interrupted_add_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model, text = CountingModel(), words(1, 10 * PIECE)

    def stop(progress: Progress) -> None:
        if progress.done >= 6 * PIECE:
            raise InterruptedError

    with open_small(tmp_path / "memory", model=model) as store:
        with pytest.raises(InterruptedError):
            store.add_document("alice", text, name="book", progress=stop)
        assert store.documents("alice") == [] and model.tokens == 6 * PIECE
    model.tokens = 0
    with open_small(tmp_path / "memory", model=model) as store:
        assert store.add_document("alice", text, name="book").status == "added"
        # the piece at which it stopped was encoded and not committed
        assert model.tokens == 10 * PIECE + 8 - 5 * PIECE
        assert store.text("alice", "book") == text and store.verify().clean


def test_compacting_between_the_receipts_of_a_stream_takes_nothing_from_it(store: MemoryStore) -> None:
    documents = [NewDocument(f"{number}", words(number % 3, 400)) for number in range(6)]
    store.add_document("bob", words(1, 300), name="begins as one of them")
    for _ in store.add_documents("alice", documents):  # each with the beginning of the next document
        store.forget("bob", everything=True)
        store.compact()
    assert [store.text("alice", info.name) for info in store.documents("alice")] == [
        words(n % 3, 400) for n in range(6)
    ]
    assert store.verify().clean


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": "a", "ids": [1]}, "give either a text or ids="),
        ({"text": Path("a.txt")}, "text .a PosixPath. must be a str, what it says"),
        ({"text": ""}, "nothing to remember"),
        ({"ids": [-100]}, "must lie in 0..2"),
        ({"ids": [0.5]}, "must be integers"),
        ({"ids": [3, 257]}, "document 'x' has the token id 257, the model knows 257"),
        ({"text": "a\ud800"}, "no valid Unicode .character 1."),
        ({"text": "a", "namespace": ""}, "namespace .''. must be 1 to 1000 characters"),
        ({"text": "a", "name": "a\nb"}, "none of them for control"),
        ({"text": "a", "namespace": 42}, "a name of a namespace or document .42. must be a text"),
        ({"text": "a", "source": "\ud800"}, "must be a text"),
        ({"text": "a", "source": Path("a")}, "must be a text"),
        ({"text": "a", "metadata": {"a": "\ud800"}}, "must be a JSON object"),
        ({"text": "a", "metadata": {"a": float("nan")}}, "must be a JSON object"),
        ({"text": "a", "expires": "tomorrow"}, "must be seconds since the epoch"),
        ({"text": "a", "expires": 1577836800.0}, "has passed, 'x' would never be found; give a later time"),
    ],
)
def test_what_cannot_be_added_is_refused_in_one_line(store: MemoryStore, given: dict[str, Any], message: str) -> None:
    given = {"namespace": "x", "name": "x", **given}
    with pytest.raises(LongMemError, match=message) as caught:
        store.add_document(**given)
    assert "\n" not in str(caught.value)
    assert store.namespaces() == [] and store.stats().file_bytes == 0


def test_an_append_to_a_document_that_was_forgotten_and_added_again_is_refused(store: MemoryStore) -> None:
    store.add_document("alice", "the old text", name="diary")
    commit = adding.commit

    def late(*given: Any) -> Any:
        adding.commit = commit
        store.forget("alice", name="diary")
        store.add_document("alice", "another text", name="diary")
        return commit(*given)

    with patch.object(adding, "commit", late), pytest.raises(StoreError, match="changed by something else meanwhile"):
        store.append("alice", " goes on", name="diary")
    assert store.text("alice", "diary") == "another text"


def test_numbers_that_the_store_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = NumberModel()
    model.table = model.table * 1e6
    with (
        open_small(tmp_path / "memory", model=model, dtype="float16") as store,
        pytest.raises(StoreError, match=r"cannot be stored as float16; .*bfloat16"),
    ):
        store.add_document("alice", "text", name="x")
    assert not list((tmp_path / "memory").glob("*.bin"))


# encoding


@pytest.mark.parametrize("family", ["alibi_gpt", "gpt2", "llama", "qwen3", "mixtral", "gemma2", "bloom", "gpt-neox"])
def test_a_piece_leaves_the_same_bits_in_any_company(family: str) -> None:
    model = longmem(family, chunk_size=4)
    encoder = Encoder(model, new_layout(model, "float32", 4, 24))
    draw = np.random.default_rng(0)
    pieces = [draw.integers(3, V, size).astype(np.uint32) for size in (1, 5, 16, 17, 24, 25, 100, 200, 24, 48)]
    together = encoder.encode(pieces)
    for number in (0, 3, 6, 9):
        (alone,) = encoder.encode([pieces[number]])
        assert np.array_equal(alone.kv, together[number].kv) and np.array_equal(alone.keys, together[number].keys)
    backwards = encoder.encode(pieces[::-1])
    assert all(np.array_equal(backwards[9 - number].kv, together[number].kv) for number in range(10))


def test_a_real_tokenizer_and_backbone_keep_every_character(
    tmp_path: Path, tiny_backbone: Any, byte_tokenizer: Any
) -> None:
    """Tokens that cut characters in two, at the ends of segments and pieces, too."""
    model = longmem(tiny_backbone, chunk_size=4)
    text = "na\u00efve \U0001f600\u4e2d\u6587 \r\n\t end. " * 60
    with MemoryStore.open(tmp_path / "memory", model=model, tokenizer=byte_tokenizer, segment_tokens=16) as store:
        receipt = store.add_document("alice", text, name="a")
        assert receipt.tokens == len(text.encode()) > 3 * store.layout.piece_tokens
        assert store.text("alice", "a") == text
        assert store.append("alice", text[:33], name="a").tokens == receipt.tokens + len(text[:33].encode())
        assert store.text("alice", "a") == text + text[:33]
        ids = store.token_ids("alice", "a")
        assert byte_tokenizer.decode(ids.tolist()) == text + text[:33]
        store.add_document("alice", ids=ids, name="as ids")
        assert store.text("alice", "as ids") == text + text[:33]


def test_the_tokenizer_is_found_where_a_checkpoint_names_its_backbone_from_its_own_folder(
    tmp_path: Path, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pair(tmp_path / "pair", byte_tokenizer)
    monkeypatch.chdir(tmp_path)
    for named in ("pair/sidenet", str(tmp_path / "pair" / "sidenet")):
        model = LongMem.from_pretrained(named).eval()
        with MemoryStore.open(tmp_path / named.replace("/", "-"), model=model) as store:
            assert store.add_document("alice", "hello there", name="a").tokens == 11
            # by a path that means the same from everywhere
            assert store.layout.backbone == str((tmp_path / "pair" / "backbone").resolve())
    bare = MemoryStore.open(tmp_path / "bare", model=longmem())
    with bare, pytest.raises(StoreError, match=r"the store has no fast tokenizer; open it with tokenizer="):
        bare.add_document("alice", "hello there", name="a")


# several processes that encode


DRAW = np.random.default_rng(0)
SOME = [NewDocument(f"{number:02}", ids=DRAW.integers(0, 64, number % 4 * 200 + 5), time=1.0) for number in range(8)]


def added(path: Path, workers: Any) -> Any:
    """By a backbone that has no name: workers are given its weights. Every document comes twice."""
    model = longmem(tiny_gpt(), chunk_size=4)
    with MemoryStore.open(path, model=model, dtype="float32", segment_tokens=16) as store:
        twice = [each for some in SOME for each in (some, replace(some, name=f"{some.name} again"))]
        receipts = list(store.add_documents("alice", twice, workers=workers))
        assert store.verify().clean
        ids = [store.token_ids("alice", each.name).tolist() for each in receipts]
        return receipts, ids, {name: some.crc() for name, some in chunks_of(store, "alice").items()}


@pytest.mark.parametrize("workers", [2, pytest.param("ray:2", marks=pytest.mark.slow)])
def test_workers_leave_what_one_process_leaves(tmp_path: Path, workers: Any) -> None:
    if isinstance(workers, str):
        pytest.importorskip("ray")
    assert added(tmp_path / "many", workers) == added(tmp_path / "one", 1)


def test_a_worker_that_is_killed_ends_the_call_with_one_line(tmp_path: Path) -> None:
    killed: Future[Any] = Future()
    killed.set_exception(BrokenProcessPool("A process in the process pool was terminated abruptly"))
    with (
        open_small(tmp_path / "memory") as store,
        patch.object(adding, "_processes", lambda *_: (lambda pieces: killed, 4)),
        pytest.raises(StoreError, match=r"^a worker failed or was killed \(BrokenProcessPool[^\n]*$"),
    ):
        list(store.add_documents("alice", SOME, workers=2))
