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


def says(words: str) -> None:
    """The page has these words, wherever its lines break."""
    assert words in " ".join(PAGE.split()), f"the page does not say: {words}"


def in_words(exact: dict[str, float]) -> str:
    return f"{exact['65536']} and {exact['1048576']}"


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


def test_the_true_pass_key_is_the_likeliest_in_every_trial() -> None:
    for name in ("needle", "needle-books"):
        for example in read(f"{name}/needle.json")["examples"]:
            assert example["values"]["memory_1048576"]["choice"] == 100, (name, example["id"])


def test_what_was_tried_on_needles_is_told_as_it_was_kept() -> None:
    trials = read("needle/trials.json")
    runs = {run["name"]: run for run in trials["runs"]}
    second = next(run for name, run in runs.items() if "(recipes/needle-sidenet.toml, second part)" in name)
    third = next(run for name, run in runs.items() if name.endswith("(recipes/needle-far.toml)"))
    fourth = next(run for name, run in runs.items() if "recipes/needle-far.toml, second part" in name)["exact"]
    fifth = next(run for name, run in runs.items() if "(third part)" in name)["exact"]
    before = second["exact, all trials of the final measurement"]["1048576"]
    says(f"brought 1M from {before} to {third['exact']['1048576']['percent']} %")
    says(f"brought 65,536 from {third['exact']['65536']['percent']} to {fourth['Python source']['65536']} %")
    says(
        f"it found {in_words(fourth['Python source'])} % there at 65,536 tokens and 1M, but {in_words(fourth['books'])}"
    )
    says(
        f"it was {in_words(fifth['books'])} % among books, and {in_words(fifth['Python source'])} % among Python source"
    )
    reading = second["at 1048576, 40 trials, chunks of 4, 128 tokens retrieved"]
    share = reading["some head found a chunk with the last token of the answer"]
    right = reading["last token right where it was found"]
    says(f"in {100 * share:.1f} % of 40 trials, and in only {100 * right:.0f} % of those")
    key = next(value for name, value in trials["keys"].items() if name.startswith("models/small"))["layer 3"]
    says(
        f"for {100 * key['first digit']:.0f} % of pass keys, one of the last digit for {100 * key['last digit']:.0f} %"
    )


def test_what_each_setting_is_worth_is_told_as_it_was_measured() -> None:
    axes = {axis["name"]: axis["values"] for axis in read("ablate-python/ablate.json")["axes"]}

    def percent(axis: str, value: str, protocol: str = "sliding") -> float:
        found = next(each for each in axes[axis] if each["value"] == value)["scores"][protocol]["percent"]
        return float(found)

    says(f"gain {-percent('chunk_size', '1'):.1f} % by the sliding window")
    says(f"instead of 64 gain {-percent('num_retrieved', '256'):.1f} %")
    says(f"chunks of 16 lose {percent('chunk_size', '16'):.1f} %")
    shared = (percent("rows", "shared"), percent("rows", "shared", "segments"))
    says(f"lose {shared[0]:.1f} % ({shared[1]:.1f} % by segments)")
    says(f"all of it to memory, is {percent('gate_share', '1'):.1f} % worse")
    assert min(percent("gate_share", each["value"]) for each in axes["gate_share"] if not each["default"]) > 0
    assert abs(percent("memory_size", "2,048")) < 0.1
    assert all(abs(percent("memory_dtype", each)) < 0.05 for each in ("float16", "bfloat16", "int8"))


def test_more_memory_on_long_latex_is_told_as_it_was_measured() -> None:
    axes = {axis["name"]: axis["values"] for axis in read("ablate-latex-long/ablate.json")["axes"]}
    sizes = {each["value"]: each["scores"]["segments"]["perplexity"] for each in axes["memory_size"]}
    counts = {each["value"]: each["scores"]["segments"]["perplexity"] for each in axes["num_retrieved"]}
    more, usual = counts["256"], sizes["8,192"]
    says(f"stand {100 * (more / usual - 1):.1f} % above 64 from 8,192 ({more:.3f} to {usual:.3f}")
    assert min(sizes, key=lambda size: float(sizes[size])) == "4,096"


def test_full_attention_is_as_slow_as_the_page_says() -> None:
    ratios = {(each["system"], each["context"]): each for each in read("efficiency/efficiency.json")["ratios"]}
    full = ratios["full", 16384]
    says(
        f"full attention takes {full['first_token']['median']:.1f} times as long to its first token, "
        f"{full['per_token']['median']:.1f} times as long for each further one and {full['peak']:.1f} times the memory"
    )
    says(f"new token takes {1 / ratios['windowed', 16384]['per_token']['median']:.1f} times as long")
    for field, below, above in (("first_token", 1024, 4096), ("per_token", 4096, 16384)):
        assert ratios["full", below][field]["median"] < 1 < ratios["full", above][field]["median"]


def test_memory_is_worth_as_much_in_a_conversation_as_the_page_says() -> None:
    result = read("dialogue/dialogue.json")
    everything = result["groups"][0]
    nats = next(
        gap["value"]
        for gap in everything["differences"]
        if (gap["system"], gap["against"], gap["metric"]) == ("memory_8192", "backbone", "answer_nats")
    )
    says(f"Memory is worth {-nats:.1f} nats a token")
    assert all(score["value"] == 0 for score in everything["scores"] if score["metric"] == "f1")
    assert all(score["value"] < 0.5 for score in everything["scores"] if score["metric"] == "bleu")


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
