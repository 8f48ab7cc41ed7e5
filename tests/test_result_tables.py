"""Tables of results on the pages are what their JSON says, and the sentences beside them hold."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
from result_tables import results_report, with_results

ROOT = Path(__file__).parents[1]
CARDS = (f"models/{name}/README.md" for name in ("small", "smollm2-135m-longmem"))
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "docs/experiments.md", *CARDS)}
SAID = " ".join(PAGES["docs/experiments.md"].split())


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "results" / name).read_text(encoding="utf-8"))
    return found


def in_words(exact: dict[str, float]) -> str:
    return f"{exact['65536']} and {exact['1048576']}"


@pytest.mark.parametrize("name", PAGES)
def test_the_tables_of_a_page_are_those_of_their_files(name: str) -> None:
    assert with_results(PAGES[name]) == PAGES[name], "run make docs"
    files = [
        file for marker in re.findall(r"<!-- \w+: (.*?) -->", PAGES[name]) for file in re.findall(r"\S+/\S+", marker)
    ]
    assert files and all((ROOT / file).is_file() for file in files)


def test_the_results_page_is_made_of_the_results_that_are_there() -> None:
    made = results_report()
    assert not made.problems
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == made.text, "run make docs"
    assert all((ROOT / "docs" / picture).is_file() for picture in made.pictures)


def test_commands_of_results_name_no_machine() -> None:
    for path in sorted((ROOT / "results").rglob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        command = result.get("header", result)["command"]
        assert command.startswith(("longmem ", "python -m benchmarks.")) or result["reported"], path
        assert not re.search(r"(^|[\s=])/", command), path


@pytest.mark.parametrize(("text", "projects"), [("books", 17), ("latex", 2), ("python", 5)])
def test_longmem_is_below_its_backbone_the_control_and_itself_without_memory(text: str, projects: int) -> None:
    """Also where intervals draw projects."""
    for protocol in read(f"small-{text}/perplexity.json")["protocols"].values():
        gaps = {g["against"]: g["documents"] for g in protocol["all"]["differences"] if g["system"] == "memory_8192"}
        for against in ("backbone", "memory_off", "control"):
            assert gaps[against]["high"] < 0, (text, protocol["protocol"], against)
            assert gaps[against]["groups"] == projects


def test_the_claim_on_latex_is_beside_what_other_projects_showed() -> None:
    for name in ("README.md", "docs/experiments.md", "models/small/README.md"):
        assert "| LaTeX, 36 documents of 2 projects | -18.0 [-19.2, -16.7] |" in PAGES[name]
    gap = next(
        d
        for d in read("small-latex/perplexity.json")["protocols"]["sliding"]["all"]["differences"]
        if (d["system"], d["against"]) == ("memory_8192", "backbone")
    )
    assert gap["documents"]["low"] < -18.0 < gap["documents"]["high"], "other projects are within the interval"


def test_a_pass_key_is_found_as_often_as_the_page_says() -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    lines = re.findall(r"(?m)^\| passkey, ([\d,]+) tokens \|.*\| ([\d.]+) % \(\d+ of (\d+);", page)
    found = [(int(tokens.replace(",", "")), float(share), int(trials)) for tokens, share, trials in lines]
    assert len(found) == 6, "four lengths of Python source, two of books"
    for tokens, share, trials in found:
        assert trials == 200
        # the page: the goal of 95 % is reached up to 65,536 tokens, that of 90 % at 1M is missed
        assert share >= 95 if tokens <= 65_536 else share < 90
    for name in ("needle", "needle-books"):
        for example in read(f"{name}/needle.json")["examples"]:
            assert example["values"]["memory_1048576"]["choice"] == 100, "the page: the true key is the likeliest"


def _trials() -> list[str]:
    trials = read("needle/trials.json")
    runs = {run["name"]: run for run in trials["runs"]}
    second = next(run for name, run in runs.items() if "(recipes/needle-sidenet.toml, second part)" in name)
    third = next(run for name, run in runs.items() if name.endswith("(recipes/needle-far.toml)"))
    fourth = next(run for name, run in runs.items() if "recipes/needle-far.toml, second part" in name)["exact"]
    fifth = next(run for name, run in runs.items() if "(third part)" in name)["exact"]
    before = second["exact, all trials of the final measurement"]["1048576"]
    reading = second["at 1048576, 40 trials, chunks of 4, 128 tokens retrieved"]
    share = reading["some head found a chunk with the last token of the answer"]
    right = reading["last token right where it was found"]
    key = next(value for name, value in trials["keys"].items() if name.startswith("models/small"))["layer 3"]
    return [
        f"brought 1M from {before} to {third['exact']['1048576']['percent']} %",
        f"brought 65,536 from {third['exact']['65536']['percent']} to {fourth['Python source']['65536']} %",
        f"it found {in_words(fourth['Python source'])} % there at 65,536 tokens and 1M",
        f"and 1M, but {in_words(fourth['books'])} % among books",
        f"it was {in_words(fifth['books'])} % among books, and {in_words(fifth['Python source'])} % among Python",
        f"in {100 * share:.1f} % of 40 trials, and in only {100 * right:.0f} % of those",
        f"for {100 * key['first digit']:.0f} % of pass keys, one of the last digit for {100 * key['last digit']:.0f} %",
    ]


def _settings() -> list[str]:
    axes = {axis["name"]: axis["values"] for axis in read("ablate-python/ablate.json")["axes"]}
    long = {axis["name"]: axis["values"] for axis in read("ablate-latex-long/ablate.json")["axes"]}

    def percent(axis: str, value: str, protocol: str = "sliding") -> float:
        found = next(each for each in axes[axis] if each["value"] == value)["scores"][protocol]["percent"]
        return float(found)

    sizes = {each["value"]: each["scores"]["segments"]["perplexity"] for each in long["memory_size"]}
    more = next(each["scores"]["segments"]["perplexity"] for each in long["num_retrieved"] if each["value"] == "256")
    usual = sizes["8,192"]
    assert abs(percent("memory_size", "2,048")) < 0.1
    assert all(abs(percent("memory_dtype", each)) < 0.05 for each in ("float16", "bfloat16", "int8"))
    return [
        f"gain {-percent('chunk_size', '1'):.1f} % by the sliding window",
        f"instead of 64 gain {-percent('num_retrieved', '256'):.1f} %",
        f"chunks of 16 lose {percent('chunk_size', '16'):.1f} %",
        f"lose {percent('rows', 'shared'):.1f} % ({percent('rows', 'shared', 'segments'):.1f} % by segments)",
        f"all of it to memory, is {percent('gate_share', '1'):.1f} % worse",
        f"stand {100 * (more / usual - 1):.1f} % above 64 from 8,192 ({more:.3f} to {usual:.3f}",
    ]


def _speed() -> list[str]:
    ratios = {(each["system"], each["context"]): each for each in read("efficiency/efficiency.json")["ratios"]}
    full = ratios["full", 16384]
    for field, below, above in (("first_token", 1024, 4096), ("per_token", 4096, 16384)):
        assert ratios["full", below][field]["median"] < 1 < ratios["full", above][field]["median"]
    return [
        f"full attention takes {full['first_token']['median']:.1f} times as long to its first token,",
        f"{full['per_token']['median']:.1f} times as long for each further one and {full['peak']:.1f} times the memory",
        f"new token takes {1 / ratios['windowed', 16384]['per_token']['median']:.1f} times as long",
    ]


def _dialogue() -> list[str]:
    everything = read("dialogue/dialogue.json")["groups"][0]
    wanted = ("memory_8192", "backbone", "answer_nats")
    nats = next(g["value"] for g in everything["differences"] if (g["system"], g["against"], g["metric"]) == wanted)
    assert all(score["value"] == 0 for score in everything["scores"] if score["metric"] == "f1")
    return [f"Memory is worth {-nats:.1f} nats a token"]


@pytest.mark.parametrize("sentence", [*_trials(), *_settings(), *_speed(), *_dialogue()])
def test_a_sentence_tells_what_was_measured(sentence: str) -> None:
    assert sentence in SAID
