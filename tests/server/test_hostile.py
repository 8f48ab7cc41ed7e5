"""What strangers send: no 5xx, no hang, no leak."""

from typing import Any

import httpx
import pytest

schemathesis = pytest.importorskip("schemathesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402

LEAKS = ("/tmp", "Traceback", "site-packages", ".py", "bob", "sqlite")
QUICK: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def checked(answer: httpx.Response) -> None:
    assert answer.status_code < 500, (answer.request, answer.text)
    if answer.status_code >= 400:
        assert not [leak for leak in LEAKS if leak in answer.text], (answer.request, answer.text)
        assert answer.request.method == "HEAD" or set(answer.json()) == {"error"}


@pytest.fixture(scope="module")
def client(live: Any) -> httpx.Client:
    live.memory("fuzz")
    made: httpx.Client = live.http()
    return made


TRICKS = ["..%2f..%2fetc%2fpasswd", "%00", "a" * 300, "%ff", "<script>", "~responses", ".", "other%2fsecret", "é", "x"]


@pytest.mark.parametrize("trick", TRICKS)
def test_paths_and_bytes_that_mean_nothing(trick: str, client: httpx.Client) -> None:
    memory = "/v1/memories/fuzz"
    paths = [f"/{trick}", f"/v1/models/{trick}", f"/v1/memories/{trick}", f"/v1/memories/{trick}/export"]
    for path in (*paths, f"/v1/memories/{trick}/search", f"{memory}/documents/{trick}", f"/v1/responses/{trick}"):
        for method in ("GET", "POST", "DELETE", "OPTIONS"):
            checked(client.request(method, path, content=b"\xff{\x00", headers={"content-type": "application/json"}))


HI = '"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1'


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("documents", r'{"name": "s", "text": "Hello.", "metadata": {"a": "\ud800"}}'),
        ("documents", '{"name": "n", "text": "Hello.", "metadata": {"a": NaN, "b": 1e999}}'),
        ("documents", '{"name": "i", "text": "Hello.", "metadata": {"a": 1' + "0" * 400 + "}}"),
        ("documents", r'{"name": "z\u0000\n", "text": "\u0000 \u0001"}'),
        ("documents", '{"name": "d", "text": "x", "metadata": ' + '{"a":' * 900 + "1" + "}" * 901),
        ("documents", '{"name": "resp_' + "0" * 32 + '", "text": "x", "metadata": {"messages": 1}}'),
        ("/v1/responses", '{"input": "Hi", "memory_id": "fuzz", "previous_response_id": "resp_' + "0" * 32 + '"}'),
        ("/v1/chat/completions", f'{{{HI}, "stop": "\\u0000"}}'),
        ("/v1/chat/completions", f'{{{HI}, "stop": "{"x" * 2_000_000}"}}'),
        ("/v1/chat/completions", "[" * 200_000),
        ("/v1/completions", r'{"prompt": "\u0000\ufffe\ufeff", "max_tokens": 1, "echo": true}'),
        ("search", r'{"query": "\" OR NEAR( * \u0000"}'),
    ],
)
def test_what_json_can_say_and_texts_cannot(client: httpx.Client, path: str, content: str) -> None:
    place = path if path.startswith("/") else f"/v1/memories/fuzz/{path}"
    checked(client.post(place, content=content.encode(), headers={"content-type": "application/json"}))
    for shown in ("/v1/memories/fuzz", "/v1/memories/fuzz/export", "/v1/memories"):
        assert client.get(shown).status_code == 200


@pytest.mark.parametrize("mode", GenerationMode)
def test_the_whole_schema_and_what_breaks_it(client: httpx.Client, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 18
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue

        @settings(max_examples=8 if mode is GenerationMode.POSITIVE else 16, **QUICK)
        @given(case=operation.as_strategy(generation_mode=mode))
        def attempt(case: Any) -> None:
            if isinstance(case.body, dict):  # a long answer is no attack
                asked = {name: case.body.get(name, 9) for name in LIMITS}
                case.body |= {name: 2 for name, most in asked.items() if isinstance(most, int | float) and most > 8}
            answer = case.call(headers=client.headers, timeout=30)
            assert answer.status_code < 500, (case, answer.text)
            assert answer.status_code < 400 or not [leak for leak in LEAKS if leak in answer.text], (case, answer.text)

        attempt()
