"""``longmem memory compact``, ``verify``, ``export`` and ``import``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longmem.cli.memory.opening import (
    check_namespace,
    layout_of,
    load_model,
    load_tokenizer,
    open_to_read,
    open_to_write,
    read_text,
    say,
    tokenizer_at_hand,
)
from longmem.cli.memory.options import json_option, model_options, namespace_option, store_option, tokenizer_option
from longmem.cli.memory.printing import ShownProgress, as_plain, counted, print_json
from longmem.errors import LongMemError

if TYPE_CHECKING:
    from longmem.store.records import ForgetReport, Layout, VerifyReport


@click.command(
    short_help="Remove from the disk what was forgotten.", epilog="Example: longmem memory compact --store memory"
)
@store_option
@json_option
def compact(path: Path, as_json: bool) -> None:
    """Remove from the disk what was forgotten or has expired, in all namespaces, and join small files.

    Interrupted, it has done a part of the work; call it again.
    """
    with open_to_write(path) as store, ShownProgress() as progress:
        done = store.compact(progress=progress)
    if as_json:
        print_json(done)
        return
    freed = done.bytes_before - done.bytes_after
    click.echo(
        f"{counted(done.tokens, 'token')} removed, {counted(done.documents, 'document')} had expired; "
        f"{done.files_before:,} -> {counted(done.files_after, 'file')}, {freed:,} bytes freed"
    )
    if not done.emptied:
        say("a reader still holds bytes of what was forgotten; compact again when it has closed")


@click.command(short_help="Check every byte; repair.", epilog="Example: longmem memory verify --absent forgotten.json")
@store_option
@click.option(
    "--repair", is_flag=True, help="Mend what can be mended; lost files are encoded again from the token ids."
)
@click.option(
    "--absent",
    type=click.Path(path_type=Path),
    help="A report of `forget --report`: check that no byte of it is left that nobody else holds.",
)
@click.option(
    "--absent-text",
    type=click.Path(path_type=Path),
    help="A text: check that it is nowhere in the store, whoever added it.",
)
@model_options
@tokenizer_option
@json_option
def verify(
    path: Path,
    repair: bool,
    absent: Path | None,
    absent_text: Path | None,
    model: str | None,
    tokenizer: str | None,
    device: str,
    as_json: bool,
) -> int:
    """Read every byte of the store and compare it with what was written.

    Prints each problem; the exit status is 1 if one is left. Without --repair nothing is changed. Only a repair that
    has to encode needs the model.
    """
    from longmem.store.records import ForgetReport
    from longmem.store.store import MemoryStore

    gone = None if absent is None else ForgetReport.from_json(read_text(absent))
    words = None if absent_text is None else read_text(absent_text)
    reader = load_tokenizer(tokenizer, tokenizer_at_hand(_layout(path)) if words is not None else None)
    with ShownProgress() as progress:
        with MemoryStore.open(path, tokenizer=reader, mode="read", create=False, check=False) as store:
            report = store.verify(absent=gone, absent_text=words, progress=progress)
        if repair and not report.clean:
            loaded = None
            if any(problem.kind in _ENCODED for problem in report.problems):
                loaded = _model_or_none(path, model, device)
            with MemoryStore.open(path, model=loaded, tokenizer=reader, create=False, check=False) as store:
                report = store.verify(repair=True, absent=gone, absent_text=words, progress=progress)
    if as_json:
        print_json({**as_plain(report), "clean": report.clean})
    else:
        _print_verified(report, gone, words)
    return 0 if report.clean else 1


_ENCODED = ("missing file", "size", "block", "row")
"""Problems whose repair may run the backbone."""


def _layout(path: Path) -> Layout | None:
    """What the store was made for, damaged or not; None where that cannot be read."""
    from longmem.store.store import MemoryStore

    with MemoryStore.open(path, mode="read", create=False, check=False) as store:
        try:
            return store.layout
        except LongMemError:
            return None


def _model_or_none(path: Path, name: str | None, device: str) -> Any:
    """The model; what can be repaired without it shall not fail for a model that nobody named."""
    try:
        return load_model(name, _layout(path), device).model
    except LongMemError as error:
        if name is not None:
            raise
        say(f"repairing without a model: {error}")
        return None


def _print_verified(report: VerifyReport, gone: ForgetReport | None, words: str | None) -> None:
    for problem in report.problems:
        mark = "repaired" if problem.repaired else problem.kind
        click.echo(f"{mark}: {problem.where}: {problem.what}")
    left = sum(not problem.repaired for problem in report.problems)
    found = (
        "all is as it was written"
        if not report.problems
        else f"{left} of {counted(len(report.problems), 'problem')} left"
    )
    click.echo(
        f"{counted(report.files, 'file')}, {report.bytes:,} bytes, {counted(report.documents, 'document')}: {found}"
    )
    if (gone is not None or words is not None) and not any(problem.kind == "present" for problem in report.problems):
        kept = f"; {counted(report.kept, 'piece')} of it other documents still hold" if report.kept else ""
        click.echo(f"what was to be absent is absent{kept}")
    if report.rebuilt_tokens:
        same = "with the same bits as before" if report.same_bits else "with other last bits (another machine or torch)"
        click.echo(f"{counted(report.rebuilt_tokens, 'token')} encoded again, {same}")


@click.command(
    short_help="Write documents to an archive.", epilog="Example: longmem memory export ada.tar --namespace ada"
)
@click.argument("archive", type=click.Path(path_type=Path))
@store_option
@namespace_option
@click.option("--name", "names", multiple=True, help="Only this document; repeatable.")
@json_option
def export(archive: Path, path: Path, namespace: str, names: tuple[str, ...], as_json: bool) -> None:
    """Write documents of a namespace, encoded as they are, to one archive that another store can import."""
    with open_to_read(path) as store, ShownProgress() as progress:
        check_namespace(store, namespace)
        documents = store.export(namespace, archive, list(names) or None, progress=progress)
    if as_json:
        print_json({"archive": archive, "documents": documents})
        return
    tokens = sum(info.tokens for info in documents)
    click.echo(f"{archive}: {counted(len(documents), 'document')}, {counted(tokens, 'token')}")


@click.command(
    "import",
    short_help="Add the documents of an archive.",
    epilog="Example: longmem memory import ada.tar --namespace ada",
)
@click.argument("archive", type=click.Path(path_type=Path))
@store_option
@click.option("--namespace", "-n", help="To put the documents in; default: the one they were exported from.")
@model_options
@json_option
def import_(
    archive: Path,
    path: Path,
    namespace: str | None,
    model: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Add the documents of an archive, with their keys and values as they are: all of them, or none.

    The store must be of the same backbone, layer and sizes. Where there is none yet, one is made that fits, for which
    the model is needed. The tensors are believed: import only what comes from a store that you trust.
    """
    if layout_of(path, writing=True) is None:
        _make_fitting(path, archive, model, device)
    with open_to_write(path) as store, ShownProgress() as progress:
        receipts = store.import_(archive, namespace, progress=progress)
    if as_json:
        print_json({"documents": receipts})
        return
    for receipt in receipts:
        click.echo(f"{receipt.status:<9}  {counted(receipt.tokens, 'token'):>16}  {receipt.name}")


def _make_fitting(path: Path, archive: Path, model: str | None, device: str) -> None:
    """A new store that can take the archive."""
    from longmem.store.archive import Archive
    from longmem.store.durable import file_errors
    from longmem.store.store import MemoryStore

    with file_errors(archive, "reading"), archive.open("rb") as stream:
        layout = Archive(stream, archive).manifest.layout
    fitting = load_model(model, layout, device).model
    MemoryStore.open(
        path,
        model=fitting,
        dtype=layout.dtype,
        chunk_size=layout.chunk_size,
        segment_tokens=layout.segment_tokens,
    ).close()
