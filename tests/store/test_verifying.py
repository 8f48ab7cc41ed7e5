"""Verify finds every damaged byte, and nothing damaged is ever answered; repair gives back the same bits."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from tests.store.small import NumberModel, open_small, state_of, words

from longmem.errors import LongMemError, StoreDamaged, StoreError
from longmem.store import adding
from longmem.store.records import Problem
from longmem.store.seal import SEAL
from longmem.store.sqlite import translated


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of several data files, closed; only copied."""
    folder = tmp_path_factory.mktemp("original") / "memory"
    with open_small(folder, dtype="float16") as store, patch.object(adding, "FILE_BYTES", 30_000):
        for number in range(6):
            store.add_document("alice", words(number, 120 * number + 30), name=f"{number}", time=float(number))
        store.add_document("bob", ids=list(range(100)) * 2, name="ids", metadata={"a": [1, 2]}, time=9.0)
        store.append("bob", ids=range(40), name="ids")
        store.forget("alice", name="2")  # something dead is in the files, too
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "memory")
    return tmp_path / "memory"


@pytest.fixture(scope="module")
def expected(original: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    copy = tmp_path_factory.mktemp("copy") / "memory"
    shutil.copytree(original, copy)
    with open_small(copy, mode="read", model=None) as store:
        return state_of(store)


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(bytes(data))


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "segments").iterdir())


def test_a_whole_store_is_clean(folder: Path) -> None:
    with open_small(folder, mode="read", model=None) as store:
        report = store.verify()
    assert (report.problems, report.clean, report.sealed, report.documents) == ([], True, True, 6)
    assert report.files == len(segments(folder)) > 3
    assert report.bytes >= sum(path.stat().st_size for path in segments(folder))


def damage_data(folder: Path) -> None:
    for number, path in enumerate(segments(folder)):
        flip(path, (number * 7919) % path.stat().st_size)


def cut_data(folder: Path) -> None:
    for path in segments(folder)[1:]:
        path.write_bytes(path.read_bytes()[:-3])


def lose_data(folder: Path) -> None:
    for path in segments(folder)[::2]:
        path.unlink()


@pytest.mark.parametrize("damage", [damage_data, cut_data, lose_data])
def test_data_files_are_healed_to_the_last_bit(
    folder: Path, original: Path, expected: dict[str, Any], damage: Callable[[Path], None]
) -> None:
    damage(folder)
    with open_small(folder, mode="read", model=None) as store:
        found = store.verify()
        assert not found.clean and len(found.problems) >= 2
        with pytest.raises(StoreError):
            state_of(store)
    with open_small(folder) as store:
        report = store.verify(repair=True)
        assert report.clean and len(report.problems) == len(found.problems)
        assert report.rebuilt_tokens and report.same_bits and report.sealed
        assert state_of(store) == expected
    assert [path.read_bytes() for path in segments(folder)] == [path.read_bytes() for path in segments(original)]


