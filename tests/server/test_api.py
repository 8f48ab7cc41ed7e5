"""The real OpenAI client against a live server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from longmem import TrainingFree

openai = pytest.importorskip("openai")

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


def post(live: Any, path: str, body: Any, owner: str | None = "ann") -> httpx.Response:
    headers = {} if owner is None else {"Authorization": f"Bearer {live.keys[owner]}"}
    return httpx.post(live.url + path, json=body, headers=headers, timeout=60)


def memory(live: Any, name: str, owner: str = "ann", **documents: str) -> str:
    assert post(live, "/v1/memories", {"id": name}, owner).status_code == 201
    for document, text in documents.items():
        body = {"name": document, "text": text}
        assert post(live, f"/v1/memories/{name}/documents", body, owner).status_code == 201
    return name


def test_chat_at_once_and_streamed_give_the_same(live: Any) -> None:
    settings: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 8, "seed": 7, "temperature": 0.8}
    whole = live.client().chat.completions.create(**settings)
    assert whole.object == "chat.completion" and whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 8
    pieces = list(
        live.client().chat.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    )
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert streamed == whole.choices[0].message.content and streamed
    assert pieces[-1].usage.completion_tokens == 8 and pieces[-2].choices[0].finish_reason == "length"


def test_n_answers_stop_words_and_logprobs(live: Any) -> None:
    settings: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "seed": 1}
    several = live.client().chat.completions.create(**settings, n=3, logprobs=True, top_logprobs=2)
    assert len({choice.message.content for choice in several.choices}) == 3
    first = several.choices[0].logprobs.content
    assert len(first) == 12 and all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in first)
    text = several.choices[0].message.content
    stop = text[4:6]
    cut = live.client().chat.completions.create(**settings, stop=[stop]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (text[: text.index(stop)], "stop")


def test_completions(live: Any) -> None:
    settings: dict[str, Any] = {"model": "tiny", "prompt": ["One", "Two"], "max_tokens": 5, "temperature": 0}
    found = live.client().completions.create(**settings, echo=True, logprobs=1)
    assert [choice.index for choice in found.choices] == [0, 1]
    assert found.choices[1].text.startswith("Two") and len(found.choices[0].logprobs.tokens) == 5
    streamed: dict[int, str] = {0: "", 1: ""}
    for piece in live.client().completions.create(**settings, echo=True, stream=True):
        streamed[piece.choices[0].index] += piece.choices[0].text
    assert streamed == {choice.index: choice.text for choice in found.choices}


def test_responses_go_on_from_one_another_also_streamed(live: Any) -> None:
    client = live.client()
    settings: dict[str, Any] = {"model": "tiny", "max_output_tokens": 6, "temperature": 0}
    first = client.responses.create(input="Hello", **settings)
    assert first.status == "incomplete" and first.output_text and first.usage.output_tokens == 6
    second = client.responses.create(input="And now?", previous_response_id=first.id, **settings)
    assert second.previous_response_id == first.id and second.usage.input_tokens > first.usage.input_tokens + 9
    events = list(client.responses.create(input="And now?", previous_response_id=first.id, stream=True, **settings))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == second.output_text == events[-1].response.output_text
    forgetful = client.responses.create(input="Hello", store=False, **settings)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(input="x", previous_response_id=forgetful.id, **settings)
    with pytest.raises(openai.NotFoundError):
        live.client("bob").responses.create(input="x", previous_response_id=first.id, **settings)


def test_the_documentation_has_every_call(live: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "server.md").read_text()
    names = {"{memory}": "ID", "{document}": "NAME", "{response}": "ID", "{model_id}": "NAME"}
    for path in httpx.get(live.url + "/openapi.json").json()["paths"]:
        for given, told in names.items():
            path = path.replace(given, told)
        assert f"{path}`" in page, path


def test_models_and_errors(live: Any) -> None:
    client = live.client()
    assert [model.id for model in client.models.list()] == ["tiny"] == [client.models.retrieve("tiny").id]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.AuthenticationError):
        live.client("nobody").models.list()
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="tiny", messages=HELLO, temperature=9)
    assert httpx.get(live.url + "/health").json()["status"] == "ok"


def test_memory_is_named_or_there_is_none(live: Any) -> None:
    name = memory(live, "notes", boat="The boat is called Petrel. " * 20)
    client = live.client()
    settings: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 4, "temperature": 0, "logprobs": True}
    plain = client.chat.completions.create(**settings)
    assert plain.usage.memory_tokens_read == 0
    by_body = client.chat.completions.create(**settings, extra_body={"memory_id": name, "recall": 0})
    by_header = client.chat.completions.create(
        **settings, extra_headers={"X-Memory-Id": name}, extra_body={"recall": 0}
    )
    assert by_body.usage.memory_tokens_read == by_header.usage.memory_tokens_read > 500
    assert by_body.choices[0].logprobs.content[0].logprob != plain.choices[0].logprobs.content[0].logprob
    assert by_body.choices == by_header.choices
    with pytest.raises(openai.NotFoundError):
        live.client("bob").chat.completions.create(**settings, extra_body={"memory_id": name})
    with pytest.raises(openai.BadRequestError, match="remember needs memory_id"):
        client.chat.completions.create(**settings, extra_body={"remember": True})


def test_what_was_read_is_told_on_request(live: Any) -> None:
    told = "The boat is called Petrel. " * 20
    name = memory(live, "read", boat=told)
    question: list[Any] = [{"role": "user", "content": "What is the boat called?"}]
    body = {"memory_id": name, "explain": True}
    found = live.client().chat.completions.create(model="tiny", messages=question, max_tokens=3, extra_body=body)
    assert {each["document"] for each in found.memory["passages"]} == {"boat"}
    (tokens,) = found.memory["tokens"]
    assert len(tokens) == 3 and any(abs(token["gain"]) > 1e-4 for token in tokens)
    chunks = [chunk for token in tokens for chunk in token["chunks"]]
    stored = [chunk for chunk in chunks if chunk["document"] == "boat"]
    assert stored and all(chunk["before"] + chunk["text"] + chunk["after"] in told for chunk in stored)


def test_heads_without_trained_gates_read_nothing_and_passages_stay(start: Any, tiny: Any, tmp_path: Path) -> None:
    closed = TrainingFree.from_backbone(tiny.backbone.model, gate=0.0, chunk_size=4, num_retrieved=16)
    with start(tmp_path, model=closed) as live:
        name, client = memory(live, "notes", boat="The boat is called Petrel. " * 20), live.client()
        settings: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 4, "temperature": 0}
        plain = client.chat.completions.create(**settings, logprobs=True)
        found = client.chat.completions.create(**settings, logprobs=True, extra_body={"memory_id": name, "recall": 0})
        assert found.choices == plain.choices
        question: list[Any] = [{"role": "user", "content": "What is the boat called?"}]
        told = client.chat.completions.create(
            **{**settings, "messages": question}, extra_body={"memory_id": name, "explain": True}
        )
        assert told.memory["passages"] and told.memory["tokens"] == [[]] and told.usage.memory_tokens_read > 500


def test_what_is_said_is_kept_and_forgotten(live: Any) -> None:
    name, client = memory(live, "talk"), live.client()
    told: list[Any] = [{"role": "user", "content": "My sister keeps three bees."}]
    body = {"memory_id": name, "remember": True}
    said = client.chat.completions.create(model="tiny", messages=told, max_tokens=4, extra_body=body)
    assert said.usage.memory_tokens_written > 20
    search = post(live, f"/v1/memories/{name}/search", {"query": "bees"}).json()["data"]
    assert "three bees" in search[0]["text"]
    document = search[0]["document"]
    shown = httpx.get(f"{live.url}/v1/memories/{name}/documents/{document}", headers=auth(live)).json()
    assert shown["text"].startswith("user: My sister keeps three bees.\nassistant:")
    export = httpx.get(f"{live.url}/v1/memories/{name}/export", headers=auth(live)).text
    assert "three bees" in export
    gone = httpx.delete(f"{live.url}/v1/memories/{name}/documents/{document}", headers=auth(live))
    assert gone.json()["deleted"]
    assert post(live, f"/v1/memories/{name}/search", {"query": "bees"}).json()["data"] == []
    assert httpx.delete(f"{live.url}/v1/memories/{name}", headers=auth(live)).status_code == 200
    assert httpx.get(f"{live.url}/v1/memories/{name}", headers=auth(live)).status_code == 404


def auth(live: Any, owner: str = "ann") -> dict[str, str]:
    return {"Authorization": f"Bearer {live.keys[owner]}"}


def test_no_key_sees_anothers_memories(live: Any) -> None:
    memory(live, "secret", "ann", diary="The key lies under the seventh stone.")
    memory(live, "secret", "bob", diary="Bob likes plums.")
    for path in ("/v1/memories", "/v1/memories/secret", "/v1/memories/secret/export"):
        text = httpx.get(live.url + path, headers=auth(live, "bob")).text
        assert "seventh" not in text and "ann" not in text
    found = post(live, "/v1/memories/secret/search", {"query": "key stone plums"}, "bob").json()["data"]
    assert [each["text"] for each in found] == ["Bob likes plums."]
    assert httpx.get(live.url + "/v1/memories").status_code == 401


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "x" * 65, "a b", "é", "~responses", "a\x00b"])
def test_names_that_could_be_paths_are_refused(name: str, live: Any) -> None:
    answer = post(live, "/v1/memories", {"id": name})
    assert answer.status_code == 400 and "/tmp" not in answer.text
    body = {"model": "tiny", "messages": HELLO, "memory_id": name}
    assert post(live, "/v1/chat/completions", body).status_code == 400


def test_sixteen_at_once_answer_as_alone(live: Any) -> None:
    name = memory(live, "many", boat="The boat is called Petrel. " * 20)

    def ask(seed: int) -> str:
        body = {"memory_id": name} if seed % 2 else {}
        settings: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 8, "seed": seed}
        answer: str = live.client().chat.completions.create(**settings, extra_body=body).choices[0].message.content
        return answer

    alone = [ask(seed) for seed in range(16)]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(16))) == alone


def test_a_full_queue_says_when_to_come_back(start: Any, tmp_path: Path) -> None:
    with start(tmp_path, most_waiting=1, rows=1) as live, ThreadPoolExecutor(12) as pool:
        body = {"model": "tiny", "messages": HELLO, "max_tokens": 60}
        answers = list(pool.map(lambda _: post(live, "/v1/chat/completions", body), range(12)))
        busy = [answer for answer in answers if answer.status_code == 429]
        assert busy and {answer.status_code for answer in answers} == {200, 429}
        assert all(answer.headers["Retry-After"] for answer in busy)


def test_a_client_that_leaves_frees_the_model(start: Any, tmp_path: Path) -> None:
    with start(tmp_path) as live:
        body = {"model": "tiny", "messages": HELLO, "max_tokens": 20_000, "stream": True}
        with httpx.stream("POST", live.url + "/v1/chat/completions", json=body, headers=auth(live)) as answer:
            next(answer.iter_text())
        assert post(live, "/v1/chat/completions", {**body, "max_tokens": 2, "stream": False}).status_code == 200


def test_memories_survive_a_restart(start: Any, tmp_path: Path) -> None:
    with start(tmp_path) as live:
        memory(live, "kept", boat="The boat is called Petrel.")
        memory(live, "empty")
    with start(tmp_path) as live:
        found = httpx.get(live.url + "/v1/memories", headers=auth(live)).json()["data"]
        assert [(each["id"], each["documents"]) for each in found] == [("empty", 0), ("kept", 1)]


def test_bodies_that_are_too_large_or_no_json_are_refused(live: Any) -> None:
    url, headers = live.url + "/v1/chat/completions", auth(live)
    assert httpx.post(url, content=b"x" * (9 << 20), headers=headers).status_code == 413
    for content in (b"", b"{", b"[]", b"\xff\xfe", b'{"messages": []}', b'{"messages": [{"role": "tool"}]}'):
        answer = httpx.post(url, content=content, headers={**headers, "content-type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_metrics_count(live: Any) -> None:
    text = httpx.get(live.url + "/metrics", headers=auth(live)).text
    assert 'longmem_requests_total{path="/v1/chat/completions",status="200"}' in text and "longmem_queue" in text
