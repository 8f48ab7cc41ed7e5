"""The long suites of the store, and how much of what they tried: kills, damage, shortages, readers, lives.

``python -m benchmarks.store_trials --out results/store-trials.json``, with names of suites in front for some of them; a
suite that is run again replaces its own figures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as Xml
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import surroundings

SUITES = {
    "random kills": "tests/crash/test_random_kills.py::test_killed_at_300_random_moments",
    "failpoints": "tests/crash/test_failpoints.py",
    "damage": "tests/crash/test_damage.py::test_1000_damages_are_never_answered_and_always_found",
    "readers": "tests/crash/test_readers.py::test_eight_readers_see_states_that_there_were_for_a_minute",
    "lives": "tests/store/test_state_machine.py::test_many_long_lives_are_as_in_the_model",
    "shortage": "tests/crash/test_shortage.py",
}


def run_suite(where: str) -> dict[str, Any]:
    """Run tests, the slow ones too; what they counted."""
    around = surroundings(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--slow", where]
        begun = time.monotonic()
        # the older family of reports has a place for what tests count
        code = subprocess.run([*command, "-o", "junit_family=xunit1", f"--junitxml={report}"], check=False).returncode
        seconds = time.monotonic() - begun
        cases = Xml.parse(report).findall(".//testcase")
    counts: Counter[str] = Counter()
    for case in cases:
        for each in case.findall("properties/property"):
            counts[each.attrib["name"]] += int(each.attrib["value"])
    return {
        "where": where,
        "surroundings": around,
        "seconds": round(seconds),
        "passed": code == 0,
        "tests": len(cases),
        "failed": [case.attrib["name"] for case in cases if case.find("failure") is not None],
        "skipped": sum(case.find("skipped") is not None for case in cases),
        "counts": dict(sorted(counts.items())),
    }


def main() -> None:
    """Run the suites named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", choices=[*SUITES, []], help="names; all by default")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; figures of other suites in it stay")
    given = parser.parse_args()
    failed = False
    for name in given.suites or SUITES:
        figures = run_suite(SUITES[name])
        failed |= not figures["passed"]
        known = json.loads(given.out.read_text()) if given.out.exists() else {}
        command = "python -m benchmarks.store_trials --out results/store-trials.json"
        suites = {**known.get("suites", {}), name: figures}
        given.out.write_text(json.dumps({"command": command, "suites": suites}, indent=1) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
