"""The real OpenAI client against a live server: answers, memories, files, limits, what is refused."""

import gc
import json
import re
import socket
import sqlite3
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import httpx
import openai
import pytest
from tests.server.conftest import HELLO
from tests.store.small import TOKENIZER, open_small

from longmem import TrainingFree
from longmem.generation.page import Pieces
from longmem.server.answers import Answer
from longmem.server.app import export, show_document
from longmem.server.engine import Engine, Memories, Token
from longmem.store.catalog import Catalog

CHAT = "/v1/chat/completions"
FILES = "/v1/memories/there/files"
BOAT = "The boat is called Petrel. " * 20
WHICH_BOAT: list[Any] = [{"role": "user", "content": "What is the boat called?"}]
GREEDY: dict[str, Any] = {"max_tokens": 4, "temperature": 0}


# answers


def test_chat_at_once_and_streamed_give_the_same_also_several_answers_up_to_stop_words(live: Any) -> None:
    settings: dict[str, Any] = {"max_tokens": 12, "seed": 1, "n": 3}
    whole = live.chat(**settings, logprobs=True, top_logprobs=2)
    texts = [choice.message.content for choice in whole.choices]
    assert whole.object == "chat.completion" and whole.choices[0].message.role == "assistant" and len(set(texts)) == 3
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 36
    told = whole.choices[0].logprobs.content
    assert len(told) == 12 and all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in told)
    *pieces, last = live.chat(**settings, stream=True, stream_options={"include_usage": True})
    streamed = ["", "", ""]
    for choice in (piece.choices[0] for piece in pieces):
        streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts and last.usage == whole.usage and pieces[-1].choices[0].finish_reason == "length"
    stop = texts[0][4:6]
    cut = live.chat(max_tokens=12, seed=1, stop=[stop]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (texts[0][: texts[0].index(stop)], "stop")
    likeliest = (live.chat(max_tokens=8, seed=1, **how).choices for how in ({"temperature": 0}, {"top_p": 1e-6}))
    assert len({choices[0].message.content for choices in likeliest}) == 1


def test_completions_and_how_long_they_are(live: Any) -> None:
    settings: dict[str, Any] = {"model": "tiny", "prompt": ["One", "Two"], "max_tokens": 5, "temperature": 0}
    found = live.client().completions.create(**settings, echo=True, logprobs=1)
    assert [choice.index for choice in found.choices] == [0, 1]
    assert found.choices[1].text.startswith("Two") and len(found.choices[0].logprobs.tokens) == 5
    streamed: dict[int, str] = {0: "", 1: ""}
    for piece in live.client().completions.create(**settings, echo=True, stream=True):
        streamed[piece.choices[0].index] += piece.choices[0].text
    assert streamed == {choice.index: choice.text for choice in found.choices}
    done = live.client().completions.create(model="tiny", prompt="One", temperature=0)
    assert done.usage.completion_tokens == 16  # and an answer what is left of the window
    answer = live.chat(seed=1)
    assert answer.usage.completion_tokens == 256 or answer.choices[0].finish_reason == "stop"


def test_responses_go_on_from_one_another_also_streamed_and_are_shown_and_forgotten(live: Any) -> None:
    responses = live.client().responses
    settings: dict[str, Any] = {"model": "any name", "max_output_tokens": 6, "temperature": 0}
    first = responses.create(input="Hello", **settings)
    assert first.status == "incomplete" and first.output_text and first.usage.output_tokens == 6
    second = responses.create(input="And now?", previous_response_id=first.id, **settings)
    assert second.previous_response_id == first.id and second.usage.input_tokens > first.usage.input_tokens + 9
    events = list(responses.create(input="And now?", previous_response_id=first.id, stream=True, **settings))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == second.output_text == events[-1].response.output_text

    sailor = responses.create(input="Hello", instructions="Speak like a sailor.", **settings)
    after = responses.create(input="And now?", previous_response_id=sailor.id, **settings).usage.input_tokens
    longer = len(sailor.output_text.encode()) - len(first.output_text.encode())
    assert abs(after - second.usage.input_tokens - longer) < 8  # instructions are not handed on
    forgetful = responses.create(input="Hello", store=False, **settings)
    for client, response in ((responses, forgetful), (live.client("bob").responses, first)):
        with pytest.raises(openai.NotFoundError, match=r"no response .* that named a memory is in that memory"):
            client.retrieve(response.id)
        with pytest.raises(openai.NotFoundError):
            client.create(input="x", previous_response_id=response.id, **settings)

    shown = responses.retrieve(first.id)
    assert (shown.output_text, shown.model, shown.status) == (first.output_text, "tiny", first.status)
    responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        responses.delete(first.id)


def test_sixteen_at_once_answer_as_alone_also_when_they_give_way_to_others(
    live: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = live.memory("many", boat=BOAT)

    def ask(seed: int) -> str:
        answer = live.chat(max_tokens=8, seed=seed, extra_body={"memory_id": name} if seed % 2 else {})
        return str(answer.choices[0].message.content)

    alone = [ask(seed) for seed in range(16)]
    monkeypatch.setattr("longmem.server.engine.SLICE", 3)
    monkeypatch.setattr(Engine, "gives_way", lambda self, *_: bool(self._jobs))
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(16))) == alone


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


