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
JSON = {"content-type": "application/json"}
MEMORY = "/v1/memories/fuzz"


def checked(answer: Any, sent: Any) -> None:
    assert answer.status_code < 500, (sent, answer.text)
    if answer.status_code >= 400:
        assert not [leak for leak in LEAKS if leak in answer.text], (sent, answer.text)
        assert set(answer.json()) == {"error"}, (sent, answer.text)


@pytest.fixture(scope="module")
def client(live: Any) -> httpx.Client:
    live.memory("fuzz")
    made: httpx.Client = live.http()
    return made


@pytest.mark.parametrize("trick", ["..%2f..%2fetc%2fpasswd", "%00", "a" * 300, "%ff", "~responses", "other%2fsecret"])
def test_paths_and_bytes_that_mean_nothing(trick: str, client: httpx.Client) -> None:
    memory = f"/v1/memories/{trick}"
    others = (f"/{trick}", f"/v1/models/{trick}", f"{MEMORY}/documents/{trick}", f"/v1/responses/{trick}")
    for path in (memory, f"{memory}/export", f"{memory}/search", *others):
        for method in ("GET", "POST", "DELETE", "OPTIONS"):
            checked(client.request(method, path, content=b"\xff{\x00", headers=JSON), (method, path))


HI = '"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1'
NO_RESPONSE = "resp_" + "0" * 32


@pytest.mark.parametrize(
    ("path", "content"),
    [
        (f"{MEMORY}/documents", r'{"name": "s", "text": "Hello.", "metadata": {"a": "\ud800"}}'),
        (f"{MEMORY}/documents", '{"name": "n", "text": "Hello.", "metadata": {"a": NaN, "b": 1e999}}'),
        (f"{MEMORY}/documents", '{"name": "i", "text": "Hello.", "metadata": {"a": 1' + "0" * 400 + "}}"),
        (f"{MEMORY}/documents", r'{"name": "z\u0000\n", "text": "\u0000 \u0001"}'),
        (f"{MEMORY}/documents", '{"name": "d", "text": "x", "metadata": ' + '{"a":' * 900 + "1" + "}" * 901),
        (f"{MEMORY}/documents", f'{{"name": "{NO_RESPONSE}", "text": "x", "metadata": {{"messages": 1}}}}'),
        ("/v1/responses", f'{{"input": "Hi", "memory_id": "fuzz", "previous_response_id": "{NO_RESPONSE}"}}'),
        ("/v1/chat/completions", f'{{{HI}, "stop": "\\u0000"}}'),
        ("/v1/chat/completions", f'{{{HI}, "stop": "{"x" * 2_000_000}"}}'),
        ("/v1/chat/completions", "[" * 200_000),
        ("/v1/completions", r'{"prompt": "\u0000\ufffe\ufeff", "max_tokens": 1, "echo": true}'),
        (f"{MEMORY}/search", r'{"query": "\" OR NEAR( * \u0000"}'),
    ],
)
def test_what_json_can_say_and_texts_cannot(client: httpx.Client, path: str, content: str) -> None:
    checked(client.post(path, content=content.encode(), headers=JSON), content[:200])
    for shown in (MEMORY, f"{MEMORY}/export", "/v1/memories"):
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
            checked(case.call(headers=client.headers, timeout=30), case)

        attempt()
