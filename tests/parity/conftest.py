"""Hands every reference, or every case of it, to the tests that ask for one."""

import pytest
from tests.parity.reference import FOLDER, Case, Reference

REFERENCES = [Reference(path) for path in sorted(FOLDER.glob("fixture_*.json"))]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every reference, or every case of a kind: ``eval_case``, ``grad_case``; ``probed_case``: with reads alone."""
    if not REFERENCES:
        raise pytest.UsageError(
            f"{FOLDER}: holds no fixture_*.json; unset LONGMEM_PARITY_DIR or name a folder that does"
        )
    if "reference" in metafunc.fixturenames:
        metafunc.parametrize("reference", REFERENCES, ids=lambda reference: reference.path.stem)
    cases = [Case(reference, name) for reference in REFERENCES for name in reference.record["cases"]]
    for wanted in {"eval_case", "probed_case", "grad_case", "sgd_case"} & set(metafunc.fixturenames):
        kind = "eval" if wanted == "probed_case" else wanted.removesuffix("_case")
        some = [case for case in cases if case.record["kind"] == kind and (wanted != "probed_case" or case.probes)]
        metafunc.parametrize(wanted, some, ids=lambda case: f"{case.reference.path.stem}-{case.name}")
