"""Details of the API: defaults, edges, files, stored responses, what is refused."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")
from prometheus_client import CollectorRegistry, Counter

from longmem.generation.page import Pieces
from longmem.server.access import Limits
from longmem.server.answering import Answer
from longmem.server.engine import Engine, Token

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def ann(live: Any) -> Any:
    with httpx.Client(base_url=live.url, headers={"Authorization": f"Bearer {live.keys['ann']}"}, timeout=60) as made:
        yield made


@pytest.mark.parametrize(
    ("filename", "content", "names"),
    [
        ("a.txt", b"The boat is called Petrel.", ["a.txt"]),
        ("../../etc/b.md", b"The boat is called Petrel.", ["b.md"]),
        ("c.jsonl", b'{"text": "One."}\n{"text": "Two."}\n', ["c.jsonl:1", "c.jsonl:2"]),
    ],
)
def test_files_become_documents(ann: Any, filename: str, content: bytes, names: list[str]) -> None:
    ann.post("/v1/memories", json={"id": "files"})
    answer = ann.post("/v1/memories/files/files", files={"file": (filename, content)})
    assert answer.status_code == 201, answer.text
    assert [each["name"] for each in answer.json()["data"]] == names
    text = ann.get(f"/v1/memories/files/documents/{names[0]}").json()["text"]
    assert text in ("The boat is called Petrel.", "One.")


@pytest.mark.parametrize(
    ("filename", "content", "status", "said"),
    [
        ("a.pdf", b"x", 400, "kinds"),
        ("a.zip", b"x", 400, "kinds"),
        ("a.txt", b"\xff\xfe\xfa", 400, "UTF-8"),
        ("a.txt", b"", 400, "no text"),
        ("a.jsonl", b"{", 400, "JSON"),
        ("a.txt.gz", b"x", 400, "kinds"),
    ],
)
def test_files_that_are_refused(ann: Any, filename: str, content: bytes, status: int, said: str) -> None:
    ann.post("/v1/memories", json={"id": "files"})
    answer = ann.post("/v1/memories/files/files", files={"file": (filename, content)})
    assert (answer.status_code, "/tmp" in answer.text) == (status, False) and said in answer.json()["error"]["message"]


def test_a_stored_response_is_shown_and_forgotten(live: Any) -> None:
    client = live.client()
    settings: dict[str, Any] = {"model": "any name", "max_output_tokens": 4, "temperature": 0}
    first = client.responses.create(input="Hello", instructions="Speak like a sailor.", **settings)
    shown = client.responses.retrieve(first.id)
    assert (shown.output_text, shown.model, shown.status) == (first.output_text, "tiny", first.status)
    plain = client.responses.create(input="Hello", **settings)
    after = [
        client.responses.create(input="And?", previous_response_id=each.id, **settings).usage.input_tokens
        for each in (first, plain)
    ]
    texts = [len(each.output_text.encode()) for each in (first, plain)]
    assert abs((after[0] - texts[0]) - (after[1] - texts[1])) < 8  # instructions are not handed on
    client.responses.delete(first.id)
    for call in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(Exception, match="no response"):
            call(first.id)


def test_a_completion_has_16_tokens_and_an_answer_what_is_left_of_the_window(live: Any) -> None:
    client = live.client()
    done = client.completions.create(model="tiny", prompt="One", temperature=0)
    assert done.usage.completion_tokens == 16
    answer = client.chat.completions.create(model="tiny", messages=HELLO, seed=1)
    assert answer.usage.completion_tokens == 256 or answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", {"messages": HELLO, "top_logprobs": 2}, 400),
        ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 2, "logprobs": True, "top_logprobs": 0}, 200),
        ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 2, "stop": ["", "a", "b", "c", "d"]}, 200),
        ("/v1/completions", {"prompt": "a", "max_tokens": 2, "logprobs": 0}, 200),
        ("/v1/completions", {"prompt": "a", "logprobs": 21}, 400),
        ("/v1/completions", {"prompt": []}, 400),
    ],
)
def test_edges_of_fields(ann: Any, path: str, body: Any, status: int) -> None:
    answer = ann.post(path, json=body)
    assert answer.status_code == status, answer.text
    if body.get("logprobs") == 0:
        assert len(answer.json()["choices"][0]["logprobs"]["token_logprobs"]) == 2


def test_methods_headers_and_origins(ann: Any) -> None:
    assert ann.head("/health").status_code == ann.head("/").status_code == 200
    wrong = ann.put("/v1/models")
    assert wrong.status_code == 405 and "error" in wrong.json() and "GET" in wrong.headers["allow"]
    body = {"messages": HELLO, "max_tokens": 1}
    for name in ("../x", "", "a b"):
        assert ann.post("/v1/chat/completions", json=body, headers={"X-Memory-Id": name}).status_code == 400
    asked = ann.options("/v1/models", headers={"Origin": "http://x", "Access-Control-Request-Method": "GET"})
    assert not [header for header in asked.headers if header.startswith("access-control")]


def test_without_keys_only_names_of_this_machine_are_answered(start: Any, tmp_path: Path) -> None:
    with start(tmp_path, anybody=True) as live:
        assert httpx.get(live.url + "/v1/memories").status_code == 200
        assert httpx.get(live.url + "/v1/memories", headers={"Host": "evil.example:80"}).status_code == 403


def test_a_failure_in_a_stream_is_an_event_and_ends_the_others(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, count = Engine._generate, [0]

    def failing(self: Any, jobs: Any, memories: Any) -> None:
        count[0] += 1
        if count[0] > 1:
            raise OSError("/secret/path")
        whole(self, jobs, memories)

    monkeypatch.setattr("longmem.server.engine.SLICE", 3)
    monkeypatch.setattr(Engine, "_generate", failing)
    with pytest.raises(Exception, match="something went wrong") as told:
        list(live.client().chat.completions.create(model="tiny", messages=HELLO, n=3, max_tokens=30, stream=True))
    assert "secret" not in str(told.value)
    monkeypatch.undo()
    assert live.client().chat.completions.create(model="tiny", messages=HELLO, max_tokens=2).choices


def test_a_request_that_takes_too_long_is_given_up(start: Any, tmp_path: Path) -> None:
    with start(tmp_path, seconds=0.5) as live:
        headers = {"Authorization": f"Bearer {live.keys['ann']}"}
        body = {"messages": HELLO, "max_tokens": 50_000, "temperature": 0}
        answer = httpx.post(live.url + "/v1/chat/completions", json=body, headers=headers, timeout=60)
        assert answer.status_code == 504
        streamed = httpx.post(
            live.url + "/v1/chat/completions", json={**body, "stream": True}, headers=headers, timeout=60
        )
        assert "given up" in streamed.text.splitlines()[-2]
        idle(live)


def test_a_client_that_leaves_before_its_first_token_frees_its_row(start: Any, tmp_path: Path) -> None:
    with start(tmp_path, rows=1) as live:
        content = json.dumps({"messages": HELLO, "max_tokens": 50_000, "temperature": 0}).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {live.keys['ann']}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2]))) as client:
                client.sendall(head.encode() + content)
                time.sleep(0.1)
        idle(live)


def test_what_a_stopping_server_gives_up_is_told_to_come_again() -> None:
    async def run() -> list[Any]:
        async def slow(*_: Any) -> None:
            await asyncio.sleep(60)

        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        requests = Counter("requests", "", ["path", "status"], registry=CollectorRegistry())
        limits = Limits(slow, most_bytes=1, anybody=False, requests=requests)
        scope = {"type": "http", "path": "/", "method": "GET", "headers": []}
        task = asyncio.create_task(limits(scope, None, send))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        task.cancel()
        await task
        return sent

    start, body = asyncio.run(run())
    assert start["status"] == 503 and (b"retry-after", b"2") in start["headers"] and b"is stopping" in body["body"]


def idle(live: Any) -> None:
    """An answer comes soon: no row is held, and none waits."""
    began = time.monotonic()
    live.client().chat.completions.create(model="tiny", messages=HELLO, max_tokens=2)
    assert time.monotonic() - began < 20
    assert httpx.get(live.url + "/health").json()["waiting"] == 0


def test_characters_of_several_tokens_and_stop_words_within_them(byte_tokenizer: Any) -> None:
    def told(text: str, *stop: str) -> list[str]:
        answer, pieces = Answer(ids=[], pieces=Pieces(byte_tokenizer), stop=stop), []
        for token in [*byte_tokenizer(text)["input_ids"], None]:
            pieces.append(answer.take(None if token is None else Token(token, 0.0)))
            if answer.finish:
                break
        return pieces

    for text in ("día", "日本語", "a👍🏽b", "\ufffd", "x\ufffd"):
        assert "".join(told(text)) == text and all("\ufffd" not in piece or "\ufffd" in text for piece in told(text))
    assert "".join(told("日本語です", "語で")) == "日本"
    assert "".join(told("abcabd", "abd")) == "abc"
    assert "".join(told("aab", "aac", "ab")) == "a"
