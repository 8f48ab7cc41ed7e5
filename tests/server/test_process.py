"""Server processes that are stopped and killed: what was acknowledged stays, what is of others never shows."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")
from longmem.server.keys import new_key


class Process:
    """``longmem serve`` over a store; ``begin`` and ``stop`` as often as one likes."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.keys = [new_key(folder / "keys", name) for name in ("ann", "bob")]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.http = httpx.Client(base_url=self.url, timeout=90)  # one: each makes its own certificates' context
        self.process: Any = None

    def begin(self) -> None:
        port = self.url.rpartition(":")[2]
        command = [sys.executable, "-m", "longmem", "serve", "--model", self.model, "--store", self.folder / "store",
                   "--port", port, "--keys", self.folder / "keys", "--device", "cpu"]  # fmt: skip
        with (self.folder / "log").open("a") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen([*map(str, command)], stderr=log, stdout=log, env=environment)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                assert self.http.get("/health").status_code == 200
                return
            except httpx.TransportError:
                time.sleep(0.2)
        raise AssertionError((self.folder / "log").read_text())

    def stop(self, how: int) -> int:
        self.process.send_signal(how)
        return int(self.process.wait(timeout=90))

    def call(self, key: int, method: str, path: str, body: Any = None) -> httpx.Response:
        return self.http.request(method, path, json=body, headers={"Authorization": f"Bearer {self.keys[key]}"})


@pytest.fixture(scope="module")
def checkpoint(tiny: Any, byte_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home: Path = tmp_path_factory.mktemp("pair")
    tiny.backbone.model.save_pretrained(home / "backbone")
    byte_tokenizer.save_pretrained(home / "backbone")
    from longmem import LongMem

    LongMem.from_backbone(home / "backbone", chunk_size=4, num_retrieved=16).save_pretrained(home / "side")
    return home / "side"


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[Process]:
    made = Process(tmp_path_factory.mktemp("process"), checkpoint)
    made.begin()
    yield made
    made.http.close()
    if made.process.poll() is None:
        made.stop(signal.SIGKILL)


class Client:
    """One user with one memory, who keeps a ledger of what was acknowledged."""

    def __init__(self, server: Process, number: int) -> None:
        self.server, self.number, self.key = server, number, number % 2
        self.draw = random.Random(number)
        self.memory, self.secret = f"m{number // 2}", f"zq{number:03}q"
        self.there: dict[str, str] = {}
        self.gone: set[str] = set()
        self.unsure: set[str] = set()
        self.turns = 0

    def ask(self, method: str, path: str, body: Any = None) -> httpx.Response | None:
        """The answer, in which nobody else's secret may be; None where the server was not there, or was busy."""
        try:
            answer = self.server.call(self.key, method, path, body)
        except httpx.TransportError:
            time.sleep(1)
            return None
        shown = answer.text.replace(self.secret, "")
        assert "zq" not in shown or not [n for n in range(50) if f"zq{n:03}q" in shown], (
            self.number,
            path,
            answer.text,
        )
        assert answer.status_code in (200, 201, 429), (self.number, method, path, answer.text)
        return None if answer.status_code == 429 else answer

    def make(self) -> None:
        while not any(each["id"] == self.memory for each in self.listed()):
            try:
                self.server.call(self.key, "POST", "/v1/memories", {"id": self.memory})
            except httpx.TransportError:
                time.sleep(1)

    def listed(self) -> list[Any]:
        answer = self.ask("GET", "/v1/memories")
        return [] if answer is None else answer.json()["data"]

    def turn(self) -> None:
        self.turns += 1
        place = f"/v1/memories/{self.memory}"
        kind = self.draw.choice(["add", "add", "forget", "search", "chat", "show", "export"])
        if kind == "add":
            name = f"d{self.turns}"
            text = f"{self.secret} number {self.turns} is kept. " * self.draw.randrange(1, 4)
            self.unsure.add(name)
            if self.ask("POST", f"{place}/documents", {"name": name, "text": text}) is not None:
                self.there[name] = text
                self.unsure.discard(name)
        elif kind == "forget" and self.there:
            name = self.draw.choice(sorted(self.there))
            del self.there[name]
            self.unsure.add(name)
            if self.ask("DELETE", f"{place}/documents/{name}") is not None:
                self.gone.add(name)
                self.unsure.discard(name)
        elif kind == "search":
            answer = self.ask("POST", f"{place}/search", {"query": "zq number kept " + self.secret, "top": 50})
            if answer is not None:
                found = {each["document"] for each in answer.json()["data"]}
                assert not found & self.gone
                assert found or not self.there
        elif kind == "chat":
            said = [{"role": "user", "content": "which number is kept?"}]
            body = {"messages": said, "max_tokens": 6, "memory_id": self.memory, "explain": True}
            answer = self.ask("POST", "/v1/chat/completions", body)
            if answer is not None:
                read = answer.json()["memory"]
                names = {each["document"] for each in read["passages"]}
                names |= {chunk["document"] for token in read["tokens"][0] for chunk in token["chunks"]}
                assert not names & self.gone
        else:
            self.check(self.ask("GET", f"{place}/export") if kind == "export" else None)

    def check(self, answer: httpx.Response | None) -> None:
        """What was acknowledged is there with its text, what was forgotten is not."""
        if answer is not None:
            found = {each["id"]: each["text"] for each in map(json.loads, answer.text.splitlines())}
            assert {**found, **self.there} == found, (self.number, set(self.there) - set(found))
            assert not set(found) & self.gone


@pytest.mark.parametrize(
    ("clients", "seconds", "ends"),
    [
        pytest.param(8, 3, (signal.SIGKILL, signal.SIGTERM), id="few"),
        pytest.param(50, 45, (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL), id="many", marks=pytest.mark.slow),
    ],
)
def test_nothing_acknowledged_is_lost_and_nothing_of_others_is_shown(
    process: Process, clients: int, seconds: float, ends: tuple[int, ...]
) -> None:
    users, over = [Client(process, number) for number in range(clients)], threading.Event()

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
    for user in users:
        user.check(user.ask("GET", f"/v1/memories/{user.memory}/export"))
        assert {each["id"] for each in user.listed()} == {f"m{n}" for n in range((clients + 1 - user.key) // 2)}
    assert sum(len(user.there) for user in users) >= clients / 2 and any(user.gone for user in users)


def test_what_was_accepted_before_sigterm_is_done_and_answered(process: Process, made_text: Callable[..., str]) -> None:
    process.call(0, "POST", "/v1/memories", {"id": "kept"})
    answers: list[httpx.Response] = []

    def write(number: int) -> None:
        body = {"name": f"d{number}", "text": made_text(3000, number)}
        answers.append(process.call(0, "POST", "/v1/memories/kept/documents", body))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    while process.http.get("/health").json()["waiting"] < 5:
        time.sleep(0.005)
    assert process.stop(signal.SIGTERM) in (0, -signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [201] * 6
    process.begin()
    assert process.call(0, "GET", "/v1/memories/kept").json()["documents"] == 6
