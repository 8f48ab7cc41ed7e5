"""Scripts: the mean of SideNets; and makers of chapters, conversations, Python source and a tokenizer."""

import hashlib
import json
import re
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes.average import average
from recipes.data import chapterbreak, conversations, tokenizer
from recipes.data.python import documents_of, write_source
from tests.family_table import tiny_gpt
from transformers import PreTrainedTokenizerFast

from longmem import LongMem
from longmem.data.text import FILE_LINE, package_text, read_documents
from longmem.errors import CheckpointError, DataError
from longmem.evaluation.tasks.conversations import read_dialogues

# average.py


def test_every_weight_is_the_mean_and_the_last_ones_settings_stay(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    def side(seed: int, backbone: int = 0, **settings: Any) -> str:
        """The folder of a SideNet of random weights over a tiny backbone."""
        folder, under = tmp_path / f"side-{seed}", tmp_path / f"backbone-{backbone}"
        tiny_gpt(backbone).save_pretrained(under)
        settings = {"memory_layer": 3, "fusion": "token", "num_retrieved": 8, "chunk_size": seed + 1, **settings}
        model = LongMem.from_backbone(under, **settings)
        torch.manual_seed(seed)
        for parameter in model.sidenet.parameters():
            torch.nn.init.normal_(parameter)
        model.save_pretrained(folder)
        byte_tokenizer.save_pretrained(str(folder))
        return str(folder)

    folders, out = [side(0), side(1)], tmp_path / "mean"
    first, second = (LongMem.from_pretrained(folder).sidenet.state_dict() for folder in folders)
    for shares, gates_of_last, part in (None, False, 0.5), ([1.0, 3.0], True, 0.75):
        average(folders, out, shares, gates_of_last)
        mean = LongMem.from_pretrained(out)
        for name, weight in mean.sidenet.state_dict().items():
            share = 1.0 if gates_of_last and "gate" in name else part
            assert torch.allclose(weight, (1 - share) * first[name] + share * second[name], atol=1e-6), name
        assert mean.config.chunk_size == 2 and (out / "tokenizer.json").is_file()
    for message, other in {"has another backbone": {"backbone": 1}, "layer is 3, that of": {"memory_layer": 1}}.items():
        with pytest.raises(CheckpointError, match=f"side-0: .*{message}"):
            average([folders[0], side(3, **other)], out)


# chapterbreak.py


def words(seed: int, tag: str) -> str:
    """Sentences that no other chapter has."""
    return " ".join(f"{tag}{seed}w{number}{'.' if number % 7 == 6 else ''}" for number in range(400))


def book(tag: str, *headings: str) -> str:
    return "\n\n".join(f"{heading}\n\n{words(n, tag)}" for n, heading in enumerate(headings)) + "\n"


NAMED = ("CHAPTER I", "CHAPTER II.", "CHAPTER III - IN WHICH WE DINE", "Chapter the Fourth", "Chapter V: Home",
         "Stave Six", "CHAPTER TWENTY-ONE", "Book 8", "Letter 9", "Epilogue")  # fmt: skip
MARKED = ("# Begin", "## The Road", "## The Inn", "## Snow", "## A Letter", "## Rain", "# End")
ROMAN = ("I. THE LETTER", "II. The _Boat_", "III. Fog", "IV. Sand", "V. Wreck", "VI. Shore", "VII. Home")
# what only looks like headings: a table of contents, a sentence, and what Project Gutenberg puts around a book
CONTENTS = "\n\n".join(NAMED) + f"\n\n{'-' * 300}\n\n"
START, END = (f"\n\n*** {word} OF THE PROJECT GUTENBERG EBOOK X ***\n\n" for word in ("START", "END"))


def test_an_example_is_a_prefix_the_opening_behind_it_and_five_of_other_chapters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    books, out = tmp_path / "books", tmp_path / "out"
    books.mkdir()
    text = book("a", *NAMED).replace("\n\nChapter V:", "\n\nChapter two was burnt by her aunt.\n\nChapter V:")
    text = f"{book('x', 'CHAPTER 0')}{START}{CONTENTS}{text}{END}{book('y', 'CHAPTER 7')}"
    (books / "long.txt").write_text(text)
    (books / "marked.md").write_text(book("b", *MARKED))
    (books / "roman.txt").write_text(book("d", *ROMAN))
    (books / "short.txt").write_text(book("c", *NAMED[:5]))
    (books / "twice.jsonl").write_text(json.dumps({"text": text}))
    arguments = ["--prefix", "500", "--words", "30", "--per-book", "3"]
    chapterbreak.main([str(books), "--out", str(out), *arguments], standalone_mode=False)
    said = capsys.readouterr()
    assert "chapterbreak_ctx_500.json: " in said.out and said.out.strip().endswith("of 3 books (2 left out)")
    assert "left out: short.txt: 5 chapters of 2,000 characters; 6 are needed" in said.err
    assert "twice.jsonl:1: the same text as long.txt" in said.err
    told = {each["id"]: each["chapters"] for each in json.loads((out / "sources.json").read_text())["books"]}
    assert told == {"long.txt": 10, "marked.md": 7, "roman.txt": 7, "short.txt": 5, "twice.jsonl:1": 10}
    works = json.loads((out / "chapterbreak_ctx_500.json").read_text())["books"]
    assert works.keys() == {"long.txt", "marked.md", "roman.txt"} and len(works["long.txt"]) == 3
    openings = [" ".join(words(number, "a").split()[:30]) for number in range(10)]  # no suffix tells its number
    for example in works["long.txt"]:
        assert set(example) == {"ctx", "pos", "negs"} and 2950 < len(example["ctx"]) <= 3000
        number = openings.index(example["pos"])
        assert text[text.index(example["ctx"]) + len(example["ctx"]) :].startswith(f"\n\n{NAMED[number]}\n")
        assert len({openings.index(negative) for negative in example["negs"]} - {number}) == 5
        assert not any(negative in example["ctx"] for negative in example["negs"])
    # of equal seeds, whatever is beside
    alone = chapterbreak.ChapterBreakSettings(prefix=500, words=30, per_book=3)
    assert chapterbreak.build_chapterbreak([books / "long.txt"], alone)[0]["long.txt"] == works["long.txt"]


def test_headings_of_an_index_beside_an_archive_are_used(tmp_path: Path) -> None:
    settings = chapterbreak.ChapterBreakSettings(prefix=500)
    text = book("a", *(f"the night of {number}" for number in range(1, 10)))  # nothing that could be found
    (tmp_path / "one").write_text(text)
    with tarfile.open(tmp_path / "books.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "one", "test/one.txt")
    headings = [[found.start(), 1, found.group()] for found in re.finditer(r"the night of \d", text)]
    headings[0][2] = headings[0][2].replace(" ", "\u2028", 1)  # no line ends there
    record = {"id": "one", "sha256": hashlib.sha256(text.encode()).hexdigest(), "headings": headings}
    with pytest.raises(DataError, match=r"test/one\.txt: 0 chapters"):
        chapterbreak.build_chapterbreak([tmp_path / "books.tar.xz"], settings)
    (tmp_path / "index.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    _, (made,) = chapterbreak.build_chapterbreak([tmp_path], settings)
    assert (made["id"], made["headings"], made["chapters"]) == ("test/one.txt", "index", 9)


# conversations.py


def test_every_answer_was_said_in_its_evidence_and_before_the_last_session(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, counts = tmp_path / "made" / "talk.json", Counter[int]()
    conversations.main(["--out", str(out), "--seed", "3"], standalone_mode=False)
    assert "10 conversations, 260 questions" in capsys.readouterr().out
    samples = json.loads(out.read_text())
    assert samples == conversations.make_conversations(seed=3) != conversations.make_conversations(seed=1)
    assert [len(made.sessions) for made in read_dialogues(out).items] == [6] * 10
    for sample in samples:
        talk = sample["conversation"]
        spoken = {turn["dia_id"]: turn for part in talk.values() if isinstance(part, list) for turn in part}
        for question in sample["qa"]:
            category, evidence = question["category"], question["evidence"]
            counts[category] += 1
            said = " ".join(spoken[where]["text"] for where in evidence)
            sessions = [int(where[1:].split(":")[0]) for where in evidence]
            assert max(sessions) < 6
            if category in (1, 4):
                assert all(part in said for part in question["answer"].split(", "))
            if category == 1:  # two journeys
                assert len(set(sessions)) == 2
            if category == 2:  # the day of the session, or the day before
                on = talk[f"session_{sessions[0]}_date_time"].split(" on ")[1]
                assert (question["answer"] == on) == ("come back" in question["question"])
            if category == 5:
                assert question["adversarial_answer"] in said and "answer" not in question
                assert all(spoken[where]["speaker"] not in question["question"] for where in evidence)
    assert counts == {4: 80, 5: 80, 2: 60, 1: 20, 3: 20}


# python.py and tokenizer.py


def make_library(folder: Path, *names: str) -> Path:
    for name in names:
        for part in ("__init__", "inner/part", "tests/test_it"):
            file = folder / name / f"{part}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"# of {name}\n" + f"def {name}_{part[-2:]}(): pass\n" * 60)
    return folder


def test_packages_are_cut_between_files_and_held_out_ones_are_in_no_other_split(tmp_path: Path) -> None:
    files = [f"{FILE_LINE}p/{n}.py\n" + "x = 1\n" * 20 + "\n" for n in range(9)]
    parts = dict(documents_of("p", "".join(files), longest=3 * len(files[0])))
    assert list(parts) == ["p-00", "p-01", "p-02"] and "".join(parts.values()) == "".join(files)
    assert list(dict(documents_of("p", "".join(files)))) == ["p"]
    few = documents_of("p", "".join(files), longest=len(files[0]), most=len("".join(files)) // 3)
    assert list(dict(few)) == ["p-00", "p-03", "p-06"]

    stdlib = make_library(tmp_path / "stdlib", "alpha", "email", "http", "asyncio")
    site: Any = make_library(tmp_path / "site", "numpy", "click", "accelerate", "unheard_of")
    written = write_source(tmp_path / "out", stdlib=stdlib, site=site)
    found = {split: list(read_documents([tmp_path / "out" / f"{split}.jsonl"])) for split in written}
    assert {split: [document.id for document in some] for split, some in found.items()} == {
        "train": ["stdlib__alpha", "packages__numpy"],
        "valid": ["stdlib__asyncio", "packages__accelerate"],
        "test": ["stdlib__email", "stdlib__http", "packages__click"],
    }
    assert found["test"][0].text == package_text(stdlib / "email", stdlib) and "test_it" not in found["test"][0].text


def test_the_tokenizer_is_learned_from_equal_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("aaaa bbbb " * 5000)
    (tmp_path / "b.txt").write_text("def zzzz(): " * 5000)
    out, texts = tmp_path / "tokenizer", [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    monkeypatch.setattr(sys, "argv", ["x", *texts, "--vocab-size", "270", "--bytes-each", "2000", "--out", str(out)])
    tokenizer.main()
    vocabulary = json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(vocabulary) == 270 and any("z" in token and len(token) > 1 for token in vocabulary)
    assert {"zzzz", "aaaa"} & {token.strip("Ġ") for token in vocabulary}
