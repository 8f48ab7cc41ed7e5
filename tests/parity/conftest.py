"""Hands every reference, or every case of it, to the tests that ask for one."""

import pytest
from tests.parity.reference import FOLDER, Case, Reference

REFERENCES = [Reference(path) for path in sorted(FOLDER.glob("fixture_*.json"))]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every reference, or every case of the module's ``KIND``; ``probed_case``: those with reads alone."""
    if not REFERENCES:
        raise pytest.UsageError(
            f"{FOLDER}: holds no fixture_*.json; unset LONGMEM_PARITY_DIR or name a folder that does"
        )
    if "reference" in metafunc.fixturenames:
        metafunc.parametrize("reference", REFERENCES, ids=lambda reference: reference.path.stem)
    for wanted in {"case", "probed_case"} & set(metafunc.fixturenames):
        cases = [
            case
            for reference in REFERENCES
            for case in (Case(reference, name) for name in reference.record["cases"])
            if case.record["kind"] == metafunc.module.KIND and (wanted == "case" or case.probes)
        ]
        metafunc.parametrize(wanted, cases, ids=lambda case: f"{case.reference.path.stem}-{case.name}")
