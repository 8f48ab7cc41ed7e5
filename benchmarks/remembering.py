"""Facts told to a running server and asked for after a restart: how often an answer names the value.

Usage: python -m benchmarks.remembering --model FILE.gguf --server READER [--facts 100] [--seed 0] [--out JSON]

Kinds and values of facts are those held out from calibration. Every fact is told to ``longmem serve`` in a request that
is remembered, ten to a user; the server is stopped and started again, and the facts are asked for

    memory     with the memory of the user who told them
    forgotten  the same, after the exchange that told this fact was forgotten

``longmem eval facts`` has what the backbone says alone, with its window, and with passages found by text search.
"""

from __future__ import annotations

import argparse
import random
import signal
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.isolation import Process
from benchmarks.measure import made_by
from longmem import LongMem, TrainingFree
from longmem.data.facts import told_session
from longmem.evaluation.results import write_json
from longmem.modeling.checkpoints import checkpoint_folder, model_type
from longmem.progress import Progress

Outcome = tuple[dict[str, int], list[dict[str, str]]]
"""How often each way named the value, and every question with its answers."""


def through_server(given: Any) -> Outcome:
    """Ask a server, as its users would; ten of them at once."""
    draw, users = random.Random(given.seed), list[Any]()
    while (left := given.facts - sum(len(user.facts) for user in users)) > 0:
        users.append(told_session(draw, min(10, left), held_out=True))
    with tempfile.TemporaryDirectory() as root, Progress("asking", 3 * given.facts, "requests") as progress:
        kind: Any = LongMem if model_type(given.server) == "longmem" else TrainingFree
        reader = kind.from_pretrained(given.server, backbone=checkpoint_folder(given.model))
        reader.config.backbone_name_or_path = str(Path(checkpoint_folder(given.model)).absolute())
        reader.save_pretrained(Path(root) / "reader")
        server = Process(Path(root), Path(root) / "reader", 1)
        server.http.timeout = 3600
        server.begin()

        def said(messages: Sequence[dict[str, str]], **settings: Any) -> str:
            body = {"messages": messages, "temperature": 0, "max_tokens": 24, **settings}
            answer = server.call(0, "POST", "/v1/chat/completions", body).raise_for_status().json()
            progress.advance()
            return str(answer["choices"][0]["message"]["content"])

        def tell(number: int) -> None:
            server.call(0, "POST", "/v1/memories", {"id": f"user-{number}"}).raise_for_status()
            told: list[dict[str, str]] = []
            for message in users[number].messages[::2]:
                told.append(dict(message))
                reply = said(told[-3:], memory_id=f"user-{number}", remember=True, recall=0, max_tokens=12)
                told.append({"role": "assistant", "content": reply})

        def ask(number: int) -> list[dict[str, str]]:
            place, found = f"/v1/memories/user-{number}", list[dict[str, str]]()
            documents = [each["name"] for each in server.call(0, "GET", place).json()["data"]]
            for fact, document in zip(users[number].facts, documents, strict=True):
                question = [{"role": "user", "content": fact.asked}]
                found.append({"question": fact.asked, "value": fact.value})
                found[-1]["memory"] = said(question, memory_id=f"user-{number}")
                text = server.call(0, "GET", f"{place}/documents/{document}").json()["text"]
                assert fact.said in text, (fact.said, text)
                server.call(0, "DELETE", f"{place}/documents/{document}").raise_for_status()
                found[-1]["forgotten"] = said(question, memory_id=f"user-{number}")
            return found

        try:
            with ThreadPoolExecutor(10) as pool:
                list(pool.map(tell, range(len(users))))
                server.stop(signal.SIGTERM)
                server.begin()
                asked = [fact for each in pool.map(ask, range(len(users))) for fact in each]
        finally:
            server.close()
    ways = ("memory", "forgotten")
    return {way: sum(each["value"].lower() in each[way].lower() for each in asked) for way in ways}, asked


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server", metavar="READER", required=True, help="folder of the reader that is served")
    parser.add_argument("--out", type=Path, default=Path("results/smollm2/remembering-server.json"))
    given = parser.parse_args(arguments)
    right, asked = through_server(given)
    result = made_by("remembering", arguments) | {"facts": len(asked), "right": right, "asked": asked}
    write_json(given.out, result)
    print(f"of {len(asked)} facts: " + ", ".join(f"{way} {count}" for way, count in right.items()))
    return result


if __name__ == "__main__":
    main()
