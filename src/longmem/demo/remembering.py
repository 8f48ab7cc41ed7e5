"""``longmem demo``: a trained pair remembers texts that it has never seen.

Each text's beginning goes into a store; then everything is measured and shown on what was read and on what comes next.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longmem.data.python_source import package_text
from longmem.data.text import read_documents
from longmem.demo.page import page, perplexity_rows
from longmem.demo.picture import save_picture
from longmem.demo.reading import Passage, fewest_tokens, most_helped_passage
from longmem.errors import DataError
from longmem.evaluation.perplexity import PerplexityResult, PerplexitySettings, perplexity
from longmem.evaluation.task import numbered
from longmem.modeling.longmem import LongMem
from longmem.store import MemoryStore
from longmem.store.passages import SearchHit

DEFAULT_TEXTS = ("http", "email")
"""Packages of the standard library; the shipped pair has not been trained on them."""
NAMESPACE = "demo"
MAX_TOKENS = 8_192
MEMORY_SIZES = (1024, 8_192)
PROMPT, NEW = 96, 64
"""Tokens of the prompt, and of its continuation."""


@dataclass(frozen=True)
class Continuation:
    """What follows the part of a text that was remembered.

    Attributes:
        prompt: the first tokens of the rest of the text.
        real: what the text goes on with.
        with_memory, without: what the model goes on with, greedily.
        loss_with, loss_without: nats per token of what the text goes on with.
    """

    document: str
    prompt: str
    real: str
    with_memory: str
    without: str
    loss_with: float
    loss_without: float


@dataclass(frozen=True)
class Remembered:
    """What the demo made.

    Attributes:
        store: folder of the memory store, for further use.
        tokens: in the store.
        size: bytes of the store's data files.
        perplexity: also in ``perplexity/perplexity.json``.
        passage: the window that memory helped most, and what each of its tokens found.
        hits: what the heads find for the prompt of the continuation.
        page: the HTML file.
        picture: the PNG file.
    """

    store: Path
    tokens: int
    size: int
    perplexity: PerplexityResult
    passage: Passage
    continuation: Continuation
    hits: list[SearchHit]
    page: Path
    picture: Path


def shipped_model() -> Path:
    """The pair that comes with the source tree.

    Raises:
        DataError: this is an installation without it.
    """
    folder = Path(__file__).parents[3] / "models" / "small" / "sidenet"
    if not (folder / "config.json").exists():
        raise DataError(
            f"{folder}: the shipped pair is not here; name one with --model, or train a small one with --train"
        )
    return folder


def find_texts(names: Sequence[str]) -> list[tuple[str, str]]:
    """(name, text) of files, folders, archives, or packages of this Python.

    Raises:
        DataError: a name is none of these; says so.
    """
    paths = sysconfig.get_paths()
    found: list[tuple[str, str]] = []
    for name in names:
        if not name or Path(name).exists() or any(sign in name for sign in "/*:"):
            found += [(document.id, document.text) for document in read_documents([name])]
            continue
        for library in (Path(paths["stdlib"]), Path(paths["purelib"])):
            top = next((top for top in (library / name, library / f"{name}.py") if top.exists()), None)
            if top is not None and (text := package_text(top, library)):
                found.append((name, text))
                break
        else:
            raise DataError(f"{name}: neither a file nor a package of this Python; name a text file, or say e.g. json")
    return found


def remember(
    out: Path,
    texts: Sequence[str] = DEFAULT_TEXTS,
    *,
    model: Path | None = None,
    max_tokens: int = MAX_TOKENS,
    say: Callable[[str], object] = print,
) -> Remembered:
    """Remember the beginnings of texts, measure on them, and continue one of them.

    Args:
        out: where everything goes.
        texts: see ``find_texts``.
        model: folder of a SideNet; None is the shipped one.
        max_tokens: of each text that are remembered and measured.
        say: told what happens, a line at a time.

    Raises:
        LongMemError: a text or the model is missing, or a text is too short.
    """
    from longmem.evaluation.documents import tokenize_documents
    from longmem.evaluation.loading import has_memory, load_comparison, load_tokenizer

    named = find_texts(texts)
    found = list(zip(numbered([name for name, _ in named]), (text for _, text in named), strict=True))
    path = str(model or shipped_model())
    loaded = load_comparison(path, memory_sizes=MEMORY_SIZES if has_memory(path) else None)
    longmem = loaded.comparison.main
    if longmem is None:
        raise DataError(f"{loaded.model} is no LongMem; name the folder of a SideNet with --model")
    tokenizer, window = load_tokenizer(loaded.tokenizer, loaded.comparison.model), loaded.default_window()
    # the first is the one whose passage is shown
    least = [fewest_tokens(window), *[PROMPT + NEW] * (len(found) - 1)]
    beginnings = [
        _beginning(name, text, tokenizer, max_tokens, fewest) for (name, text), fewest in zip(found, least, strict=True)
    ]
    # another pair's memories stay in a store of their own
    place = out / f"memory-{longmem.fingerprint[:8]}"
    with MemoryStore.open(place, model=longmem, tokenizer=tokenizer) as store:
        files = numbered([Path(name).stem or "text" for name, _ in named])
        for file, (_, text) in zip(files, found, strict=True):
            _write_text(out / "text" / f"{file}.txt", text)
        for (name, _), (text, _) in zip(found, beginnings, strict=True):
            receipt = store.add_document(NAMESPACE, text, name=name, replace=True)
            say(f"{name}: {receipt.tokens:,} tokens remembered in {place}")
        stats = store.stats()
        bank = store.bank(NAMESPACE, documents=[found[0][0]])
        continuation = _continued(longmem, tokenizer, bank, found[0][0], beginnings[0])
        hits = bank.search_text(continuation.prompt, top=3)
    documents = tokenize_documents(
        [_Text(name, text) for (name, _), (text, _) in zip(found, beginnings, strict=True)], tokenizer
    )
    say(f"measuring {sum(document.scored for document in documents):,} tokens, each system on all of them")
    result = perplexity(
        loaded.comparison,
        documents,
        PerplexitySettings(window=window),
        command="longmem demo",
        config={"model": loaded.model, "texts": list(texts), "max_tokens": max_tokens},
    )
    say(f"reading {found[0][0]} again, to see what each token finds")
    passage = most_helped_passage(
        longmem,
        tokenizer,
        found[0][0],
        beginnings[0][0],
        window=window,
        memory_tokens=max(MEMORY_SIZES),
        max_tokens=max_tokens,
    )
    html, picture = _save(out, result, passage, longmem)
    return Remembered(place, stats.tokens, stats.stored_bytes, result, passage, continuation, hits, html, picture)


def _write_text(path: Path, text: str) -> None:
    """The text that was used, to try further commands on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class _Text:
    id: str
    text: str


