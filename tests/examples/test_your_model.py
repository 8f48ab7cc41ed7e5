"""The page about models of one's own: its example runs, its table is that of the tested families."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from tests.examples.test_training_examples import run

ROOT = Path(__file__).parents[2]


def test_the_example_goes_from_layer_to_generation_on_a_page() -> None:
    said = run("your_model.py")
    assert "layers whose keys can be remembered: [0, 1, 2, 3, 4, 5, 6, 7]" in said
    assert "layer 5 is remembered, read by SideNet layer 2" in said
    match = re.search(r"4,096 tokens take ([\d,]+) bytes by arithmetic, ([\d,]+) in the bank", said)
    assert match is not None
    by_hand, real = (int(number.replace(",", "")) for number in match.groups())
    assert by_hand == 4096 * 2 * 16 * 2 * 4 + 1024 * 2 * 16 * 4
    assert by_hand < real < 1.05 * by_hand
    assert "GiB per device" in said and " on a100-80gb for " in said
    assert "segment 3: loss" in said and "384 tokens remembered" in said
    assert re.search(r"generated: \[\d+(, \d+){7}\]", said)
    assert len((ROOT / "examples" / "your_model.py").read_text().splitlines()) <= 60


def test_the_table_of_families_is_that_of_the_tests() -> None:
    specification = importlib.util.spec_from_file_location("make_families", ROOT / "docs" / "make_families.py")
    assert specification is not None and specification.loader is not None
    maker = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(maker)
    table = maker.table()
    assert table in (ROOT / "docs" / "your-model.md").read_text(encoding="utf-8")
    assert "| bloom | `bloom` | 4, 4 | all | gate | copy, zero |" in table
    assert "| opt-post-norm | `opt` | 4, 4 | all | gate, softmax | copy |" in table
    assert "| gemma2 | `gemma2` | 4, 2 | those with full attention |" in table
