"""What each process of a torchrun does in ``test_workers``: rank 0 compares what the others encode with its own."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from tests.store.workers import Others, add, contents, load, open_store

from longmem.errors import StoreError
from longmem.store import NewDocument
from longmem.store.ranks import Ranks, _Rank


def main(backbone: str, folder: Path) -> None:
    with Ranks() as ranks:
        if not ranks.first:
            ranks.serve()
            return
        model = load(backbone)
        with open_store(folder / "alone", model) as alone, open_store(folder / "ranks", model) as store:
            others = Others(lambda number, handover: _Rank(ranks._channels[number], handover), len(ranks._channels))
            try:
                list(store.add_documents("bob", [NewDocument("x", ids=[99])], workers=others))
            except StoreError as error:  # said by the other rank, which then goes on
                print("refused:", error, flush=True)
            assert add(alone, 1) == add(store, others)
            assert contents(alone) == contents(store)
            assert add(store, ranks)[0][1] == "unchanged"
        print("equal", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], Path(sys.argv[2]))
