"""Many users of one server that is killed and restarted: nothing acknowledged is lost, nothing of others is shown.

Usage: python -m benchmarks.isolation [--clients 50] [--seconds 45] [--out results/isolation.json]

The users of tests/server/test_process.py, over a tiny random pair. Each has a key and a memory of its own, and all
call it by the same name. They add, forget, search, chat, tell, ask for responses and for what is not theirs, while the
server ends three times: killed, asked to end, killed. An answer that shows another's text, or an acknowledged write
that is not there, stops the run with an error.
"""

from __future__ import annotations

import argparse
import json
import signal
import tempfile
from pathlib import Path
from typing import Any

from tests.conftest import make_byte_tokenizer
from tests.server.conftest import make_pair
from tests.server.test_process import Process, many_users

from benchmarks.measure import made_by
from longmem.evaluation.results import write_json


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=45, help="between two ends of the server")
    parser.add_argument("--out", type=Path, default=Path("results/isolation.json"))
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as root:
        process = Process(Path(root), make_pair(Path(root), make_byte_tokenizer()), given.clients)
        try:
            process.begin()
            found = many_users(process, given.clients, given.seconds, (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL))
        finally:
            process.close()
    result = made_by("isolation", arguments) | found
    write_json(given.out, result)
    print(json.dumps(found, indent=1))
    return result


if __name__ == "__main__":
    main()
