"""The shipped pair gives the numbers that it gave before the evaluation was rewritten."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from longmem.data.text import Document
from longmem.evaluation.documents import tokenize_documents
from longmem.evaluation.perplexity import PerplexitySettings, perplexity
from longmem.evaluation.results import Bootstrap
from longmem.evaluation.systems import load_systems

MODELS = Path(__file__).parents[2] / "models"
GOLDEN = json.loads((Path(__file__).parent / "perplexity_golden.json").read_text())


def test_every_number_is_as_before(made_text: Callable[..., str]) -> None:
    systems = load_systems(
        str(MODELS / "small" / "sidenet"),
        control=str(MODELS / "small" / "control"),
        memtrm=str(MODELS / "small-memtrm"),
        training_free=["0.4"],
        memory_sizes=[64, 256],
        window=128,
        rows=2,
    )
    made = zip(("one__a.txt", "one__b.txt", "two__a.txt"), ((250, 1), (120, 2), (180, 3)), strict=True)
    texts = [Document(name, made_text(*size), "") for name, size in made]
    documents = tokenize_documents(texts, systems[0].tokenizer, group_separator="__")
    settings = PerplexitySettings(bootstrap=Bootstrap(resamples=20))
    found = perplexity(systems, documents, settings)
    for document, expected in zip(found["documents"], GOLDEN["documents"], strict=True):
        for name in ("id", "tokens", "words", "bytes", "digest"):
            assert document[name] == expected[name]
        for protocol, nll in expected["nll"].items():
            assert document["nll"][protocol] == pytest.approx(nll, rel=1e-6)
    for protocol, numbers in GOLDEN["protocols"].items():
        scores = found["protocols"][protocol]["all"]
        for name in ("perplexity", "bits_per_byte"):
            assert {s["system"]: s[name] for s in scores["systems"]} == pytest.approx(numbers[name], rel=1e-6)
        for (system, against, percent), d in zip(numbers["percent"], scores["differences"], strict=True):
            assert (d["system"], d["against"]) == (system, against)
            assert d["percent"] == pytest.approx(percent, rel=1e-6, abs=1e-6)
        for (low, tokens, value), part in zip(numbers["by_position"], scores["by_position"], strict=True):
            assert (part["low"], part["tokens"]) == (low, tokens)
            assert part["perplexity"]["memory_256"] == pytest.approx(value, rel=1e-6)
