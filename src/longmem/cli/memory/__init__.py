"""``longmem memory``: a store of texts that a model remembers, from the outside."""

from __future__ import annotations

import click

from longmem.cli.memory.adding import add
from longmem.cli.memory.counting import stats
from longmem.cli.memory.forgetting import forget
from longmem.cli.memory.keeping import compact, export, import_, verify
from longmem.cli.memory.looking import list_, show
from longmem.cli.memory.searching import search
from longmem.cli.memory.sizing import size


@click.group()
def command() -> None:
    """Keep texts that a model remembers: add, look up, search, forget, check.

    A store is a folder (--store, or LONGMEM_STORE). It holds namespaces, and these hold documents that no other
    namespace sees. Only adding, searching and some repairs need the model (--model, or LONGMEM_MODEL).

    \b
    longmem memory add notes/ --model models/small/sidenet
    longmem memory search "where is the key" --model models/small/sidenet
    longmem memory forget --name old.txt --report forgotten.json
    longmem memory compact
    longmem memory verify --absent forgotten.json
    """


for _verb in (add, list_, show, search, forget, stats, compact, verify, export, import_, size):
    command.add_command(_verb)
