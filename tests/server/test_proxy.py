"""Two workers behind nginx, with the configuration of docs/server.md: users stay with the worker of their memories."""

from __future__ import annotations

import getpass
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.server.test_process import Process, free_port, until_it_answers

NGINX = shutil.which("nginx") or "/usr/sbin/nginx"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path(NGINX).exists(), reason="needs nginx")]
USERS = 12


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory, pair: Path) -> Iterator[list[Process]]:
    made = [Process(tmp_path_factory.mktemp(f"worker-{number}"), pair, USERS * (1 - number)) for number in range(2)]
    shutil.copy(made[0].folder / "keys", made[1].folder / "keys")
    for each in made:
        each.begin()
    yield made
    for each in made:
        each.close()


@pytest.fixture(scope="module")
def proxy(workers: list[Process], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("nginx"), free_port()
    page = (Path(__file__).parents[2] / "docs" / "server.md").read_text()
    (config,) = re.findall(r"```\n(upstream .*?)```", page, re.DOTALL)
    for documented, worker in zip(("127.0.0.1:8321", "127.0.0.1:8322"), workers, strict=True):
        config = config.replace(documented, worker.url.removeprefix("http://"))
    config = config.replace("listen 443 ssl", f"listen 127.0.0.1:{port}")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    (folder / "nginx.conf").write_text(
        f"user {getpass.getuser()}; pid {folder}/pid; error_log {folder}/error; daemon off; events {{}}\n"
        f"http {{ access_log off; {places}\n{config} }}"
    )
    running = subprocess.Popen([NGINX, "-c", str(folder / "nginx.conf"), "-e", str(folder / "error")])
    url = f"http://127.0.0.1:{port}"
    until_it_answers(running, url)
    yield url
    running.send_signal(signal.SIGTERM)
    running.wait(timeout=30)


def test_users_stay_with_the_worker_of_their_memories(workers: list[Process], proxy: str) -> None:
    keys, place = workers[0].keys, "/v1/memories/notes"
    clients = [httpx.Client(base_url=proxy, headers={"Authorization": f"Bearer {key}"}, timeout=60) for key in keys]
    for number, client in enumerate(clients):
        assert client.post("/v1/memories", json={"id": "notes"}).status_code == 201
        body = {"name": "a", "text": f"User {number} likes plums."}
        assert client.post(f"{place}/documents", json=body).status_code == 201
    home = []
    for client in clients:
        there = [worker.http.get(place, headers=client.headers).status_code for worker in workers]
        assert sorted(there) == [200, 404]
        home.append(there.index(200))
    assert set(home) == {0, 1}

    large = {"query": "plums " * 200_000}  # read whole, then refused for what it says
    assert clients[0].post(f"{place}/search", json=large).status_code == 400
    assert clients[0].post("/v1/memories", content=b"x" * (9 << 20)).status_code == 413
    body = {"messages": [{"role": "user", "content": "plums?"}], "memory_id": "notes", "max_tokens": 60, "stream": True}
    with clients[0].stream("POST", "/v1/chat/completions", json=body) as answer:
        moments = [time.monotonic() for line in answer.iter_lines() if line]
    assert len(moments) > 20 and moments[len(moments) // 2] - moments[0] > 0.01  # piece by piece, not at its end

    workers[0].stop(signal.SIGKILL)
    assert [client.get(place).status_code for client in clients] == [502 if each == 0 else 200 for each in home]
    workers[0].begin()
    for number, client in enumerate(clients):
        found = client.post(f"{place}/search", json={"query": "plums"}).json()["data"]
        assert [each["text"] for each in found] == [f"User {number} likes plums."]
        client.close()
