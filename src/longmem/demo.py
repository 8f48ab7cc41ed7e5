"""``longmem demo``: a trained pair remembers texts that it has never seen, and everything is measured on them."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longmem.data.python_source import package_text
from longmem.data.text import read_documents
from longmem.errors import DataError
from longmem.evaluation.documents import tokenize_documents
from longmem.evaluation.loading import has_memory, load_comparison, load_tokenizer
from longmem.evaluation.perplexity import PerplexitySettings, perplexity
from longmem.evaluation.results import write_json
from longmem.evaluation.task import numbered
from longmem.generation.page import Passages, ReadToken, log_probabilities, page, read_tokens, reading_at
from longmem.store import MemoryStore

DEFAULT_TEXTS = ("http", "email")
"""Packages of the standard library; the shipped pair has not been trained on them."""
NAMESPACE = "demo"
MAX_TOKENS = 8_192
MEMORY_SIZES = (1024, 8_192)
PROMPT, NEW = 96, 64
"""Tokens of the prompt, and of its continuation."""


@dataclass(frozen=True)
class Demo:
    """What the demo made.

    Attributes:
        store: folder of the memory store, for further use.
        tokens: in the store.
        perplexity: with and without memory, also in ``perplexity.json``.
        document: the text that is continued.
        prompt: its first tokens after the part that was remembered.
        real: what follows the prompt in the text.
        with_memory: what the model writes after the prompt, greedily.
        without: the same with memory off.
        read: for each token of ``real``, what memory did to it and what was read.
        page: the HTML file that shows ``read``.
    """

    store: Path
    tokens: int
    perplexity: dict[str, Any]
    document: str
    prompt: str
    real: str
    with_memory: str
    without: str
    read: list[ReadToken]
    page: Path


@dataclass(frozen=True)
class _Text:
    id: str
    text: str
    rest: str = ""


def shipped_model() -> Path:
    """The pair that comes with the source tree.

    Raises:
        DataError: this is an installation without it.
    """
    folder = Path(__file__).parents[2] / "models" / "small" / "sidenet"
    if not (folder / "config.json").exists():
        raise DataError(
            "no model here: the trained pair is in models/small of the source tree, not in the installed package; run "
            "the demo there, or name the folder or hub id of a LongMem with --model"
        )
    return folder


def find_texts(names: Sequence[str]) -> list[_Text]:
    """Texts of files, folders, archives, or packages of this Python; equal names get numbers.

    Raises:
        DataError: a name is none of these.
    """
    libraries = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")]
    found = []
    for name in names:
        if not name or Path(name).exists() or any(sign in name for sign in "/*:"):
            found += [(document.id, document.text) for document in read_documents([name])]
            continue
        places = ((top, library) for library in libraries for top in (library / name, library / f"{name}.py"))
        text = next((text for top, library in places if top.exists() and (text := package_text(top, library))), None)
        if text is None:
            raise DataError(f"{name}: neither a file nor a package of this Python; name a text file, or say e.g. json")
        found.append((name, text))
    ids = numbered([name for name, _ in found])
    return [_Text(name, text) for name, (_, text) in zip(ids, found, strict=True)]


def run_demo(
    out: Path,
    texts: Sequence[str] = DEFAULT_TEXTS,
    *,
    model: str | Path | None = None,
    max_tokens: int = MAX_TOKENS,
    say: Callable[[str], object] = print,
) -> Demo:
    """Remember the beginnings of texts, measure on them, and continue the first of them.

    Args:
        out: folder for the store, the texts, ``perplexity.json`` and ``memory.html``.
        texts: see ``find_texts``.
        model: folder or hub id of a LongMem; None is the shipped one.
        max_tokens: of each text that are remembered and measured.
        say: called with one line for each step.

    Raises:
        LongMemError: a text or the model is missing, or a text is too short.
    """
    named, path = find_texts(texts), str(model or shipped_model())
    loaded = load_comparison(path, memory_sizes=MEMORY_SIZES if has_memory(path) else None)
    longmem: Any = loaded.comparison.main
    if longmem is None:
        raise DataError(f"{loaded.model} is no LongMem; name the folder of a SideNet with --model")
    tokenizer, window = load_tokenizer(loaded.tokenizer, loaded.comparison.model), loaded.default_window()
    kept = [_beginning(text, tokenizer, max_tokens) for text in named]
    # the memories of another model are kept in another store
    place = out / f"memory-{longmem.fingerprint[:8]}"
    with MemoryStore.open(place, model=longmem, tokenizer=tokenizer) as store:
        for text in kept:
            file = out / "text" / text.id
            file.parent.mkdir(parents=True, exist_ok=True)
            (file if file.suffix else file.with_suffix(".txt")).write_text(text.text + text.rest, encoding="utf-8")
            receipt = store.add_document(NAMESPACE, text.text, name=text.id, replace=True)
            say(f"{text.id}: {receipt.tokens:,} tokens remembered in {place}")
        prompt, real, made, read = _continued(longmem, tokenizer, store, kept[0])
        tokens = store.stats().tokens
    documents = tokenize_documents(kept, tokenizer)
    say(f"measuring {sum(document.scored for document in documents):,} tokens with every system")
    result = perplexity(
        loaded.comparison,
        documents,
        PerplexitySettings(window=window),
        command="longmem demo",
        config={"model": loaded.model, "texts": list(texts), "max_tokens": max_tokens},
    )
    write_json(out / "perplexity.json", result)
    note = f"The tokens are those that follow the prompt in {kept[0].id}; the text before the prompt is in memory."
    html = page(loaded.model, f"memory: {tokens:,} tokens of {', '.join(t.id for t in kept)}", prompt, read, [note])
    (out / "memory.html").write_text(html, encoding="utf-8")
    return Demo(place, tokens, result, kept[0].id, prompt, real, made[0], made[1], read, out / "memory.html")


def _beginning(document: _Text, tokenizer: Any, most: int) -> _Text:
    """What is remembered, and what comes next: at least a prompt and its continuation."""
    encoded = tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = encoded["offset_mapping"]
    kept = min(most, len(spans) - PROMPT - NEW)
    if kept < PROMPT:
        raise DataError(
            f"{document.id}: {len(spans)} tokens are too few to remember and to continue; it needs {2 * PROMPT + NEW}"
        )
    cut = spans[kept][0]
    return _Text(document.id, document.text[:cut], document.text[cut:])


@torch.no_grad()
def _continued(
    model: Any, tokenizer: Any, store: MemoryStore, text: _Text
) -> tuple[str, str, list[str], list[ReadToken]]:
    """The prompt, what follows it, what the model writes with and without memory, and what memory did."""
    start = text.rest[: 40 * (PROMPT + NEW)]
    ids = tokenizer(start, add_special_tokens=False, return_tensors="pt").input_ids[:, : PROMPT + NEW]
    bank = store.bank(NAMESPACE)
    made, scores = [], []
    for memory in (bank, None):
        new = model.generate(
            ids[:, :PROMPT],
            attention_mask=torch.ones(1, PROMPT, dtype=torch.long),
            memory=memory,
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        made.append(tokenizer.decode(new[0, PROMPT:], skip_special_tokens=True))
        out = model(ids[:, :-1], memory=memory, explain=memory is not None)
        scores.append(log_probabilities(out.logits[0, PROMPT - 1 :], ids[0, PROMPT:]))
        if memory is not None:
            readings = [reading_at(out.explanation, place) for place in range(PROMPT - 1, ids.shape[1] - 1)]
    passages = Passages(tokenizer, lambda origin: store.token_ids(NAMESPACE, origin.document or ""))
    before, after = ids[0, :PROMPT].tolist(), ids[0, PROMPT:].tolist()
    gains = (scores[0] - scores[1]).tolist()
    read = read_tokens(after, before, gains, readings, tokenizer, passages)
    return tokenizer.decode(before), tokenizer.decode(after), made, read
