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


def test_bytes_and_paths_of_any_kind(client: Any, live: Any) -> None:
    drawn = random.Random(0)
    paths = [
        *GOOD,
        "/v1/memories/fuzz",
        "/v1/memories/fuzz/export",
        "/v1/memories/fuzz/documents/a",
        "/v1/models/x",
        "/x",
    ]
    tricks = ["..%2f..%2fetc%2fpasswd", "%00", "a" * 300, "%ff", "<script>", "~responses", ".", "bob%2fsecret", "é"]
    for turn in range(250):
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
