"""What the crash suites share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.crash.forks import Forks
from tests.store.small import quick_folder


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    with Forks() as template:
        yield template


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder, in memory where there is one: kills do not need a disk."""
    with quick_folder() as made:
        yield made