def _beginning(name: str, text: str, tokenizer: Any, most: int, fewest: int) -> tuple[str, str]:
    """What is remembered, at least ``fewest`` tokens, and what comes next, at least a prompt and its continuation."""
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = encoded["offset_mapping"]
    kept = min(most, len(spans) - PROMPT - NEW)
    if kept < fewest:
        raise DataError(
            f"{name}: {len(spans)} tokens are too few to remember and to go on; it needs {fewest + PROMPT + NEW}"
        )
    cut = spans[kept][0]
    return text[:cut], text[cut:]


@torch.no_grad()
def _continued(model: LongMem, tokenizer: Any, bank: Any, name: str, text: tuple[str, str]) -> Continuation:
    ids = tokenizer(text[1][: 40 * (PROMPT + NEW)], add_special_tokens=False, return_tensors="pt").input_ids
    prompt, real = ids[:, :PROMPT], ids[:, PROMPT : PROMPT + NEW]
    made, losses = [], []
    for memory in (bank, None):
        new = model.generate(prompt, memory=memory, max_new_tokens=NEW, do_sample=False)[0, prompt.shape[1] :]
        made.append(tokenizer.decode(new, skip_special_tokens=True))
        losses.append(_loss(model, ids[:, : PROMPT + NEW], memory))
    return Continuation(
        name, tokenizer.decode(prompt[0]), tokenizer.decode(real[0]), made[0], made[1], losses[0], losses[1]
    )


def _loss(model: LongMem, ids: Tensor, memory: Any) -> float:
    """Nats per token of what follows the prompt."""
    out = model(ids, memory=memory)
    assert out.logits is not None
    scores = out.logits[0, PROMPT - 1 : -1].float().log_softmax(-1)
    return -float(scores.gather(1, ids[0, PROMPT:, None]).mean())


def _save(out: Path, result: PerplexityResult, passage: Passage, model: LongMem) -> tuple[Path, Path]:
    from longmem.evaluation.plots import plot_all
    from longmem.evaluation.results import write_json

    folder = out / "perplexity"
    write_json(folder / "perplexity.json", result)
    plot_all(result, folder)
    html, picture = out / "memory.html", out / "memory.png"
    html.write_text(page(passage, model.num_heads, perplexity_rows(result)), encoding="utf-8")
    save_picture(passage, picture)
    return html, picture
