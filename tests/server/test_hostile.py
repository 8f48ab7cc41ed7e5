"""What strangers send: no 5xx, no hang, no leak."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

schemathesis = pytest.importorskip("schemathesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

LEAKS = ("/tmp", "Traceback", "site-packages", ".py", "bob", "sqlite")
QUICK: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
FIELDS = [*LIMITS, "model", "messages", "prompt", "input", "temperature", "top_p", "seed", "n", "stop", "logprobs",
          "memory_id", "remember", "recall", "explain", "previous_response_id", "stream_options", "id", "name", "text",
          "metadata", "query", "top", "top_logprobs", "instructions"]  # fmt: skip
GOOD: dict[str, Any] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/memories": {"id": "fuzz"},
    "/v1/memories/fuzz/documents": {"name": "a", "text": "Hello there."},
    "/v1/memories/fuzz/search": {"query": "hello"},
}


def checked(answer: httpx.Response) -> None:
    assert answer.status_code < 500, (answer.request, answer.text)
    if answer.status_code >= 400:
        assert not [leak for leak in LEAKS if leak in answer.text], (answer.request, answer.text)
        assert answer.request.method == "HEAD" or set(answer.json()) == {"error"}


def short(body: dict[str, Any]) -> dict[str, Any]:
    """The body with short answers: a long one is no attack."""
    long = (name for name in LIMITS if name not in body or (isinstance(body[name], int | float) and body[name] > 8))
    return {**body, **dict.fromkeys(long, 2)}


@pytest.fixture(scope="module")
def client(live: Any) -> httpx.Client:
    live.memory("fuzz")
    made: httpx.Client = live.http()
    return made


@settings(max_examples=100, **QUICK)
@given(path=st.sampled_from(list(GOOD)), changed=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
def test_fields_of_any_kind(client: httpx.Client, path: str, changed: dict[str, Any]) -> None:
    try:
        answer = client.post(path, json=short({**GOOD[path], **changed}))
    except ValueError:  # NaN, which is no JSON
        return
    if "text/event-stream" not in answer.headers.get("content-type", ""):
        checked(answer)


TRICKS = ["..%2f..%2fetc%2fpasswd", "%00", "a" * 300, "%ff", "<script>", "~responses", ".", "other%2fsecret", "é", "x"]


@pytest.mark.parametrize("trick", TRICKS)
def test_paths_and_bytes_that_mean_nothing(trick: str, client: httpx.Client) -> None:
    memory = "/v1/memories/fuzz"
    paths = [f"/{trick}", f"/v1/models/{trick}", f"/v1/memories/{trick}", f"/v1/memories/{trick}/export"]
    for path in (*paths, f"/v1/memories/{trick}/search", f"{memory}/documents/{trick}", f"/v1/responses/{trick}"):
        for method in ("GET", "POST", "DELETE", "PUT", "PATCH", "OPTIONS"):
            for kind in ("application/json", "multipart/form-data", "x"):
                checked(client.request(method, path, content=b"\xff{\x00", headers={"content-type": kind}))


HI = '"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1'


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("documents", r'{"name": "s", "text": "Hello.", "metadata": {"a": "\ud800"}}'),
        ("documents", r'{"name": "\ud800", "text": "Hello."}'),
        ("documents", r'{"name": "t", "text": "Hello \udfff."}'),
        ("documents", '{"name": "n", "text": "Hello.", "metadata": {"a": NaN, "b": 1e999}}'),
        ("documents", '{"name": "i", "text": "Hello.", "metadata": {"a": 1' + "0" * 400 + "}}"),
        ("documents", r'{"name": "z\u0000\n", "text": "\u0000 \u0001"}'),
        ("documents", '{"name": "d", "text": "x", "metadata": ' + '{"a":' * 900 + "1" + "}" * 901),
        ("documents", '{"name": "resp_' + "0" * 32 + '", "text": "x", "metadata": {"messages": 1}}'),
        ("/v1/responses", '{"input": "Hi", "memory_id": "fuzz", "previous_response_id": "resp_' + "0" * 32 + '"}'),
        ("/v1/chat/completions", r'{"messages": [{"role": "user", "content": "\ud800"}], "max_tokens": 1}'),
        ("/v1/chat/completions", f'{{{HI}, "temperature": NaN}}'),
        ("/v1/chat/completions", f'{{{HI}, "stop": "\\u0000"}}'),
        ("/v1/chat/completions", f'{{{HI}, "stop": "{"x" * 2_000_000}"}}'),
        ("/v1/chat/completions", "[" * 200_000),
        ("/v1/completions", r'{"prompt": "\u0000\ufffe\ufeff", "max_tokens": 1, "echo": true}'),
        ("search", r'{"query": "\" OR NEAR( * \u0000"}'),
        ("search", r'{"query": "\ud800"}'),
    ],
)
def test_what_json_can_say_and_texts_cannot(client: httpx.Client, path: str, content: str) -> None:
    place = path if path.startswith("/") else f"/v1/memories/fuzz/{path}"
    checked(client.post(place, content=content.encode(), headers={"content-type": "application/json"}))
    for shown in ("/v1/memories/fuzz", "/v1/memories/fuzz/export", "/v1/memories"):
        assert client.get(shown).status_code == 200


def test_the_whole_schema(live: Any) -> None:
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 18
    for operation in operations:

        @settings(max_examples=8, **QUICK)
        @given(case=operation.as_strategy())
        def attempt(case: Any) -> None:
            if isinstance(case.body, dict):
                case.body |= dict.fromkeys(LIMITS, 2)
            answer = case.call(headers={"Authorization": f"Bearer {live.keys['ann']}"}, timeout=30)
            assert answer.status_code < 500, (case, answer.text)

        attempt()
