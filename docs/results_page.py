"""docs/results.md from results/, by what is behind ``longmem report``; ``make_api.py`` writes it with other pages."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from transformers import GPT2Config, LlamaConfig, PreTrainedConfig

from longmem.evaluation.report.blocks import Block, Heading, Picture, Table, Text
from longmem.evaluation.report.build import Report, build_report
from longmem.training.backbone_shape import backbone_shape
from longmem.training.estimate import estimate
from longmem.training.hardware import GIB, HARDWARE
from longmem.training.recipe import Recipe

INTRO = (
    "Every table and picture here is made by `longmem report` from the JSON files in `results/`. Each holds its "
    "settings, seeds, versions, machine and the command that made it. The paper's numbers stand beside ours where the "
    "setting is the same kind. What was tried on the way, and what did not work, is in [experiments](experiments.md)."
)

LLAMA_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131_072,
)
FULL_SIZE: tuple[tuple[str, PreTrainedConfig | str | None, str], ...] = (
    ("paper-407m", None, "8x-a100-80gb"),
    ("paper-558m", "paper-407m", "16x-v100-32gb"),
    ("paper-558m", "paper-407m", "8x-a100-80gb"),
    ("gpt2-small", GPT2Config(), "rtx-4090"),
    ("gpt2-small", GPT2Config(), "a100-80gb"),
    ("llama-class", LLAMA_8B, "h100-80gb"),
)
"""Recipes that were not run here, the backbone that each names or the recipe that trains it, and a machine for it."""


def results_report(root: Path) -> Report:
    """The page, not written yet."""
    made = build_report([root / "results"], title="Results", intro=[INTRO], base=root)
    return replace(made, blocks=[*made.blocks, *full_size(root / "recipes")])


def full_size(recipes: Path) -> list[Block]:
    """What the large recipes train, and what that would cost."""
    rows = []
    for name, backbone, machine in FULL_SIZE:
        hardware = HARDWARE[machine]
        with tempfile.TemporaryDirectory() as folder:
            instead = []  # no hub is asked
            if isinstance(backbone, str):
                backbone = backbone_shape(Recipe.load(recipes / f"{backbone}.toml"))
            if backbone is not None:
                backbone.save_pretrained(folder)
                instead = [f"backbone.path={folder}"]
            needs = estimate(Recipe.load(recipes / f"{name}.toml", instead), hardware)
        everything = needs.parameters + (needs.trained if backbone is not None else 0)
        rows.append(
            (
                f"`recipes/{name}.toml`",
                f"{needs.trained / 1e6:,.0f}M of {everything / 1e6:,.0f}M",
                f"{needs.work.tokens / 1e9:,.1f}",
                machine,
                f"{needs.total_bytes / GIB:.1f} of {hardware.memory / GIB:.0f} GiB",
                f"{needs.hours:,.1f}",
                f"{needs.hours * hardware.devices:,.0f}",
            )
        )
    heads = ("recipe", "parameters trained", "tokens, billions", "machine", "memory per GPU", "hours", "GPU hours")
    told = (
        "Not run: no such machine was at hand. The recipes of the paper's backbone, of the paper's SideNet, and of "
        "models from a hub stand beside those that were run; what they would cost is counted by "
        "`longmem train RECIPE --estimate MACHINE`, at 40 % of the machine's peak."
    )
    return [Heading(2, "At full size"), Text(told), Table(heads, rows)]


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