def test_only_what_is_damaged_is_encoded_again(tmp_path: Path) -> None:
    with open_small(tmp_path / "memory") as store:
        for number in range(50):
            store.add_document("alice", ids=[number] * 128, name=f"{number}")
        store.compact()
        (path,) = segments(store.path)
        flip(path, path.stat().st_size // 2)
        report = store.verify(repair=True)
        assert report.clean and 0 < report.rebuilt_tokens < 50 * 128


def test_without_the_model_damage_is_found_and_not_repaired(folder: Path) -> None:
    damage_data(folder)
    with open_small(folder, model=None) as store:
        report = store.verify(repair=True)
    assert not report.clean and "opened without a model" in report.problems[0].what


def test_a_device_that_rounds_otherwise_gives_a_file_of_another_name(folder: Path, expected: dict[str, Any]) -> None:
    before = {path.name for path in segments(folder)}
    other = NumberModel()
    other.table = other.table * (1 + 2**-6)
    segments(folder)[0].unlink()
    with open_small(folder, model=other) as store:
        report = store.verify(repair=True)
        assert report.clean and report.same_bits is False and store.verify().clean
        assert len(before - {path.name for path in segments(folder)}) == 1
        state = state_of(store)
    for namespace, documents in expected.items():
        assert [{**each, "chunks": ""} for each in documents] == [{**each, "chunks": ""} for each in state[namespace]]


def test_every_flipped_byte_of_a_sealed_catalog_is_refused_and_found(folder: Path, expected: dict[str, Any]) -> None:
    catalog, draw = folder / "catalog.sqlite", np.random.default_rng(0)
    places = [0, 20, 100, 4096, *draw.integers(0, catalog.stat().st_size, 30).tolist()]
    for place in places:
        bit = int(draw.integers(8))
        flip(catalog, place, bit)
        for mode in ("read", "write"):
            with pytest.raises(StoreDamaged) as caught:
                open_small(folder, mode=mode)
            assert "\n" not in str(caught.value) and "catalog" in str(caught.value)
        # some damage leaves nothing that can be read
        with suppress(LongMemError), open_small(folder, mode="read", model=None, check=False) as store:
            assert not store.verify().clean
        flip(catalog, place, bit)
    with open_small(folder, mode="read", model=None) as store:
        assert state_of(store) == expected


def test_a_flipped_byte_of_a_catalog_without_seal_never_gives_a_wrong_answer(
    folder: Path, expected: dict[str, Any]
) -> None:
    (folder / SEAL).unlink()
    catalog, draw = folder / "catalog.sqlite", np.random.default_rng(1)
    answered = 0
    for place in draw.integers(0, catalog.stat().st_size, 60).tolist():
        bit = int(draw.integers(8))
        flip(catalog, place, bit)
        said = None
        try:
            with open_small(folder, mode="read", model=None) as store:
                assert state_of(store) == expected
                for number in (0, 1, 3):
                    assert store.document("alice", f"{number}").name == f"{number}"
                answered += 1
        except StoreError as error:
            said = error
        assert said is None or isinstance(said, StoreDamaged) or "schema" in str(said), said
        assert "\n" not in str(said)
        flip(catalog, place, bit)
    assert answered < 60


def test_closing_a_damaged_store_does_not_seal_it(folder: Path) -> None:
    catalog = folder / "catalog.sqlite"
    flip(catalog, catalog.stat().st_size - 5)
    with open_small(folder, check=False):
        pass
    with pytest.raises(StoreDamaged):
        open_small(folder)


@pytest.mark.parametrize("table", ["files", "totals"])
def test_records_that_can_be_made_again_are_repaired(folder: Path, expected: dict[str, Any], table: str) -> None:
    change_rows(folder, table, "blocks = zeroblob(length(blocks))" if table == "files" else "rows = rows + 1")
    with pytest.raises(StoreDamaged, match=f"table {table}"):
        open_small(folder)
    with open_small(folder, check=False) as store:
        report = store.verify(repair=True)
        assert report.clean and report.problems, report
        assert state_of(store) == expected
    with open_small(folder) as store:
        assert store.verify().problems == [] and state_of(store) == expected


@pytest.mark.parametrize("table", ["documents", "contents", "texts", "pieces", "meta"])
def test_rows_that_cannot_be_known_are_reported_and_not_made_up(folder: Path, table: str) -> None:
    changes = {
        "documents": "tokens = tokens + 1",
        "contents": "first_chunk = first_chunk + 1",
        "texts": "token_ids = zeroblob(12)",
        "pieces": "tokens = 1",
        "meta": "value = value || '1'",
    }
    change_rows(folder, table, changes[table])
    if table == "meta":
        with pytest.raises(StoreDamaged, match="table meta"):
            open_small(folder, check=False)
        return
    with open_small(folder, check=False) as store:
        report = store.verify(repair=True)
        assert not report.clean and any(table in problem.where for problem in report.problems)


@pytest.mark.parametrize("table", ["documents", "pieces", "contents", "files", "texts", "totals"])
def test_a_lost_row_is_missed(folder: Path, table: str) -> None:
    change_rows(folder, table, None)
    with open_small(folder, mode="read", model=None) as store:
        assert not store.verify().clean
        if table != "texts":  # of the last document alone, which is asked for by name
            with pytest.raises(StoreDamaged):
                state_of(store)
    with pytest.raises(StoreDamaged):
        open_small(folder)
    with open_small(folder, check=False) as store:
        # where rows are lost, the row counts are not made anew to look right
        assert not store.verify(repair=True).clean


def change_rows(folder: Path, table: str, change: str | None) -> None:
    """What a damaged disk may do, done with SQLite itself: nothing but check sums and totals can tell."""
    connection = sqlite3.connect(folder / "catalog.sqlite")
    connection.execute("PRAGMA journal_mode = WAL")
    key = (
        "document = (SELECT max(document) FROM pieces)" if table == "pieces" else "rowid = (SELECT max(rowid) FROM {0})"
    )
    where = key.format(table)
    connection.execute(
        f"DELETE FROM {table} WHERE {where}" if change is None else f"UPDATE {table} SET {change} WHERE {where}"
    )
    connection.commit()
    connection.close()
    (folder / SEAL).unlink()


def test_free_space_and_a_broken_seal_are_repaired(folder: Path, expected: dict[str, Any]) -> None:
    (folder / SEAL).write_text("{}")
    with pytest.raises(StoreDamaged, match=r"catalog\.seal"):
        open_small(folder)
    with open_small(folder, check=False) as store:
        report = store.verify(repair=True)
        assert [problem.kind for problem in report.problems] == ["seal"] and report.clean
    with open_small(folder) as store:
        assert state_of(store) == expected


def test_compact_refuses_to_work_on_a_damaged_catalog(folder: Path) -> None:
    change_rows(folder, "pieces", None)
    with open_small(folder, check=False) as store, pytest.raises(StoreDamaged):
        store.compact()
    assert len(segments(folder)) > 3


def test_verify_says_how_far_it_is(folder: Path) -> None:
    said: list[Any] = []
    with open_small(folder, mode="read", model=None) as store:
        store.verify(progress=said.append)
    assert said[-1].done == said[-1].total and {each.step for each in said} == {"check"}


def test_what_sqlite_says_of_a_broken_catalog_is_one_line_each(folder: Path) -> None:
    catalog = folder / "catalog.sqlite"
    whole = catalog.read_bytes()
    pages = len(whole) // 4096
    structure = 0
    for one in range(1, pages - 1, 3):
        data = bytearray(whole)
        for at, other in ((one, pages - 1), (pages - 1, one)):
            data[at * 4096 : (at + 1) * 4096] = whole[other * 4096 : (other + 1) * 4096]
        catalog.write_bytes(bytes(data))
        problems = [Problem("seal", "catalog.sqlite", "cannot be opened at all")]
        with suppress(StoreDamaged), open_small(folder, mode="read", model=None, check=False) as store:
            problems = store.verify().problems
        structure += sum(problem.kind == "structure" for problem in problems)
        assert problems and all(len(problem.what.splitlines()) == 1 for problem in problems)
    assert structure


def test_an_error_of_sqlite_becomes_one_short_line() -> None:
    error = translated(sqlite3.OperationalError("cannot read 'a\nb" + "c" * 5000 + "'"), Path("catalog.sqlite"))
    assert "cannot read 'a bccc" in str(error) and "\n" not in str(error) and len(str(error)) < 400
