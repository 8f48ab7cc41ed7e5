"""The jobs of a real model: each has a name of its own and options that its command knows; and the final table."""

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


def test_perplexities_are_against_windows_on_the_same_documents_drawn_by_project() -> None:
    def result(**nll: tuple[float, float, float]) -> dict[str, Any]:
        names = ("p__a", "p__b", "q__a")
        documents = [
            {"id": name, "tokens": 10, "nll": {"sliding": {system: each[n] for system, each in nll.items()}}}
            for n, name in enumerate(names)
        ]
        return {"documents": documents}

    base = (10.0, 10.0, 10.0)
    lines = perplexities(
        {
            "sliding-books-window1024": result(backbone=base),
            "sliding-books-window8192": result(backbone=(5.0, 5.0, 5.0)),
            "sliding-books-gates": result(backbone=base, memory_8=(0.0, 0.0, 10.0)),
        }
    )
    assert lines[2:] == [
        "| books, short, sliding | gates: memory_8 | 3 | 1.396 | -48.7 [-63.2, +0.0] | -15.4 [-39.3, +64.9] |",
        "| books, short, sliding | window1024 | 3 | 2.718 |  | +64.9 [+64.9, +64.9] |",
        "| books, short, sliding | window8192 | 3 | 1.649 | -39.3 [-39.3, -39.3] |  |",
    ]