# memories


def test_a_memory_that_is_named_is_read_and_what_was_read_is_told_on_request(live: Any) -> None:
    name = live.memory("notes", boat=BOAT)
    plain = live.chat(**GREEDY, logprobs=True)
    assert plain.usage.memory_tokens_read == 0
    by_body = live.chat(**GREEDY, logprobs=True, extra_body={"memory_id": name, "recall": 0})
    by_header = live.chat(**GREEDY, logprobs=True, extra_headers={"X-Memory-Id": name}, extra_body={"recall": 0})
    assert by_body.usage.memory_tokens_read == by_header.usage.memory_tokens_read > 500
    assert by_body.choices[0].logprobs.content[0].logprob != plain.choices[0].logprobs.content[0].logprob
    assert by_body.choices == by_header.choices

    found = live.chat(**GREEDY, messages=WHICH_BOAT, extra_body={"memory_id": name, "explain": True})
    assert {each["document"] for each in found.memory["passages"]} == {"boat"}
    (tokens,) = found.memory["tokens"]
    assert len(tokens) == 4 and any(abs(token["gain"]) > 1e-4 for token in tokens)
    stored = [chunk for token in tokens for chunk in token["chunks"] if chunk["document"] == "boat"]
    assert stored and all(chunk["before"] + chunk["text"] + chunk["after"] in BOAT for chunk in stored)


def test_heads_without_trained_gates_read_nothing_and_passages_stay(start: Any, tiny: Any, tmp_path: Path) -> None:
    closed = TrainingFree.from_backbone(tiny.backbone.model, gate=0.0, chunk_size=4, num_retrieved=16)
    with start(tmp_path, model=closed) as live:
        name = live.memory("notes", boat=BOAT)
        found = live.chat(**GREEDY, logprobs=True, extra_body={"memory_id": name, "recall": 0})
        assert found.choices == live.chat(**GREEDY, logprobs=True).choices
        told = live.chat(**GREEDY, messages=WHICH_BOAT, extra_body={"memory_id": name, "explain": True})
        assert told.memory["passages"] and told.memory["tokens"] == [[]] and told.usage.memory_tokens_read > 500


