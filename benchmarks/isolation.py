"""Many users of one server that is killed and restarted: nothing acknowledged is lost, nothing of others is shown.

Usage: python -m benchmarks.isolation [--clients 50] [--seconds 45] [--out results/isolation.json]

Over a tiny random pair. Each user has a key and a memory of its own, and all call it by the same name. They add,
forget, search, chat, tell, ask for responses and for what is not theirs, while the server ends three times: killed,
asked to end, killed. An answer that shows another's text, or an acknowledged write that is not there, stops the run
with an error. tests/server/test_process.py is a short run of it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from benchmarks.measure import made_by
from longmem.evaluation.results import write_json
from longmem.server.requests import new_key

SECRET = re.compile(r"zq\d{3}q")


class Process:
    """``longmem serve`` over a store; ``begin`` and ``stop`` as often as one likes."""

    def __init__(self, folder: Path, model: Path, owners: int) -> None:
        self.folder, self.model = folder, model
        self.keys = [new_key(folder / "keys", f"c{number}") for number in range(owners)]
        self.url = f"http://127.0.0.1:{free_port()}"
        self.http = httpx.Client(base_url=self.url, timeout=90)  # one: each makes its own certificates' context
        self.process: Any = None

    def begin(self) -> None:
        port = self.url.rpartition(":")[2]
        command = [sys.executable, "-m", "longmem", "serve", "--model", self.model, "--store", self.folder / "store",
                   "--port", port, "--keys", self.folder / "keys", "--device", "cpu"]  # fmt: skip
        with (self.folder / "log").open("a") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen([*map(str, command)], stderr=log, stdout=log, env=environment)
        assert until_it_answers(self.process, self.url), (self.folder / "log").read_text()

    def stop(self, how: int) -> int:
        self.process.send_signal(how)
        return int(self.process.wait(timeout=150))

    def call(self, key: int, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.keys[key]}", **headers}
        return self.http.request(method, path, json=body, headers=headers)

    def close(self) -> None:
        self.http.close()
        if self.process is not None and self.process.poll() is None:
            self.stop(signal.SIGKILL)


def until_it_answers(process: Any, url: str) -> bool:
    """Whether a server comes to answer before its process ends."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            return httpx.get(f"{url}/health").status_code == 200
        except httpx.TransportError:
            time.sleep(0.2)
    return False


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Client:
    """A user with a memory, which every user calls ``notes``, and a ledger of what was acknowledged."""

    place = "/v1/memories/notes"

    def __init__(self, server: Process, number: int, count: int) -> None:
        self.server, self.number, self.count = server, number, count
        self.draw = random.Random(number)
        self.secret = f"zq{number:03}q"
        self.there: dict[str, str] = {}
        self.gone: set[str] = set()
        self.said: list[str] = []
        self.responses: dict[str, str] = {}
        self.done: Counter[str] = Counter()

    def ask(self, method: str, path: str, body: Any = None) -> httpx.Response | None:
        """The answer, in which nobody else's secret may be; None where the server was not there, or was busy."""
        try:
            answer = self.server.call(self.number, method, path, body)
        except httpx.TransportError:
            self.done["no answer"] += 1
            time.sleep(1)
            return None
        assert set(SECRET.findall(answer.text)) <= {self.secret}, (self.number, path, answer.text)
        assert answer.status_code in (200, 201, 429, 503), (self.number, method, path, answer.text)
        return answer if answer.status_code < 400 else None

    def make(self) -> None:
        while self.listed() != ["notes"]:
            with suppress(httpx.TransportError):
                self.server.call(self.number, "POST", "/v1/memories", {"id": "notes"})

    def listed(self) -> list[str]:
        answer = self.ask("GET", "/v1/memories")
        return [] if answer is None else [each["id"] for each in answer.json()["data"]]

    def turn(self) -> None:
        kind = self.draw.choice(["add", "add", "forget", "search", "chat", "tell", "respond", "pry", "check"])
        if kind != "forget" or self.there:
            getattr(self, kind)()
            self.done[kind] += 1

    def add(self) -> None:
        name = f"d{self.count}-{self.done['add']}"
        text = f"{self.secret} number {self.done['add']} is kept. " * self.draw.randrange(1, 4)
        if self.ask("POST", f"{self.place}/documents", {"name": name, "text": text}) is not None:
            self.there[name] = text

    def forget(self) -> None:
        name = self.draw.choice(sorted(self.there))
        del self.there[name]
        if self.ask("DELETE", f"{self.place}/documents/{name}") is not None:
            self.gone.add(name)

    def search(self) -> None:
        answer = self.ask("POST", f"{self.place}/search", {"query": "zq number kept " + self.secret, "top": 50})
        if answer is not None:
            found = {each["document"] for each in answer.json()["data"]}
            assert not found & self.gone
            assert found or not self.there

    def say(self, text: str, **settings: Any) -> httpx.Response | None:
        body = {"messages": [{"role": "user", "content": text}], "memory_id": "notes", **settings}
        return self.ask("POST", "/v1/chat/completions", body)

    def chat(self) -> None:
        answer = self.say("which number is kept?", max_tokens=6, explain=True)
        if answer is not None:
            read = answer.json()["memory"]
            names = {each["document"] for each in read["passages"]}
            names |= {chunk["document"] for token in read["tokens"][0] for chunk in token["chunks"]}
            assert not names & self.gone

    def tell(self) -> None:
        text = f"{self.secret} says {self.done['tell']}."
        if self.say(text, max_tokens=2, remember=True) is not None:
            self.said.append(text)

    def respond(self) -> None:
        answer = self.ask("POST", "/v1/responses", {"input": f"{self.secret} asks", "max_output_tokens": 2})
        if answer is not None:
            self.responses[answer.json()["id"]] = answer.json()["output"][0]["content"][0]["text"]

    def pry(self) -> None:
        """What names another user's things is refused, and the refusal tells nothing of them."""
        other = f"c{self.draw.choice([n for n in range(self.count) if n != self.number])}"
        said = {"messages": [{"role": "user", "content": "?"}], "max_tokens": 2}
        call = self.draw.choice([
            ("GET", f"/v1/memories/{other}%2Fnotes", None, {}),
            ("GET", f"/v1/memories/..%2F{other}%2Fnotes/export", None, {}),
            ("GET", f"{self.place}/documents/..%2F..%2F{other}%2Fnotes%2Fd1", None, {}),
            ("DELETE", f"/v1/memories/{other}%2Fnotes", None, {}),
            ("POST", f"/v1/memories/{other}%2Fnotes/search", {"query": "zq number kept"}, {}),
            ("POST", "/v1/chat/completions", {**said, "memory_id": f"{other}/notes"}, {}),
            ("POST", "/v1/chat/completions", said, {"X-Memory-Id": f"../{other}/notes"}),
        ])  # fmt: skip
        with suppress(httpx.TransportError):
            answer = self.server.call(self.number, *call[:3], **call[3])
            assert answer.status_code in (400, 404, 429, 503) and not SECRET.search(answer.text), (call, answer.text)

    def check(self) -> int:
        """What was acknowledged is there with its text, what was forgotten is not; how many things were compared."""
        if self.responses:
            name, text = self.draw.choice(sorted(self.responses.items()))
            shown = self.ask("GET", f"/v1/responses/{name}")
            assert shown is None or shown.json()["output"][0]["content"][0]["text"] == text
        answer = self.ask("GET", f"{self.place}/export")
        if answer is None:
            return 0
        found = {each["id"]: each["text"] for each in map(json.loads, answer.text.splitlines())}
        assert {**found, **self.there} == found, (self.number, set(self.there) - set(found))
        assert not set(found) & self.gone
        everything = "".join(found.values())
        assert not [text for text in self.said if text not in everything]
        return len(self.there) + len(self.gone) + len(self.said)


def many_users(process: Process, clients: int, seconds: float, ends: Sequence[int]) -> dict[str, Any]:
    """Users do what they do for some seconds, before, between and after ends of the server; counts of what was done."""
    users, over = [Client(process, number, clients) for number in range(clients)], threading.Event()
    began = time.monotonic()

    def live(user: Client) -> None:
        user.make()
        while not over.is_set():
            user.turn()

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(live, user) for user in users]
        try:
            for how in ends:
                time.sleep(seconds)
                process.stop(how)
                process.begin()
            time.sleep(seconds)
        finally:
            over.set()
        for each in running:
            each.result()
    took = time.monotonic() - began
    assert all(user.listed() == ["notes"] for user in users)
    ledgers = {"documents": "there", "forgotten": "gone", "conversations": "said", "responses": "responses"}
    return {
        "clients": clients,
        "seconds": round(took, 1),
        "ends_of_the_server": [signal.Signals(how).name for how in ends],
        "done": dict(sum((user.done for user in users), Counter())),
        "acknowledged": {name: sum(len(getattr(user, kept)) for user in users) for name, kept in ledgers.items()},
        "compared_at_the_end": sum(user.check() for user in users),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    from tests.conftest import make_byte_tokenizer, make_pair

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
