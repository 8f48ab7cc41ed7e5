"""``longmem demo``: a pair remembers texts that are named."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.calling import Command

import longmem.demo
from longmem import MemoryStore, TrainingFree
from longmem.chat import Reply
from longmem.demo import FACTS, MEMORY_SIZES, NAMESPACE, NEW, PROMPT, TALK, demo_model, find_texts, run_demo
from longmem.errors import BackboneError, DataError
from longmem.modeling.loading import DefaultModel


@pytest.fixture
def side(demo_folder: Path) -> Path:
    return demo_folder / "models" / "small" / "sidenet"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The beginnings of texts that are remembered are short."""
    monkeypatch.setattr(longmem.demo, "MAX_TOKENS", 1500)
    monkeypatch.setattr(longmem.demo, "REAL_TOKENS", 600)


def test_beginnings_are_kept_measured_and_continued(
    demo_folder: Path, side: Path, tmp_path: Path, command: Command
) -> None:
    texts = [demo_folder / "runs" / "demo" / "text" / f"{name}.txt" for name in ("http", "email")]
    done = command("demo", *texts, "--model", side, "--out", tmp_path, "--json")
    assert [line.split(":")[0] for line in done.err.splitlines()[:2]] == ["http.txt", "email.txt"]
    made = done.json
    with MemoryStore.open(made["store"], mode="read", create=False) as store:
        kept = store.text(NAMESPACE, "http.txt")
        assert store.stats().tokens == made["tokens"] == 3000
    whole = texts[0].read_text()
    assert whole == kept + whole[1500:] == (tmp_path / "text" / "http.txt").read_text()
    # the continuation is of what was not remembered
    assert whole[1500:].startswith(made["prompt"])
    assert len(made["prompt"]) == PROMPT and 0 < len(made["read"]) <= NEW
    assert "".join(token["text"] for token in made["read"]) == made["with_memory"]
    assert any(token["found"] and abs(token["gain"]) > 1e-6 for token in made["read"])
    sizes = [f"memory_{size}" for size in MEMORY_SIZES]
    assert set(made["perplexity"]["systems"]) == {"backbone", "memory_off", *sizes}
    assert Path(made["page"]).read_text().startswith("<!doctype html>") and "asked" not in made


@pytest.fixture
def default(demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, byte_tokenizer: Any) -> DefaultModel:
    """In place of the default model: a random backbone with a chat template, and gates of every token."""
    backbone = tmp_path / "default" / "backbone"
    shutil.copytree(demo_folder / "models" / "small" / "backbone", backbone)
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}<s>"
    tokenizer.save_pretrained(backbone)
    sizes = {"chunk_size": 4, "num_retrieved": 8}
    TrainingFree.from_backbone(backbone, fusion="token", **sizes).save_pretrained(tmp_path / "default" / "gates")
    found = DefaultModel(tmp_path / "default" / "gates", backbone)
    monkeypatch.setattr(longmem.demo, "default_model", lambda say: found)
    return found


def test_facts_are_told_asked_for_and_forgotten(
    default: DefaultModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    def reply(model: Any, tokenizer: Any, messages: Any, *, bank: Any = None, recall: Any = None, **how: Any) -> Reply:
        """A model that says again what it has recalled."""
        found = [] if recall is None else recall.search(messages[-1]["content"], 2)
        return Reply(" ".join(each.text for each in found) or "nothing", found, [])

    monkeypatch.setattr(longmem.demo, "reply", reply)
    made = run_demo(tmp_path / "out", ["json"], say=lambda line: None)
    assert set(made["perplexity"]["systems"]) == {"backbone", f"training_free_calibrated_{MEMORY_SIZES[-1]}"}
    assert len(made["asked"]) == FACTS and all(each["without"] == "nothing" for each in made["asked"])
    first = next(each for each in made["asked"] if each["named"])
    assert first["document"] in first["recalled"] and first["value"] in first["told"]
    left = made["forgotten"]
    assert left["question"] == first["question"] and not left["named"]
    with MemoryStore.open(made["store"], mode="read", create=False) as store:
        assert first["document"] not in [each.name for each in store.documents(TALK)]

    # on the command line, with the model itself
    monkeypatch.setattr(longmem.demo, "reply", longmem.chat.reply)
    monkeypatch.setattr(longmem.demo, "FACTS", 2)
    out = command("demo", "--out", tmp_path / "out").out
    for said in (
        "\nwith memory:\n  │",
        "2 facts were told",
        "of 2 with memory, 0 without",
        "read            passages of",
    ):
        assert said in out
    assert out.count("\n    with memory     ") == 2


def test_without_the_registry_the_small_pair_takes_its_place(side: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(say: Any) -> DefaultModel:
        raise BackboneError("it cannot be fetched (no network)")

    monkeypatch.setattr(longmem.demo, "default_model", missing)
    monkeypatch.setattr(longmem.demo, "shipped", lambda name: side)
    said: list[str] = []
    assert demo_model(said.append) == (str(side), None)
    assert said[0].startswith("it cannot be fetched (no network); going on with the pair of 5 million parameters")
    monkeypatch.setattr(longmem.demo, "shipped", lambda name: None)
    with pytest.raises(DataError, match="the small pair is in models/small of the source tree"):
        demo_model(said.append)


def test_texts_are_found_by_name_and_told_apart(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a")
    found = find_texts(["json", *[str(tmp_path / "x.txt")] * 2])
    assert [each.id for each in found] == ["json", "x.txt", "x.txt (2)"]
    assert found[0].text.startswith("# file: json/__init__.py") and found[1].text == "a"


def test_what_cannot_be_shown_is_one_line_and_nothing_is_written(side: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    for text, model, line in (
        (str(tmp_path / "short.txt"), side, rf"short.txt: 11 tokens are too few .* it needs {2 * PROMPT}"),
        ("json", side.parent / "backbone", "backbone reads no memory; name the folder of a LongMem with --model"),
        ("no_such_thing", side, "no_such_thing: neither a file nor a package of this Python"),
    ):
        with pytest.raises(DataError, match=line):
            run_demo(tmp_path / "out", [text], model=model)
    assert not (tmp_path / "out").exists()