def test_what_is_said_is_kept_and_forgotten(live: Any) -> None:
    place, http = f"/v1/memories/{live.memory('talk')}", live.http()
    told = [{"role": "user", "content": "My sister keeps three bees."}]
    said = live.chat(messages=told, max_tokens=4, extra_body={"memory_id": "talk", "remember": True})
    assert said.usage.memory_tokens_written > 20
    (found, *_) = http.post(f"{place}/search", json={"query": "bees"}).json()["data"]
    assert "three bees" in found["text"] and "three bees" in http.get(f"{place}/export").text
    document = f"{place}/documents/{found['document']}"
    assert http.get(document).json()["text"].startswith("user: My sister keeps three bees.\nassistant:")
    assert http.delete(document).json()["deleted"]
    assert http.post(f"{place}/search", json={"query": "bees"}).json()["data"] == []
    metadata = {"messages": 2, "from": "Ann"}  # shown whatever it is called
    assert http.post(f"{place}/documents", json={"name": "a", "text": "One.", "metadata": metadata}).is_success
    assert http.get(place).json()["data"][0]["metadata"] == metadata
    assert http.post(f"{place}/documents", json={"name": "a", "text": " Two.", "append": True}).is_success
    assert http.get(f"{place}/documents/a").json()["text"] == "One. Two."
    assert [http.delete(place).status_code, http.get(place).status_code] == [200, 404]


def test_text_index_and_bank_of_a_memory_go_with_what_is_forgotten_and_the_oldest_when_many_are_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_small(tmp_path / "memory") as store:
        memories = Memories(store)
        memories.add("ann/talk", "one", "My sister keeps three bees.")
        index = weakref.ref(memories.recall("ann/talk"))
        assert memories.recall("ann/talk").search("bees") and memories.recall("ann/talk") is index()
        memories.add("ann/talk", "other", "And a dog.")
        memories.forget("ann/talk", "one")
        gc.collect()
        assert index() is None
        monkeypatch.setattr("longmem.server.engine.OPEN_RECALLS", 2)
        first, second, _ = (weakref.ref(memories.recall(name)) for name in ("ann/1", "ann/2", "ann/3"))
        gc.collect()
        assert first() is None and memories.recall("ann/2") is second()
        monkeypatch.setattr("longmem.server.engine.OPEN_BYTES", 0)
        bank = weakref.ref(memories.bank("ann/talk").load())
        memories.add("ann/note", "two", "The boat is called Petrel.")
        memories.bank("ann/note")
        gc.collect()
        assert bank() is None


def test_what_is_forgotten_while_it_is_looked_up_is_shown_whole_also_where_only_its_tokens_are_kept(
    tmp_path: Path,
) -> None:
    def forgetting(look: Any) -> Any:
        def looked(catalog: Catalog, *given: Any, **how: Any) -> Any:
            found = look(catalog, *given, **how)
            with closing(sqlite3.connect(catalog.path)) as other, other:
                other.executescript("PRAGMA foreign_keys = ON; DELETE FROM document")
            return found

        return looked

    with open_small(tmp_path / "memory") as store:
        who: Any = Mock(service=Mock(memories=Memories(store), tokenizer=TOKENIZER))
        for look, show in (
            ("find", lambda: show_document("ann/talk", "bees", who)),
            ("documents", lambda: json.loads(export("ann/talk", who).body)),
        ):
            store.add_document("ann/talk", ids=list(b"My sister keeps three bees."), name="bees")
            with patch.object(Catalog, look, forgetting(getattr(Catalog, look))):
                assert show()["text"] == "My sister keeps three bees."


def test_no_key_sees_anothers_memories(live: Any) -> None:
    live.memory("secret", "ann", diary="The key lies under the seventh stone.")
    live.memory("own", "ann")
    live.memory("secret", "bob", diary="Bob likes plums.")
    for path in ("/v1/memories", "/v1/memories/secret", "/v1/memories/secret/export"):
        text = live.http("bob").get(path).text
        assert "seventh" not in text and "ann" not in text
    found = live.http("bob").post("/v1/memories/secret/search", json={"query": "key stone plums"}).json()["data"]
    assert [each["text"] for each in found] == ["Bob likes plums."]
    with pytest.raises(openai.NotFoundError):
        live.client("bob").chat.completions.create(model="tiny", messages=HELLO, extra_body={"memory_id": "own"})
    for headers in ({}, {"Authorization": "Bearer none"}, {"Authorization": f"Basic {live.keys['ann']}"}):
        refused = httpx.get(live.url + "/v1/memories", headers=headers)
        assert refused.status_code == 401 and refused.headers["WWW-Authenticate"] == "Bearer"


