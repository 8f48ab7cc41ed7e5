"""``longmem generate``: what it continues, what it reads, what it shows, what it keeps, what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.calling import Done, Memory
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoTokenizer

from longmem import LongMem
from longmem.cli import main as frame
from longmem.generation import LocalWindow

PROMPT = "a key for the old map, and no answer from the seven stones"  # longer than the window of 32


@pytest.fixture
def generate(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """``generate("a prompt", "-m", 5)`` with the LongMem of the fixtures, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, model: object = models / "side") -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            frame.main(["generate", str(model), *map(str, arguments), "--device", "cpu"])
        shown = capsys.readouterr()
        return Done(int(stop.value.code or 0), shown.out, shown.err)

    return call


def test_it_says_what_generate_says(generate: Callable[..., Done], models: Path) -> None:
    done = generate(PROMPT, "-m", 40, "--ignore-end")
    model = LongMem.from_pretrained(models / "side" / "final")
    tokenizer = AutoTokenizer.from_pretrained(models / "backbone")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    whole = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=1)
    text = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    assert (done.status, done.out) == (0, text + "\n") and text
    again = generate(PROMPT, "-m", 40, "--ignore-end", "--json")
    assert again.json["text"] == text and again.json["ids"] == whole[0, ids.shape[1] :].tolist()
    assert again.json["memory"]["session_tokens"] == 64  # the model's memory_size: more has left the window


def test_the_prompt_is_an_argument_a_file_or_standard_input(
    generate: Callable[..., Done], piped: Callable[[bytes], None], tmp_path: Path
) -> None:
    expected = generate(PROMPT, "-m", 8)
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    assert generate("--file", "prompt.txt", "-m", 8) == expected
    for arguments in ((), ("-",)):
        piped(PROMPT.encode())
        assert generate(*arguments, "-m", 8) == expected
    assert "given twice" in generate(PROMPT, "--file", "prompt.txt").err
    assert generate("").error == "the prompt is empty; give it as an argument, in --file, or on standard input"
    assert "nowhere.txt: no such file or folder" in generate("--file", "nowhere.txt").error
    piped(b"caf\xe9")
    assert "standard input: not UTF-8 text (byte 0xe9 at offset 3); convert it" in generate().error
    assert "'caf\\udce9' is not UTF-8 text; convert it" in generate("caf\udce9").err


def test_it_reads_the_documents_of_a_store_and_texts_of_its_own(
    generate: Callable[..., Done], filled: Path, tmp_path: Path
) -> None:
    (tmp_path / "more.txt").write_text("the gate opens at dawn " * 3)
    plain = generate(PROMPT, "-m", 6, "--json").json
    done = generate(
        PROMPT, "-m", 6, "--memory", filled, "-n", "ada", "--read", "more.txt", "--json", "--explain", "--ignore-end"
    )
    assert done.status == 0 and "read 69 tokens of more.txt" in done.err
    memory = done.json["memory"]
    assert memory["read"] == {"more.txt": 69} and memory["namespace"] == "ada" and memory["store_tokens"] > 300
    assert plain["memory"]["store_tokens"] == 0 and plain["tokens"] is None
    assert len(done.json["tokens"]) == 6 and "".join(each["text"] for each in done.json["tokens"])
    for token in done.json["tokens"]:
        assert 0 < token["share"] < 1 and token["found"]
        assert sum(each["share"] for each in token["found"]) <= token["share"] + 1e-6
    found = [each for token in done.json["tokens"] for each in token["found"]]
    texts = {"more.txt": "the gate opens at dawn " * 3, "(this text)": PROMPT + done.json["text"]}
    texts |= {name: (tmp_path / "notes" / name).read_text() for name in ("one.txt", "two.md", "inner/three.txt")}
    for each in found:
        assert each["before"] + each["text"] + each["after"] in texts[each["document"]]


def test_passages_of_the_store_are_read_once_more_and_not_kept(
    generate: Callable[..., Done], filled: Path, memory: Memory
) -> None:
    there = (filled.parent / "notes" / "one.txt").read_text().splitlines()[0].split(". ")[0]
    asked = (there, "-m", 4, "--memory", filled, "-n", "ada", "--json", "--ignore-end")
    plain, done = generate(*asked), generate(*asked, "--recall", 2, "--keep", "talk")
    assert done.status == 0, done.err
    (first, *_) = found = done.json["memory"]["recalled"]
    assert plain.json["memory"]["recalled"] == [] and 1 <= len(found) <= 2
    assert first["document"] == "one.txt" and there.split()[0] in first["text"]
    assert f"recalled one.txt: {first['text'][:20]}" in done.err
    assert done.json["prompt_tokens"] > plain.json["prompt_tokens"] and done.json["prompt"] == there
    kept = memory("show", "talk", "-n", "ada", "--json").json
    assert kept["tokens"] == plain.json["prompt_tokens"] + 4
    assert generate(*asked, "--recall", 2, "--recall-tokens", 3).json["memory"]["recalled"] == []
    assert "need a store; name it with --memory" in generate(there, "--recall", 2).err


