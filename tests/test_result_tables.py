"""What README.md and the pages claim of results holds; test_docs.py compares their tables with the JSON files."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "results" / name).read_text(encoding="utf-8"))
    return found


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
