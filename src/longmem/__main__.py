"""The command ``longmem``, also ``python -m longmem``. Its commands import torch and the like when they run, so that
``--help`` answers at once."""

from __future__ import annotations

import os
import sys

import click

from longmem import __version__
from longmem.cli import eval, memory, talk, train
from longmem.errors import LongMemError

COMMANDS = {
    "train": (train.train, "Train a backbone or a SideNet from a recipe file."),
    "calibrate": (train.calibrate, "Let a backbone read memory without a SideNet, in minutes."),
    "eval": (eval.command, "Measure a model on long text."),
    "report": (eval.report, "Make a page of results, the paper's numbers beside ours."),
    "layers": (eval.layers, "Find the layers whose memory is worth most."),
    "generate": (talk.generate, "Continue a text with memory, for as long as you like."),
    "chat": (talk.chat, "Talk with a model that remembers."),
    "serve": (talk.serve, "Serve a model and its memories over HTTP."),
    "memory": (memory.command, "Keep texts that a model remembers: add, search, forget, check."),
    "convert": (train.convert, "Load checkpoints of the released code."),
    "demo": (talk.demo, "Let a small model remember texts and what it was told."),
}
"""Each command, and what the list of ``longmem --help`` says of it."""


class InOrder(click.Group):
    """Lists its commands as they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="longmem")
def cli() -> None:
    """Give any frozen causal language model a long-term memory.

    \b
    longmem demo                                    a small model remembers a text and what it was told
    longmem train tiny-cpu                          train from a recipe
    longmem eval perplexity --model runs/x --data book.txt
    """


for name, (command, summary) in COMMANDS.items():
    command.short_help = summary
    cli.add_command(command, name)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; expected errors, the system's among them, become one line on stderr and exit status 1."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of transformers too; we have progress of our own
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


if __name__ == "__main__":
    main()