def test_what_was_read_is_shown_as_a_table_and_as_a_page(generate: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("</script><b>not markup</b> " * 2)
    done = generate(
        "the <i>prompt</i>", "--read", "more.txt", "-m", 5, "--explain", "--page", "page.html", "--ignore-end"
    )
    assert done.status == 0 and "wrote page.html" in done.err
    lines = done.out.splitlines()
    head = next(number for number, line in enumerate(lines) if line.split() == ["token", "nats", "memory", "read"])
    assert len(lines) - head == 6 and all("more.txt:" in line and "%" in line for line in lines[head + 1 :])
    page = (tmp_path / "page.html").read_text()
    assert page.count("</script>") == 2 and "<b>not markup" not in page
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["prompt"] == "the <i>prompt</i>" and len(data["tokens"]) == 5
    assert data["memory"] == "memory: 54 tokens of more.txt"


def test_sampling_and_windows(generate: Callable[..., Done]) -> None:
    def said(*arguments: object) -> str:
        done = generate(PROMPT, "-m", 12, "--ignore-end", *arguments)
        assert done.status == 0, done.err
        return done.out

    greedy = said()
    assert said("--temperature", 0) == greedy
    assert said("--temperature", 1.5, "--seed", 1) == said("--temperature", 1.5, "--seed", 1) != greedy
    assert said("--temperature", 1.5, "--seed", 1) != said("--temperature", 1.5, "--seed", 2)
    assert said("--top-k", 1) == greedy
    assert said("--window", 24, "--window-move", 8, "--window-overlap", 8)
    assert "window (300) must not exceed the backbone's 32 positions" in generate(PROMPT, "--window", 300).error
    assert "leave out --endless" in generate(PROMPT, "--endless", "--explain").err


def test_prompt_and_answer_are_kept_only_when_asked(
    generate: Callable[..., Done], memory: Memory, filled: Path, models: Path
) -> None:
    before = memory("list", "--json").json
    assert generate(PROMPT, "--memory", filled, "-n", "ada", "-m", 5).status == 0
    assert memory("list", "--json").json == before
    done = generate(PROMPT, "--memory", filled, "-n", "ada", "-m", 5, "--keep", "talk", "--ignore-end")
    tokens = len(PROMPT) + 5
    assert done.status == 0 and f"kept {tokens} tokens as talk" in done.err
    kept = [each for each in memory("list", "--json").json["documents"] if each["name"] == "talk"]
    assert [each["tokens"] for each in kept] == [tokens]
    assert "has a document 'talk' already" in generate(PROMPT, "--memory", filled, "-n", "ada", "--keep", "talk").error
    assert "need a store" in generate(PROMPT, "--keep", "talk").err


def test_a_causal_lm_by_itself_reads_memory_untrained(generate: Callable[..., Done], models: Path) -> None:
    done = generate(PROMPT, "-m", 3, "--json", "--explain", "--ignore-end", model=models / "backbone")
    assert done.status == 0 and len(done.json["tokens"]) == 3


def test_the_command_line_says_where_in_a_folder_the_backbone_is_and_in_what_precision(
    generate: Callable[..., Done], models: Path, tmp_path: Path
) -> None:
    shutil.copytree(models / "backbone", tmp_path / "home" / "deep")
    plain = generate(PROMPT, "-m", 8).out
    assert generate(PROMPT, "-m", 8, "--backbone", tmp_path / "home", "--subfolder", "deep").out == plain
    inside = generate(PROMPT, "-m", 8, "--subfolder", "backbone", model=models)
    assert (inside.status, inside.out) == (0, generate(PROMPT, "-m", 8, model=models / "backbone").out)
    assert generate(PROMPT, "-m", 8, "--dtype", "bfloat16").status == 0
    wrong = generate(PROMPT, "--subfolder", "nowhere", model=models)
    assert f"{models}/nowhere" in wrong.error


def test_wrong_names_show_before_a_model_is_loaded(
    generate: Callable[..., Done], filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("longmem.cli.common.load_model", never)
    assert "no memory store here" in generate(PROMPT, "--memory", "nowhere").error
    assert "no namespace 'eve'; there are: ada, bob" in generate(PROMPT, "--memory", filled, "-n", "eve").error


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt(
    generate: Callable[..., Done], models: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "backbone")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.save_pretrained(tmp_path / "ending")
    done = generate(PROMPT, "-m", 6, "--json", "--tokenizer", tmp_path / "ending").json
    assert done["prompt_tokens"] == len(PROMPT) + 1  # <s> stays, </s> does not
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save_pretrained(tmp_path / "beginning")
    assert generate(PROMPT, "-m", 6, "--json", "--tokenizer", tmp_path / "beginning").json["ids"] == done["ids"]
    tokenizer.add_tokens(["key"])
    tokenizer.save_pretrained(tmp_path / "more")
    line = generate(PROMPT, "--tokenizer", tmp_path / "more").error
    assert "the prompt has the token id 260, the model knows 260" in line


def test_endless_generation_ends_when_it_is_interrupted(
    generate: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, calls = LocalWindow.inputs, list[int]()

    def interrupted(self: LocalWindow, ids: Tensor, *more: Any) -> Any:
        calls.append(ids.shape[1])
        if len(calls) == 60:
            raise KeyboardInterrupt
        return inputs(self, ids, *more)

    monkeypatch.setattr(LocalWindow, "inputs", interrupted)
    done = generate(PROMPT, "--endless", "--ignore-end")
    assert done.status == 130 and "interrupted" in done.err
