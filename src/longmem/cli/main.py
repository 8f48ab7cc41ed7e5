"""The command ``longmem``: a group whose commands are imported when they are called."""

from __future__ import annotations

import importlib
import sys
from typing import NamedTuple

import click

from longmem import __version__
from longmem.errors import LongMemError


class Entry(NamedTuple):
    """A command that is not imported yet."""

    module: str
    summary: str


COMMANDS = {
    "train": Entry("longmem.cli.train", "Train a backbone or a SideNet from a recipe file."),
    "calibrate": Entry("longmem.cli.calibrate", "Let a backbone read memory without a SideNet, in minutes."),
    "eval": Entry("longmem.cli.eval", "Measure a model on long text."),
    "report": Entry("longmem.cli.report", "Make a page of results, the paper's numbers beside ours."),
    "layers": Entry("longmem.cli.layers", "Find the backbone layer whose keys are worth remembering."),
    "generate": Entry("longmem.cli.generate", "Continue a text with memory, for as long as you like."),
    "chat": Entry("longmem.cli.chat", "Talk with a model that remembers."),
    "serve": Entry("longmem.cli.serve", "Serve a model and its memories over HTTP."),
    "memory": Entry("longmem.cli.memory", "Keep texts that a model remembers: add, search, forget, check."),
    "convert": Entry("longmem.cli.convert", "Load checkpoints of the released code."),
    "demo": Entry("longmem.cli.demo", "Let a small model remember texts and what it was told."),
}


class LazyGroup(click.Group):
    """Lists its commands from a table and imports one only to run it, so that ``--help`` answers at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command = importlib.import_module(entry.module).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="longmem")
def cli() -> None:
    """Give any frozen causal language model a long-term memory.

    \b
    longmem demo                                    a small model remembers a text and what it was told
    longmem train tiny-cpu                          train from a recipe
    longmem eval perplexity --model runs/x --data book.txt
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; expected errors, the system's among them, become one line on stderr and exit status 1."""
    try:
        status = cli.main(args=arguments, prog_name="longmem", standalone_mode=False)
    except click.exceptions.Abort:  # Ctrl-C
        click.echo("interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:  # unknown option or command, a value of the wrong type
        error.show()
        sys.exit(error.exit_code)
    except LongMemError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except BrokenPipeError:  # `longmem ... | head`
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        if error.errno is None or error.strerror is None:  # no message of the system: a library's, or a bug
            raise
        place = f"{error.filename}: " if error.filename else ""
        click.echo(
            f"error: {place}{error.strerror}; check the path, its permissions and the space that is left", err=True
        )
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else 0)
