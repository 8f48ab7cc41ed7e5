"""The tables of benches in docs/experiments.md are what their JSON says, and the sentences beside them hold."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
_spec = importlib.util.spec_from_file_location("result_tables", ROOT / "docs" / "result_tables.py")
assert _spec is not None and _spec.loader is not None
result_tables = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(result_tables)


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "results" / name).read_text(encoding="utf-8"))
    return found


def test_the_tables_of_benches_are_those_of_their_files() -> None:
    shown = [name for marker in re.findall(r"<!-- results: (.*?) -->", PAGE) for name in marker.split()]
    benches = [name for name in shown if "protocols" not in read(name.removeprefix("results/"))]
    assert {"results/recall.json", "results/store.json"} <= set(benches)
    for name in benches:
        table = result_tables.table_of(read(name.removeprefix("results/")), name)
        assert table in PAGE, f"{name} is not what the page shows; run make docs"


def test_an_index_is_faster_than_exact_search_and_where_it_misses_95_of_100_the_page_says_so() -> None:
    found = [
        (index, text, size["tokens"], record)
        for name in ("recall.json", "recall-faiss.json")
        for text, texts in read(name)["texts"].items()
        for size in texts["sizes"]
        for index, record in size.items()
        if index != "tokens"
    ]
    assert all(record["exact_over_index"] > 1 for *_, record in found)
    missed = [each for each in found if min(each[3]["recall_by_head"]) < 0.95]
    assert {each[:3] for each in missed} == {("two_stage", "latex", 1048576)}
    for _, _, _, record in missed:
        said = f"finds {record['recall']:.3f} of the best (worst head {min(record['recall_by_head']):.3f})"
        assert said in PAGE.partition("**Missed on LaTeX**")[2]


def test_both_runs_of_decoding_are_told_with_their_rounds() -> None:
    for name in ("recall-decoding.json", "recall-decoding-before.json"):
        speed = read(name)["decoding"]["speed_against_fastest_of_the_small_memory"]["two_stage"]
        assert (
            f"{speed['median']:.2f} ({speed['min']:.2f} to {speed['max']:.2f})"
            in PAGE.partition("**Missed on books")[2]
        )


def test_adding_is_as_fast_as_the_page_says() -> None:
    add = read("store.json")["models"][0]["add"]
    assert all(into["over_plain_forward"]["median"] >= 1.2 for into in add["into"].values())
    assert 0.9 < add["full_over_empty"]["median"] < 1.1


def test_results_name_no_place_of_one_machine() -> None:
    for name in ("store", "recall", "recall-faiss", "recall-ways", "recall-decoding", "recall-decoding-before"):
        assert not re.search(r"/(work|tmp|root|home)/", json.dumps(read(f"{name}.json"))), name
        assert read(f"{name}.json")["command"].startswith("python -m benchmarks.")
