"""``longmem train``: a run from a recipe file."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import click

from longmem.cli.common import FOLDER, options, print_json


@click.command(name="train")
@click.argument("recipe", type=FOLDER)
@click.option("--set", "overrides", multiple=True, metavar="SECTION.NAME=VALUE", help="Change one setting; repeatable.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint of the run, if there is one.")
@click.option("--overwrite", is_flag=True, help="Remove an earlier run of the same name first.")
@click.option("--check", is_flag=True, help="Read the recipe, report every problem, train nothing.")
@click.option("--estimate", metavar="HARDWARE", help="Print memory, hours and cost on a machine, e.g. h100-80gb.")
@click.option("--quiet", is_flag=True, help="No lines on stderr.")
@options("json")
def command(recipe: Path, overrides: tuple[str, ...], check: bool, estimate: str | None, **given: Any) -> None:
    """Train what RECIPE describes: a TOML file, or the name of one that comes with the package.

    \b
    longmem train tiny-cpu
    longmem train gpt2-small --set run.seed=2 --set optim.rows=4
    longmem train gpt2-small --resume
    longmem train gpt2-small --estimate a100-80gb
    """
    from longmem.training.recipe import Recipe

    settings = Recipe.load(recipe, overrides)
    if check:
        click.echo(
            settings.model_dump_json(indent=2) if given["as_json"] else f"{recipe}: {settings.task}, no problems found"
        )
        return
    if estimate is not None:
        from longmem.training.estimate import estimate as estimated

        click.echo("\n".join(estimated(settings, estimate).lines()))
        return
    from transformers.utils.logging import disable_progress_bar

    from longmem.training.run import train

    disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    quiet = given["quiet"]
    if not quiet:
        logging.getLogger("longmem").setLevel(logging.INFO)
    result = train(settings, resume=given["resume"], overwrite=given["overwrite"], quiet=quiet)
    if not result.main:
        return
    if given["as_json"]:
        names = ("out_dir", "model_dir", "step", "tokens", "seconds", "evaluation")
        fields = {name: getattr(result, name) for name in names}
        print_json({**fields, "seconds": round(result.seconds, 1)})
    else:
        click.echo(result.model_dir or result.out_dir)
