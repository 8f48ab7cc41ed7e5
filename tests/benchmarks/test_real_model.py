"""The jobs of a real model: each has a name of its own and options that its command knows; and the final table."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
from benchmarks.real_model import SIZES, jobs, perplexities

from longmem.cli.eval import command


@pytest.mark.parametrize("size", SIZES)
def test_every_job_is_a_command_line(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.real_model.model_kind", lambda folder: folder)
    given = argparse.Namespace(
        size=size, data="data", model=["gates=training_free", "adapted=longmem"], backbone="base", control="control",
        device="cpu", dtype="auto", only="*",
    )  # fmt: skip
    found = jobs(given)
    assert len({job.name for job in found}) == len(found)
    for job in found:
        name, *arguments = job.arguments
        if name != "bm25":
            command.commands[name].make_context(name, arguments)
    assert any("--control" in job.arguments for job in found if job.name.endswith("adapted"))
    assert not any("--control" in job.arguments for job in found if job.name.endswith("gates"))


def test_perplexities_are_against_the_window_of_1024_on_the_same_documents() -> None:
    def result(**nll: float) -> dict[str, Any]:
        return {"documents": [{"id": "a", "tokens": 10, "nll": {"sliding": nll}}]}

    lines = perplexities(
        {
            "sliding-books-window1024": result(backbone=10.0),
            "sliding-books-gates": result(backbone=10.0, memory_8=0.0),
        }
    )
    assert lines[2:] == [
        "| books, 32k, sliding | gates: memory_8 | 1 | 1.000 | -63.2 [-63.2, -63.2] |",
        "| books, 32k, sliding | window1024 | 1 | 2.718 |  |",
    ]
