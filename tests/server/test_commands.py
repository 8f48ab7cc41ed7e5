"""``longmem chat`` as a script of lines, and what ``longmem serve`` refuses."""

import importlib.util
import io
import socket
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from tests.calling import Command, Done

from longmem import TrainingFree
from longmem.chat import NOTES, PlainTexts, Recall, chat_prompt
from longmem.errors import BackboneError
from longmem.modeling import loading as defaults


@pytest.fixture
def longmem(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """``longmem("chat", ..., lines=[...])`` in an empty folder, where note.txt is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "note.txt").write_text("The cellar door is green.")

    def call(*arguments: object, lines: tuple[str, ...] = ()) -> Done:
        typed = "".join(line + "\n" for line in lines).encode(errors="surrogateescape")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
        return command(*arguments)

    return call


def test_without_a_model_chat_takes_the_default_one_again_and_says_where_it_cannot_be_had(
    longmem: Command, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, gates = pair.parent / "backbone", tmp_path / "gates"
    TrainingFree.from_backbone(backbone, fusion="token", chunk_size=4, num_retrieved=8).save_pretrained(gates)
    problem = BackboneError("the default model cannot be fetched (no network); name another one")
    found = Mock(side_effect=[defaults.DefaultModel(gates, backbone)] * 2 + [problem] * 2)
    monkeypatch.setattr(defaults, "default_model", found)
    monkeypatch.setattr(defaults, "default_checkpoint", lambda layout: gates)
    for _ in range(2):  # the second time in the store that the first one made
        assert longmem("chat", "-m", "2", lines=("Hello.",)).status == 0
    for command in (("chat", "--memory", "new"), ("serve", "--store", "new")):
        assert longmem(*command).error == str(problem)
    assert not (tmp_path / "new").exists()


def test_chat_remembers_across_two_runs_and_forgets(longmem: Command, pair: Path) -> None:
    talk = ("chat", pair, "-n", "ann", "-m", "3")
    lines = ("My sister keeps three bees.", "/remember note.txt", "/forget nothing", "/why", "/quit", "never")
    status, _, told = longmem(*talk, lines=lines)
    assert status == 0 and "namespace ann: 0 documents" in told and "error: " in told
    status, out, told = longmem(*talk, lines=("How many bees has my sister?", "/why", "/memories"))
    assert status == 0 and "namespace ann: 2 documents" in told
    assert "sister keeps three bees" in out and "note.txt  25 tokens" in out
    kept = [line.split()[0] for line in out.splitlines() if line.startswith("chat-")]
    assert len(kept) == 2 and "never" not in out
    forgetting = [f"/forget {name}" for name in (*kept, "note.txt")]
    status, out, told = longmem(*talk, "--no-keep", lines=(*forgetting, "Any bees?", "/why", "/memories", "/help"))
    assert out.count("forgot ") == 3 and "the last answer read no memory" in out and "/remember FILE" in out
    longmem("chat", pair, "-n", "bob", "-m", "2", lines=("Plums.",))
    _, out, told = longmem(*talk, lines=("Pl\udcffms?", "/why"))  # nothing was kept, and bob is another
    assert "namespace ann: 0 documents" in told and "the last answer read no memory" in out


def test_a_model_without_trained_gates_gets_passages_alone(longmem: Command, pair: Path) -> None:
    plain = ("chat", pair.parent / "backbone", "-m", "3")
    _, out, told = longmem(*plain, lines=("/remember note.txt", "Is the cellar door green?", "/why"))
    assert "has no trained gates, so memory reaches it as passages" in told and "longmem calibrate" in told
    assert "passage  note.txt: The cellar door is green." in out and "heads" not in out
    _, out, told = longmem("chat", pair, "-m", "3", lines=("Is the cellar door green?", "/why"))
    assert "no trained gates" not in told and "heads    note.txt" in out


def test_a_plain_prompt_begins_as_texts_in_training_do_and_passages_stand_below_the_system(byte_tokenizer: Any) -> None:
    talk = [{"role": role, "content": role[:2]} for role in ("system", "user", "assistant", "user")]
    recall = Recall(PlainTexts({"note": "us: the boat"}), "")
    told = byte_tokenizer.decode(chat_prompt(byte_tokenizer, talk, recall=recall).ids)
    assert told.startswith("System: sy\n\n") and "us: the boat\nUser: us" in told
    told = byte_tokenizer.decode(chat_prompt(byte_tokenizer, talk[1:2], recall=recall).ids)
    assert told == f"System: {NOTES}\n- us: the boat\nUser: us\nAssistant:"  # no <s>


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--host", "0.0.0.0"), "can be reached by others, and there are no keys; make one with"),
        (("--keys", "bad"), "bad:1: a line is a name and a hash"),
        (("--keys", "none"), "none: no key in it; make one with longmem serve --keys none --new-key NAME"),
        (("--keys", "missing"), "missing: there is no such file"),
        (("--new-key", "ann"), "name it with --keys"),
        (("--keys", "bad2", "--new-key", "../x"), "is no name for a key"),
        (("--keys", "good", "--new-key", "ann"), "has a key named ann"),
        (("--model", "no-such-model", "--port", "TAKEN"), "choose another --port"),
    ],
)
def test_serve_refuses(longmem: Command, tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    (tmp_path / "bad").write_text("ann 1234\n")
    (tmp_path / "none").write_text("# nobody\n")
    (tmp_path / "good").write_text(f"ann {'0' * 64}\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert said in longmem("serve", *(port if option == "TAKEN" else option for option in options)).error


def test_serve_names_what_is_missing(longmem: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else there(name))
    assert longmem("serve").error == "the server needs uvicorn; pip install 'longmem-lm[server]'"
