"""What strangers send: no 5xx, no hang, no leak."""

from __future__ import annotations

import random
from typing import Any

import httpx
import pytest

schemathesis = pytest.importorskip("schemathesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

LEAKS = ("/tmp", "Traceback", "site-packages", ".py", "bob", "sqlite")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ["model", "messages", "prompt", "input", "max_tokens", "temperature", "top_p", "seed", "n", "stop", "logprobs",
          "memory_id", "remember", "recall", "explain", "previous_response_id", "stream_options", "id", "name", "text",
          "metadata", "query", "top", "top_logprobs", "max_output_tokens", "instructions"]  # fmt: skip
GOOD: dict[str, Any] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 2},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 2},
    "/v1/memories": {"id": "fuzz"},
    "/v1/memories/fuzz/documents": {"name": "a", "text": "Hello there."},
    "/v1/memories/fuzz/search": {"query": "hello"},
}


def checked(answer: httpx.Response) -> None:
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert not [leak for leak in LEAKS if leak in answer.text], answer.text
        assert set(answer.json()) == {"error"}


@pytest.fixture(scope="module")
def client(live: Any) -> Any:
    headers = {"Authorization": f"Bearer {live.keys['ann']}"}
    with httpx.Client(base_url=live.url, headers=headers, timeout=30) as made:
        made.post("/v1/memories", json={"id": "fuzz"})
        yield made


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(list(GOOD)), changed=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
def test_fields_of_any_kind(client: Any, path: str, changed: dict[str, Any]) -> None:
    body = {**GOOD[path], **changed}
    most = [value for name in ("max_tokens", "max_output_tokens") if isinstance(value := body.get(name), int)]
    if any(value > 8 for value in most):
        return  # a long answer is no attack
    body.setdefault("max_tokens", 2)
    body.setdefault("max_output_tokens", 2)
    try:
        answer = client.post(path, json=body)
    except ValueError:  # NaN, which is no JSON
        return
    checked(answer) if "text/event-stream" not in answer.headers.get("content-type", "") else None


@pytest.mark.parametrize("count", [250, pytest.param(2000, marks=pytest.mark.slow)])
def test_bytes_and_paths_of_any_kind(count: int, client: Any) -> None:
    drawn = random.Random(count)
    paths = [
        *GOOD,
        "/v1/memories/fuzz",
        "/v1/memories/fuzz/export",
        "/v1/memories/fuzz/documents/a",
        "/v1/models/x",
        "/x",
    ]
    tricks = ["..%2f..%2fetc%2fpasswd", "%00", "a" * 300, "%ff", "<script>", "~responses", ".", "bob%2fsecret", "é"]
    for turn in range(count):
        path = drawn.choice(paths)
        if turn % 3 == 0:
            path = path.replace("fuzz", drawn.choice(tricks)).replace("/x", "/" + drawn.choice(tricks))
        method = drawn.choice(["GET", "POST", "DELETE", "PUT", "PATCH", "OPTIONS"])
        if method == "DELETE" and path == "/v1/memories/fuzz":
            continue
        content = bytes(drawn.randrange(256) for _ in range(drawn.randrange(60)))
        kind = drawn.choice(["application/json", "text/plain", "multipart/form-data", "x"])
        answer = client.request(method, path, content=content, headers={"content-type": kind})
        assert answer.status_code < 500, (method, path, answer.text)
        if answer.status_code >= 400:
            assert not [leak for leak in LEAKS if leak in answer.text], (path, answer.text)


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/v1/memories/fuzz/documents", r'{"name": "s", "text": "Hello.", "metadata": {"a": "\ud800"}}'),
        ("/v1/memories/fuzz/documents", r'{"name": "\ud800", "text": "Hello."}'),
        ("/v1/memories/fuzz/documents", r'{"name": "t", "text": "Hello \udfff."}'),
        ("/v1/memories/fuzz/documents", '{"name": "n", "text": "Hello.", "metadata": {"a": NaN, "b": 1e999}}'),
        ("/v1/memories/fuzz/documents", '{"name": "i", "text": "Hello.", "metadata": {"a": 1' + "0" * 400 + "}}"),
        ("/v1/memories/fuzz/documents", r'{"name": "z\u0000\n", "text": "\u0000 \u0001"}'),
        ("/v1/memories/fuzz/documents", '{"name": "d", "text": "x", "metadata": ' + '{"a":' * 900 + "1" + "}" * 901),
        ("/v1/memories/fuzz/documents", '{"name": "resp_' + "0" * 32 + '", "text": "x", "metadata": {"messages": 1}}'),
        ("/v1/responses", '{"input": "Hi", "memory_id": "fuzz", "previous_response_id": "resp_' + "0" * 32 + '"}'),
        ("/v1/chat/completions", r'{"messages": [{"role": "user", "content": "\ud800"}], "max_tokens": 1}'),
        (
            "/v1/chat/completions",
            '{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "temperature": NaN}',
        ),
        (
            "/v1/chat/completions",
            '{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "stop": "\u0000"}',
        ),
        ("/v1/chat/completions", "[" * 200_000),
        ("/v1/completions", r'{"prompt": "\u0000\ufffe\ufeff", "max_tokens": 1, "echo": true}'),
        ("/v1/memories/fuzz/search", r'{"query": "\" OR NEAR( * \u0000"}'),
        ("/v1/memories/fuzz/search", r'{"query": "\ud800"}'),
    ],
)
def test_what_json_can_say_and_texts_cannot(client: Any, path: str, content: str) -> None:
    checked(client.post(path, content=content.encode(), headers={"content-type": "application/json"}))
    for shown in ("/v1/memories/fuzz", "/v1/memories/fuzz/export", "/v1/memories"):
        assert client.get(shown).status_code == 200


def test_the_whole_schema(live: Any) -> None:
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    headers = {"Authorization": f"Bearer {live.keys['ann']}"}
    operations = [result.ok() for result in schema.get_all_operations()]
    for operation in operations:
        attempts(operation, headers)
    assert len(operations) >= 18


def attempts(operation: Any, headers: dict[str, str]) -> None:
    @settings(max_examples=8, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def attempt(case: Any) -> None:
        if isinstance(case.body, dict):
            for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
                if case.body.get(name):
                    case.body[name] = 2
            case.body.setdefault("max_tokens", 2)
            case.body.setdefault("max_output_tokens", 2)
        answer = case.call(headers=headers, timeout=30)
        assert answer.status_code < 500, (operation.label, answer.text)

    attempt()