def test_lines_of_a_file_become_documents_whose_names_are_no_paths(live: Any) -> None:
    place = f"/v1/memories/{live.memory('files')}"
    content = b'{"text": "The boat is called Petrel."}\n{"text": "Two."}\n'
    answer = live.http().post(f"{place}/files", files={"file": ("../../etc/c.jsonl", content)})
    assert answer.status_code == 201 and [each["name"] for each in answer.json()["data"]] == ["c.jsonl:1", "c.jsonl:2"]
    assert live.http().get(f"{place}/documents/c.jsonl:1").json()["text"] == "The boat is called Petrel."


# limits and refusals


def test_the_documentation_has_every_call(live: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "server.md").read_text()
    names = {"{memory}": "ID", "{document}": "NAME", "{response}": "ID", "{model_id}": "NAME"}
    for path in httpx.get(live.url + "/openapi.json").json()["paths"]:
        for given, told in names.items():
            path = path.replace(given, told)
        assert f"{path}`" in page, path


def test_the_page_finds_its_elements_and_puts_texts_in_as_text(live: Any) -> None:
    page = httpx.get(live.url)
    assert "default-src 'self'" in page.headers["content-security-policy"] and "innerHTML" not in page.text
    there, used = (set(re.findall(form, page.text)) for form in (r'\bid="([\w-]+)"', r'\$\("([\w-]+)"\)'))
    assert used <= there and len(used) > 10


def test_models_health_metrics_and_methods(live: Any) -> None:
    client, http = live.client(), live.http()
    assert [model.id for model in client.models.list()] == ["tiny"] == [client.models.retrieve("tiny").id]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert httpx.get(live.url + "/health").json()["status"] == "ok"
    assert http.head("/health").status_code == http.head("/").status_code == 200
    wrong = http.put("/v1/models")
    assert wrong.status_code == 405 and "error" in wrong.json() and "GET" in wrong.headers["allow"]
    asked = http.options("/v1/models", headers={"Origin": "http://x", "Access-Control-Request-Method": "GET"})
    assert not [header for header in asked.headers if header.startswith("access-control")]
    live.chat(max_tokens=1)
    text = http.get("/metrics").text
    assert 'longmem_requests_total{path="/v1/chat/completions",status="200"}' in text and "longmem_queue" in text


IMAGE: Any = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
LONG: Any = {"role": "user", "content": "x" * (32 * 256)}


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        (CHAT, {"content": b"{"}, 400, "body: it must be a JSON object, sent with Content-Type: application/json"),
        (CHAT, {"content": b"[]"}, 400, "body: it must be a JSON object, sent with"),
        (CHAT, {"json": {"messages": [IMAGE]}}, 400, "messages.0.content.0.type: Input should be 'text', 'input_"),
        (CHAT, {"json": {"messages": HELLO, "top_logprobs": 2}}, 400, "body: Value error, top_logprobs needs logpr"),
        (CHAT, {"json": {"messages": HELLO, "remember": True}}, 400, "remember needs memory_id: what is kept must"),
        (CHAT, {"json": {"messages": HELLO, "memory_id": "../x"}}, 400, "memory_id: String should match pattern"),
        (CHAT, {"json": {"messages": HELLO}, "headers": {"X-Memory-Id": "../x"}}, 400, "header.X-Memory-Id: String"),
        (CHAT, {"json": {"messages": [LONG]}}, 400, "the prompt has 8,209 tokens, 8,192 are the most; add the text"),
        (CHAT, {"content": b"x" * (9 << 20)}, 413, "the body must say its length, and be of at most 8,388,608"),
        ("/v1/responses", {"json": {"input": [{"type": "x"}]}}, 400, "input.0.role: Field required"),
        ("/v1/completions", {"json": {"prompt": []}}, 400, "body: Value error, prompt must be a text, or 1 to 64"),
        ("/v1/memories", {"json": {"id": "~responses"}}, 400, "id: String should match pattern"),
        ("/v1/memories", {"json": {"id": "there"}}, 409, "you have a memory 'there' already"),
        (FILES, {"files": {"file": ("a.txt.gz", b"x")}}, 400, "files of these kinds are read: .txt, .md,"),
        (FILES, {"files": {"file": ("a.txt", b"\xff\xfe\xfa")}}, 400, "the file holds no text in UTF-8, or"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusals_say_what_is_wrong_and_where(live: Any, path: str, body: Any, status: int, says: str) -> None:
    live.http().post("/v1/memories", json={"id": "there"})
    answer = live.http().post(path, **body)
    problem = answer.json()["error"]
    assert answer.status_code == status and problem["type"] == "invalid_request_error"
    assert problem["message"].startswith(says)


def test_null_is_what_was_left_open(live: Any) -> None:
    names = "temperature top_p n stream stop seed logprobs stream_options memory_id remember recall explain echo store"
    nulls = dict.fromkeys(names.split())
    for path, body in (
        (CHAT, {"messages": HELLO, "max_tokens": 2, "stop": ["", "a", "b", "c", "d"]}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 1, "logprobs": 0}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 1, "instructions": None}),
    ):
        assert live.http().post(path, json={**nulls, **body}).status_code == 200


