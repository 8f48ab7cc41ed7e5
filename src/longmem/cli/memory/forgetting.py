"""``longmem memory forget``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import click

from longmem.cli.memory.opening import check_namespace, open_to_write, say
from longmem.cli.memory.options import DURATION, MOMENT, json_option, namespace_option, store_option, where_option
from longmem.cli.memory.printing import counted
from longmem.errors import StoreError


@click.command(
    short_help="Forget documents.",
    epilog="Example: longmem memory forget --namespace ada --where draft=true --older-than 30d --report forgotten.json",
)
@store_option
@namespace_option
@click.option("--name", help="This document.")
@where_option
@click.option("--older-than", type=DURATION, help="Documents at least so old: 30d, 12h.")
@click.option("--before", type=MOMENT, help="Documents from before this date.")
@click.option("--everything", is_flag=True, help="The whole namespace.")
@click.option(
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write what was forgotten, as names and hashes, for `verify --absent`.",
)
@json_option
def forget(
    path: Path,
    namespace: str,
    name: str | None,
    where: dict[str, Any] | None,
    older_than: float | None,
    before: float | None,
    everything: bool,
    report: Path | None,
    as_json: bool,
) -> None:
    """Forget documents of a namespace; all conditions given must hold.

    No search of any process finds them from now on. Their bytes leave the disk with `longmem memory compact`. Other
    namespaces are not touched, also where they hold the same text. `longmem memory list` with --where, --older-than or
    --before shows beforehand what these would forget. With --json the report itself is printed.
    """
    if name is None and not where and older_than is None and before is None and not everything:
        raise StoreError(
            "say what to forget: --name, --where, --older-than, --before, or --everything; nothing was forgotten"
        )
    with open_to_write(path) as store, _written(report) as stream:
        done = store.forget(
            namespace, name=name, where=where, older_than=older_than, before=before, everything=everything
        )
        if not done.documents:
            check_namespace(store, namespace)
        text = done.to_json()
        try:
            if stream is not None:
                stream.write(text + "\n")
        except OSError as error:
            click.echo(text)
            raise StoreError(
                f"{report}: {error.strerror}; it is forgotten all the same, and this was its only report: keep it"
            ) from error
    if as_json:
        click.echo(text)
    else:
        for forgotten, tokens in done.documents:
            click.echo(f"forgotten  {counted(tokens, 'token'):>16}  {forgotten}")
    after = "; `longmem memory compact` removes the bytes" if done.documents else ""
    say(f"{counted(len(done.documents), 'document')} of {namespace!r} forgotten{after}")


@contextmanager
def _written(report: Path | None) -> Iterator[TextIO | None]:
    """A file for the report, opened before anything is forgotten, in place once all of it is written.

    Raises:
        StoreError: it cannot be written; nothing was forgotten.
    """
    if report is None:
        yield None
        return
    partial = report.with_name(f".{report.name}.partial")
    try:
        stream = partial.open("w", encoding="utf-8")
    except OSError as error:
        raise StoreError(
            f"{report}: {error.strerror}, so the report cannot be written; nothing was forgotten"
        ) from error
    try:
        with stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(report)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
