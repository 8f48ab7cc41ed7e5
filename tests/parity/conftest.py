"""Hands every reference, or every case of it, to the tests that ask for one."""

from __future__ import annotations

import pytest

from tests.parity.reference import FOLDER, Case, Reference

REFERENCES = [Reference.read(path) for path in sorted(FOLDER.glob("fixture_*.json"))]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every reference, or every case of every reference, with the ``kind`` that the test's marker asks for."""
    if not REFERENCES:
        raise pytest.UsageError(f"{FOLDER}: holds no fixture_*.json; unset LONGMEM_PARITY_DIR or name a folder that does")
    if "reference" in metafunc.fixturenames:
        metafunc.parametrize("reference", REFERENCES, ids=lambda reference: reference.path.stem)
    if "case" in metafunc.fixturenames:
        kind = getattr(metafunc.module, "KIND")
        cases = [
            Case(reference, name)
            for reference in REFERENCES
            for name, record in reference.record["cases"].items()
            if record["kind"] == kind
        ]
        metafunc.parametrize("case", cases, ids=lambda case: f"{case.reference.path.stem}-{case.name}")
