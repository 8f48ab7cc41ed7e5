"""``longmem report``: result files as a page."""

from __future__ import annotations

from pathlib import Path

import click

from longmem.cli.common import folder_option, options, print_json


@click.command(name="report", epilog="Example: longmem report results --out runs/report")
@click.argument("results", nargs=-1, required=True, metavar="RESULTS...")
@folder_option("--out", required=True, help="Folder for report.md, report.html, pictures/.")
@click.option("--title", default="Results", help="Of the page.")
@options("json")
def command(results: tuple[str, ...], out: Path, title: str, as_json: bool) -> None:
    """Make a Markdown page and one self-contained HTML page of RESULTS, files or folders of them.

    Takes what `longmem eval`, `longmem layers` and the benches write. The paper's own numbers stand beside ours where
    the setting is the same kind. A file that is no result, or a damaged one, is named in one line and left out.
    """
    from longmem.evaluation.report import build_report

    report = build_report(results, title=title)
    written = report.write(out)
    for problem in report.problems:
        click.echo(f"not shown: {problem}", err=True)
    if as_json:
        print_json({"written": written, "shown": report.shown, "not_shown": report.problems})
    else:
        click.echo(out / "report.md")
        click.echo(out / "report.html")
