"""Tokenizer, token cache, and documents one by one: which tokens are scored and which text they stand for."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from longmem.data.text import Document, TextSource
from longmem.data.tokens import TokenCorpus, first_text, load_tokenizer, tokenize, tokenize_documents, train_tokenizer
from longmem.errors import DataError


def test_a_learned_tokenizer_gives_every_text_back_after_saving(tmp_path: Path, made_text: Callable[..., str]) -> None:
    train_tokenizer([made_text(500)], 300).save_pretrained(str(tmp_path))
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == 300
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    for text in ("  \\alpha\n\t x", "naïve 漢字 🙂", made_text(50, seed=3)):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_cache_is_used_while_text_and_tokenizer_are_the_same(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in ("a", "ab"), ("b", "é x"):
        (tmp_path / f"{name}.txt").write_text(text)
    source, cache = TextSource((str(tmp_path),)), tmp_path / ".cache"
    first, end = tokenize(source, byte_tokenizer, cache), byte_tokenizer.eos_token_id
    for number, text in enumerate(("ab", "é x")):
        assert first.document(number).tolist() == [*byte_tokenizer(text)["input_ids"], end]
    with monkeypatch.context() as patch:
        patch.setattr(TokenCorpus, "from_parts", None)
        again = tokenize(source, byte_tokenizer, cache)
    assert isinstance(again.ids, np.memmap) and again.ids.tolist() == first.ids.tolist()
    assert again.bounds.tolist() == [0, 3, 8]
    assert (again.names, again.fingerprint) == (("a.txt", "b.txt"), first.fingerprint)
    (file,) = cache.rglob("ids.npy")
    file.write_bytes(file.read_bytes()[:-6])
    with pytest.raises(DataError, match=r"damaged token cache \(.*\); delete the folder"):
        tokenize(source, byte_tokenizer, cache)
    (tmp_path / "a.txt").write_text("other text")
    assert tokenize(source, byte_tokenizer, cache).document(0).tolist() != first.document(0).tolist()


def test_a_beginning_has_the_tokens_of_the_whole_text(
    byte_tokenizer: PreTrainedTokenizerFast, made_text: Callable[..., str]
) -> None:
    learned = train_tokenizer([made_text(3000)], 400)
    for text in (made_text(3000, 1), made_text(3000, 2).replace(" ", ""), "漢字" * 4000, " " * 9000 + "x"):
        for tokenizer in (learned, byte_tokenizer):
            whole = tokenizer(text, verbose=False)["input_ids"]
            for count in (1, 7, 200, 1000, len(whole)):
                first = first_text(text, tokenizer, count)
                assert text.startswith(first)
                assert tokenizer(first, verbose=False)["input_ids"][:count] == whole[:count]
    assert len(first_text(made_text(3000, 1), learned, 100)) < 5000, "the rest is not tokenised"


# documents one by one

TEXT = "Häuser am Fluss, und Fluss am Haus. " * 8
TOKENIZER = train_tokenizer([TEXT], 300)


@pytest.mark.parametrize("most", [None, 40])
def test_words_and_bytes_are_those_of_the_scored_tokens(most: int | None) -> None:
    (found,) = tokenize_documents([Document("a", TEXT, "")], TOKENIZER, max_tokens=most)
    assert found.ids.tolist() == TOKENIZER(TEXT).input_ids[:most]
    scored = TOKENIZER.decode(found.ids[1:])  # nothing precedes the first token
    assert (found.words, found.bytes) == (len(scored.split()), len(scored.encode()))


def test_a_project_is_the_name_up_to_the_separator_or_the_document_itself() -> None:
    names = ["test/clowder__02-sets.tex", "test/clowder__03.tex", "a/plain.txt", "b/plain.txt"]
    documents = [Document(name, TEXT, "") for name in names]
    for separator, groups, projects in (
        (None, [None] * 4, ["clowder", "clowder", "a/plain.txt", "b/plain.txt"]),
        ("/", ["test", "test", "a", "b"], ["test", "test", "a", "b"]),
    ):
        found = tokenize_documents(documents, TOKENIZER, group_separator=separator)
        assert [(each.group, each.project) for each in found] == list(zip(groups, projects, strict=True))
