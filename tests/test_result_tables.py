"""The tables of results in docs/experiments.md are what their JSON says, and the sentences beside them hold."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
from bench_tables import bench_table
from evaluation_tables import evaluation_table, gains_table, groups_table

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "results" / name).read_text(encoding="utf-8"))
    return found


def test_the_tables_are_those_of_their_files() -> None:
    shown = [name for marker in re.findall(r"<!-- results: (.*?) -->", PAGE) for name in marker.split()]
    assert {"results/recall.json", "results/store.json", "results/small-books/perplexity.json"} <= set(shown)
    for name in shown:
        result = read(name.removeprefix("results/"))
        table = (evaluation_table if "header" in result else bench_table)(result, name)
        assert table in PAGE, f"{name} is not what the page shows; run make docs"


def test_gains_are_those_of_their_files() -> None:
    for kind, make in (("gains", gains_table), ("groups", groups_table)):
        markers = re.findall(rf"<!-- {kind}: (.*?) -->", PAGE)
        assert markers
        for marker in markers:
            system, *names = marker.split()
            assert make({name: read(name.removeprefix("results/")) for name in names}, system) in PAGE, marker


def test_longmem_is_below_its_backbone_the_control_and_itself_without_memory_everywhere() -> None:
    for text in ("books", "latex", "python"):
        for protocol in read(f"small-{text}/perplexity.json")["protocols"].values():
            gaps = {
                g["against"]: g["documents"] for g in protocol["all"]["differences"] if g["system"] == "memory_8192"
            }
            for against in ("backbone", "memory_off", "control"):
                assert gaps[against]["high"] < 0, (text, protocol["protocol"], against)


def test_a_pass_key_is_found_as_often_as_the_page_says() -> None:
    lines = re.findall(r"(?m)^\| passkey, ([\d,]+) tokens \|.*\| ([\d.]+) % \(\d+ of (\d+);", PAGE)
    found = [(int(tokens.replace(",", "")), float(share), int(trials)) for tokens, share, trials in lines]
    assert len(found) == 6, "four lengths of Python source, two of books"
    for tokens, share, trials in found:
        assert trials == 200
        # the page: the goal of 95 % is reached up to 65,536 tokens, that of 90 % at 1M is missed
        assert share >= 95 if tokens <= 65_536 else share < 90


def test_two_stage_is_faster_than_exact_search_and_every_head_finds_95_of_100() -> None:
    found = [size["two_stage"] for texts in read("recall.json")["texts"].values() for size in texts["sizes"]]
    assert {record["chunks"] for record in found} == {16384, 65536, 262144}
    assert all(min(record["recall_by_head"] + record["recall_along"]) >= 0.95 for record in found)
    assert all(record["exact_over_index"] > 1 for record in found if record["keys_read"] < 1)


def test_decoding_with_a_large_memory_is_as_fast_as_the_page_says() -> None:
    decoding = read("recall-decoding.json")["decoding"]
    assert decoding["rounds"] >= 7
    for ending in ("", "_by_wall_clock"):
        speed = decoding["speed_against_fastest_of_the_small_memory" + ending]["two_stage"]
        said = f"{speed['median']:.2f} ({speed['min']:.2f} to {speed['max']:.2f})"
        assert said in PAGE.partition("**Goal: decoding at 1M")[2].partition("\n\n")[2].partition("What other ways")[0]


def test_adding_is_as_fast_as_the_page_says() -> None:
    add = read("store.json")["models"][0]["add"]
    assert all(into["over_plain_forward"]["median"] >= 1.2 for into in add["into"].values())
    assert 0.9 < add["full_over_empty"]["median"] < 1.1


def test_results_name_no_place_of_one_machine() -> None:
    for name in ("store", "recall", "recall-ways", "recall-decoding"):
        assert not re.search(r"/(work|tmp|root|home)/", json.dumps(read(f"{name}.json"))), name
        assert read(f"{name}.json")["command"].startswith("python -m benchmarks.")
