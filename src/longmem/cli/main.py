"""The command ``longmem``: a group whose commands are imported when they are called."""

from __future__ import annotations

import pkgutil
import sys

import click

from longmem import __version__
from longmem.errors import LongMemError

COMMANDS = {
    "train": ("longmem.cli.train:command", "Train a backbone or a SideNet from a recipe file."),
    "calibrate": ("longmem.cli.calibrate:command", "Let a backbone read memory without a SideNet, in minutes."),
    "eval": ("longmem.cli.eval:command", "Measure a model on long text."),
    "report": ("longmem.cli.report:command", "Make a page of results, the paper's numbers beside ours."),
    "layers": ("longmem.cli.layers:command", "Find the layers whose memory is worth most."),
    "generate": ("longmem.cli.generate:command", "Continue a text with memory, for as long as you like."),
    "chat": ("longmem.cli.talk:chat", "Talk with a model that remembers."),
    "serve": ("longmem.cli.talk:serve", "Serve a model and its memories over HTTP."),
    "memory": ("longmem.cli.memory:command", "Keep texts that a model remembers: add, search, forget, check."),
    "convert": ("longmem.cli.convert:command", "Load checkpoints of the released code."),
    "demo": ("longmem.cli.talk:demo", "Let a small model remember texts and what it was told."),
}
"""Where each command is, and what the list of ``longmem --help`` says of it."""


class LazyGroup(click.Group):
    """Lists its commands from the table and imports one only to run it, so that ``--help`` answers at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found: click.Command | None = pkgutil.resolve_name(COMMANDS[cmd_name][0]) if cmd_name in COMMANDS else None
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


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
        status = 130
    except click.ClickException as error:  # unknown option or command, a value of the wrong type
        error.show()
        status = error.exit_code
    except LongMemError as error:
        click.echo(f"error: {error}", err=True)
        status = 1
    except BrokenPipeError:  # `longmem ... | head`
        sys.stderr.close()
        status = 1
    except OSError as error:
        if error.errno is None or error.strerror is None:  # no message of the system: a library's, or a bug
            raise
        place = f"{error.filename}: " if error.filename else ""
        way_out = "check the path, its permissions and the space that is left"
        click.echo(f"error: {place}{error.strerror}; {way_out}", err=True)
        status = 1
    sys.exit(status if isinstance(status, int) else 0)
