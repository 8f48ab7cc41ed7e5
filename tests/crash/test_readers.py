"""Readers beside a writer see nothing but states that there were, in their order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.crash.forks import Forks
from tests.store.small import open_small, words

from longmem.errors import StoreDamaged
from longmem.store.places import until_found
from longmem.store.reading import read_chunks
from longmem.store.segments import DataFile


def read_beside_a_writer(
    readers: int, seconds: float, changes: int, folder: Path, forks: Forks
) -> dict[str, Counter[str]]:
    """What the writer and all readers together did."""
    ending = forks.run(
        "tests.crash.readers:stage", path=folder / "store", readers=readers, seconds=seconds, changes=changes
    )
    assert ending.fine, ending
    *people, (_, problems) = [each for each in ending.said if each[0] != "waiting"]
    for name, told in people:
        assert told["fault"] is None, f"{name}, after {told['counts']}: {told['fault']}"
    assert problems == []
    counts = {"writer": Counter(people[0][1]["counts"]), "readers": Counter()}
    for _, told in people[1:]:
        counts["readers"].update(told["counts"])
    return counts


def test_three_readers_see_states_that_there_were(folder: Path, forks: Forks) -> None:
    counts = read_beside_a_writer(3, 5.0, 10, folder, forks)
    assert counts["readers"]["states"] >= 3


@pytest.mark.slow
def test_eight_readers_see_states_that_there_were_for_a_minute(
    folder: Path, forks: Forks, record_property: Callable[[str, object], None]
) -> None:
    counts = read_beside_a_writer(8, 60.0, 200, folder, forks)
    for who, did in counts.items():
        for what, count in did.items():
            record_property(f"{who}: {what}", count)
    assert counts["writer"]["compact"] > 1 and counts["readers"]["states"] > 80 < counts["readers"]["chunks"]


def test_a_reader_may_be_overtaken_by_compact_again_and_again(folder: Path) -> None:
    overtaken = 0
    with open_small(folder / "store") as store:
        store.add_document("alice", words(0, 40), name="0")
        with open_small(folder / "store", mode="read") as reader:

            def read() -> list[DataFile]:
                nonlocal overtaken
                with reader.snapshot() as snapshot:
                    rows = read_chunks(snapshot, "alice").files
                if overtaken < 6:
                    overtaken += 1
                    store.add_document("bob", words(overtaken, 40), name=f"{overtaken}")
                    store.compact()  # the file of before is gone, its contents stand in another one
                return [reader.data_file(row) for row in rows]

            (file,) = until_found(read)
            assert overtaken == 6 and len(file) == 21 * 7
            file.path.unlink()
            del file
            with pytest.raises(StoreDamaged, match="this data file is missing"):
                until_found(read)
