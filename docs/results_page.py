"""docs/results.md from results/, by what is behind ``longmem report``; ``make_api.py`` writes it with other pages."""

from __future__ import annotations

from pathlib import Path

from longmem.evaluation.report.blocks import Picture
from longmem.evaluation.report.build import Report, build_report

INTRO = (
    "Every table and picture here is made by `longmem report` from the JSON files in `results/`. Each holds its "
    "settings, seeds, versions, machine and the command that made it. The paper's numbers stand beside ours where the "
    "setting is the same kind. What was tried on the way, and what did not work, is in [experiments](experiments.md)."
)


def results_report(root: Path) -> Report:
    """The page, not written yet."""
    return build_report([root / "results"], title="Results", intro=[INTRO], base=root)


def lacks_pictures(report: Report, folder: Path) -> bool:
    """Whether a picture of the page is not there."""
    names = [block.name for block in report.blocks if isinstance(block, Picture)]
    return not all((folder / f"{name}{end}.png").exists() for name in names for end in ("", "-dark"))


def write_pictures(report: Report, folder: Path) -> None:
    """All of them, and no others."""
    kept = set(report.save_pictures(folder))
    for path in folder.glob("*.png"):
        if path not in kept:
            path.unlink()