def test_messages_that_a_model_cannot_be_given_are_refused(
    live: Any, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(openai.BadRequestError, match=r"refuses these messages \(roles must alternate\)"):
        live.chat(max_tokens=1)


def test_without_keys_only_names_of_this_machine_are_answered(start: Any, tmp_path: Path) -> None:
    with start(tmp_path, anybody=True) as live:
        assert httpx.get(live.url + "/v1/memories").status_code == 200
        assert httpx.get(live.url + "/v1/memories", headers={"Host": "evil.example:80"}).status_code == 403


def test_a_failure_in_a_stream_is_an_event_and_ends_the_others(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begins, fails = iter([Engine._generate]), Mock(side_effect=OSError("/secret/path"))
    monkeypatch.setattr("longmem.server.engine.SLICE", 3)
    monkeypatch.setattr(Engine, "_generate", lambda *given: next(begins, fails)(*given))
    with pytest.raises(openai.APIError, match="something went wrong") as told:
        list(live.chat(n=3, max_tokens=30, stream=True))
    assert "secret" not in str(told.value)
    monkeypatch.undo()
    assert live.chat(max_tokens=2).choices


def test_a_request_that_takes_too_long_is_given_up(start: Any, tmp_path: Path) -> None:
    with start(tmp_path, seconds=0.5, rows=1) as live:
        body = {"messages": HELLO, "max_tokens": 50_000, "temperature": 0}
        for _ in range(2):  # one row that is never freed would be given way to, two would make one wait
            assert live.http().post(CHAT, json=body).status_code == 504
        idle(live)
        for _ in range(2):
            streamed = live.http().post(CHAT, json={**body, "stream": True})
            assert "given up" in streamed.text.splitlines()[-2]
        idle(live)


def test_nobody_waits_for_a_long_answer_and_a_client_that_leaves_frees_its_row(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longmem.server.engine.SLICE", 1 << 20)  # it gives way, not because a slice is done
    with start(tmp_path, rows=1) as live:
        body = {"messages": HELLO, "max_tokens": 100_000, "temperature": 0}
        for turn in range(2):
            with live.http().stream("POST", CHAT, json={**body, "stream": True}) as answer:
                long, began = answer.iter_text(), time.monotonic()
                assert next(long) and live.chat(max_tokens=3).choices
                live.memory(f"meanwhile-{turn}", boat=BOAT)
                assert next(long) and time.monotonic() - began < 10, "it goes on, and took a minute alone"
        idle(live)
        request = live.http().build_request("POST", CHAT, json=body)
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        for _ in range(3):  # before its first token
            with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2]))) as client:
                client.sendall(f"POST {CHAT} HTTP/1.1\r\n{head}\r\n".encode() + request.content)
                time.sleep(0.1)
        idle(live)


def idle(live: Any) -> None:
    """An answer comes soon: no row is held, and none waits."""
    began = time.monotonic()
    live.chat(max_tokens=2)
    assert time.monotonic() - began < 20
    assert httpx.get(live.url + "/health").json()["waiting"] == 0
