"""``longmem generate``: what it continues, what it reads, what it shows, what it keeps."""

import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.calling import Command
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from longmem import LongMem

PROMPT = "a key for the old map, and no answer from the seven stones"  # longer than the window of 32


@pytest.fixture
def generate(command: Command, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """``generate("a prompt", "-m", 5)`` with the LongMem of the fixtures, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *given, model=models / "side": command("generate", model, *given, "--device", "cpu")


def test_it_says_what_generate_says_to_a_prompt_from_anywhere_with_the_model_that_is_named(
    generate: Command, models: Path, tmp_path: Path, piped: Callable[[bytes], None]
) -> None:
    asked = (PROMPT, "-m", 40, "--ignore-end")
    done = generate(*asked)
    model = LongMem.from_pretrained(models / "side" / "final")
    tokenizer = AutoTokenizer.from_pretrained(models / "backbone")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    whole = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=1)
    text = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    assert (done.status, done.out) == (0, text + "\n") and text
    again = generate(*asked, "--json").json
    assert again["text"] == text and again["ids"] == whole[0, ids.shape[1] :].tolist()
    assert again["memory"]["session_tokens"] == 64  # the model's memory_size: more has left the window
    less = generate(*asked, "--set", "memory_size=32", "--json").json
    assert less["memory"]["session_tokens"] == 32
    shutil.copytree(models / "backbone", tmp_path / "home")
    assert generate(*asked, "--backbone", tmp_path / "home") == done
    assert generate(*asked, "--dtype", "bfloat16").status == 0
    assert generate(*asked, model=models / "backbone").status == 0  # a causal language model by itself
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    assert generate("--file", "prompt.txt", *asked[1:]) == done
    piped(PROMPT.encode())
    assert generate("-", *asked[1:]) == done
    piped(b"caf\xe9")
    assert "standard input: not UTF-8 text (byte 0xe9 at offset 3); convert it" in generate().error


def test_it_reads_the_documents_of_a_store_and_texts_of_its_own_and_shows_it(
    generate: Command, filled: Path, tmp_path: Path
) -> None:
    (tmp_path / "more.txt").write_text("the gate opens at dawn " * 3)
    asked = (PROMPT, "-m", 6, "--ignore-end", "--memory", filled, "-n", "ada", "--read", "more.txt")
    done = generate(*asked, "--json", "--page", "page.html")
    assert done.status == 0 and "read 69 tokens of more.txt" in done.err and "wrote page.html" in done.err
    memory = done.json["memory"]
    assert memory["read"] == {"more.txt": 69} and memory["namespace"] == "ada" and memory["store_tokens"] > 300
    assert len(done.json["tokens"]) == 6
    texts = {"more.txt": "the gate opens at dawn " * 3, "(this text)": PROMPT + done.json["text"]}
    texts |= {name: (tmp_path / "notes" / name).read_text() for name in ("one.txt", "two.md", "inner/three.txt")}
    for token in done.json["tokens"]:
        assert 0 < token["share"] < 1 and token["found"]
        assert sum(each["share"] for each in token["found"]) <= token["share"] + 1e-6
        for each in token["found"]:
            assert each["before"] + each["text"] + each["after"] in texts[each["document"]]
    page = json.loads((tmp_path / "page.html").read_text().split('id="data">')[1].split("</script>")[0])
    assert page["prompt"] == PROMPT and page["tokens"] == done.json["tokens"]
    assert page["memory"] == f"memory: {memory['store_tokens']} tokens of the namespace ada, 69 tokens of more.txt"
    *_, head, first, _, _, _, _, last = generate(*asked, "--explain").out.splitlines()
    assert head.split() == ["token", "nats", "memory", "read"]
    assert all("%" in line and ":" in line for line in (first, last))


def test_passages_of_the_store_are_read_once_more_and_prompt_and_answer_kept(
    generate: Command, filled: Path, memory: Command, models: Path
) -> None:
    there = (filled.parent / "notes" / "one.txt").read_text().splitlines()[0].split(". ")[0]
    asked = (there, "-m", 4, "--memory", filled, "-n", "ada", "--json", "--ignore-end")
    before = memory("list", "--json").json
    plain = generate(*asked).json
    assert memory("list", "--json").json == before and plain["memory"]["recalled"] == []
    done = generate(*asked, "--recall", 2, "--keep", "Zoë")
    assert done.status == 0, done.err
    (first, *_) = found = done.json["memory"]["recalled"]
    assert 1 <= len(found) <= 2 and first["document"] == "one.txt" and there.split()[0] in first["text"]
    assert f"recalled one.txt: {first['text'][:20]}" in done.err
    assert done.json["prompt_tokens"] > plain["prompt_tokens"] and done.json["prompt"] == there
    show = ("show", "Zoë", "-n", "ada")
    assert "open the store with tokenizer=" in memory(*show, "--text").error  # there are only its token ids
    assert memory(*show, "--text", "--tokenizer", models / "backbone").out.startswith(there)
    kept = memory(*show, "--json").json
    assert kept["tokens"] == plain["prompt_tokens"] + 4 and f"kept {kept['tokens']} tokens as Zoë" in done.err
    name = unicodedata.normalize("NFD", "Zoë")
    assert f"has a document {name!r} already" in generate(*asked, "--keep", name).error
    assert generate(*asked, "--recall", 2, "--recall-tokens", 3).json["memory"]["recalled"] == []


def test_sampling_and_windows(generate: Command) -> None:
    def said(*arguments: object) -> str:
        done = generate(PROMPT, "-m", 12, "--ignore-end", *arguments)
        assert done.status == 0, done.err
        return done.out

    greedy = said()
    assert said("--temperature", 0) == said("--top-k", 1) == greedy
    assert said("--temperature", 1.5, "--seed", 1) == said("--temperature", 1.5, "--seed", 1) != greedy
    assert said("--temperature", 1.5, "--seed", 1) != said("--temperature", 1.5, "--seed", 2)
    assert said("--window", 24, "--window-move", 8)


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt_and_another_models_is_refused(
    generate: Command, models: Path, tmp_path: Path
) -> None:
    def saved(name: str, single: str, *tokens: str) -> tuple[str, Path]:
        tokenizer = AutoTokenizer.from_pretrained(models / "backbone")
        special = [("<s>", 0), ("</s>", 2)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
        tokenizer.add_tokens(list(tokens))
        tokenizer.save_pretrained(tmp_path / name)
        return "--tokenizer", tmp_path / name

    done = generate(PROMPT, "-m", 6, "--json", *saved("ending", "<s> $A </s>")).json
    assert done["prompt_tokens"] == len(PROMPT) + 1  # <s> stays, </s> does not
    assert generate(PROMPT, "-m", 6, "--json", *saved("beginning", "<s> $A")).json["ids"] == done["ids"]
    line = generate(PROMPT, *saved("more", "$A", "key")).error
    assert "the prompt has the token id 260, the model knows 260" in line
