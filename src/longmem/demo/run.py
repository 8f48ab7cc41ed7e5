"""The demo from text to page. What an earlier run made from the same text and recipes is used again."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from longmem.demo.corpus import Corpus, write_corpus
from longmem.demo.page import page, perplexity_rows
from longmem.demo.picture import save_picture
from longmem.demo.reading import Passage, most_helped_passage
from longmem.errors import LongMemError
from longmem.evaluation.perplexity import PerplexityResult, PerplexitySettings, perplexity
from longmem.training.loop import train
from longmem.training.recipe import Recipe

log = logging.getLogger(__name__)

MAX_TOKENS = 16_384
"""Tokens of each held-out package that are measured and searched for a passage."""
MEMORY_SIZES = (1024, 16_384)
PASSAGE_FROM = ("logging", "http", "email", "xmlrpc")


class DemoStopped(LongMemError):
    """Training was interrupted; what is done is kept."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo made.

    Attributes:
        perplexity: of the held-out packages, also in ``perplexity/perplexity.json``.
        passage: what each of its tokens found.
        page: the HTML file.
        picture: the PNG file.
    """

    perplexity: PerplexityResult
    passage: Passage
    page: Path
    picture: Path


def run_demo(
    out: Path,
    *,
    minutes: tuple[float, float] | None = None,
    library: Path | None = None,
    max_tokens: int = MAX_TOKENS,
    say: Callable[[str], object] = log.info,
    quiet: bool = False,
) -> DemoResult:
    """Train tokenizer, backbone and SideNet, measure them, and read one held-out passage.

    Args:
        out: where everything goes.
        minutes: training time of backbone and SideNet; None is what their recipes say.
        library: folder of packages; None is this Python's standard library.
        max_tokens: of each held-out package.
        say: told what happens, a line at a time.
        quiet: training says nothing.

    Raises:
        DemoStopped: a signal stopped the training; another call goes on from there.
        LongMemError: something is wrong with the text, the recipes or what is in ``out``.
    """
    corpus = write_corpus(out / "text", library)
    source = library or "Python's standard library"
    say(
        f"text: {corpus.documents} packages of {source}, {corpus.characters / 1e6:.1f} million "
        f"characters; held out: {', '.join(corpus.held_out_names)}"
    )
    backbone_minutes, sidenet_minutes = minutes or (None, None)
    paths = f"data.paths={json.dumps([str(corpus.train)])}"
    backbone, sidenet = out / "backbone", out / "sidenet"
    made = _trained("demo-backbone.toml", backbone, [paths], corpus.digest, backbone_minutes, say, quiet)
    named = f"backbone.path={json.dumps(str(made.folder))}"
    made = _trained("demo-sidenet.toml", sidenet, [paths, named], made.digest, sidenet_minutes, say, quiet)
    result = _measured(made.folder, corpus, out / "perplexity", max_tokens, say)
    return _shown(made.folder, corpus, out, result, max_tokens, say)


@dataclass(frozen=True)
class _Made:
    """A finished model and a hash of everything it was made from."""

    folder: Path
    digest: str


def recipe_file(name: str) -> Path:
    """A recipe that comes with the package, installed or in its source tree."""
    here = Path(__file__).parents[1]
    places = (here / "recipes" / name, here.parents[1] / "recipes" / name)
    return next((place for place in places if place.exists()), places[0])


def _trained(
    name: str,
    folder: Path,
    overrides: list[str],
    before: str,
    minutes: float | None,
    say: Callable[[str], object],
    quiet: bool,
) -> _Made:
    """Train a recipe, go on with it, or find it done, by a stamp of recipe and text in the run's folder."""
    overrides = [*overrides, f"run.out_dir={json.dumps(str(folder))}"]
    if minutes is not None:
        overrides.append(f"optim.max_minutes={minutes}")
    recipe = Recipe.load(recipe_file(name), overrides)
    digest = hashlib.sha256((before + recipe.model_dump_json()).encode()).hexdigest()
    stamp = folder / "made-from.txt"
    same = stamp.exists() and stamp.read_text() == digest
    final = folder / "final"
    if same and (final / "config.json").exists():
        say(f"{name}: made before, in {final}")
        return _Made(final, digest)
    folder.mkdir(parents=True, exist_ok=True)
    stamp.write_text(digest)
    say(f"{name}: training, at most {recipe.optim.max_minutes:g} minutes")
    if train(recipe, resume=same, overwrite=True, quiet=quiet).model_dir is None:
        raise DemoStopped("training was stopped; the same command goes on from its last checkpoint")
    return _Made(final, digest)


def _measured(
    model: Path, corpus: Corpus, folder: Path, max_tokens: int, say: Callable[[str], object]
) -> PerplexityResult:
    from longmem.data.text import read_documents
    from longmem.evaluation.documents import tokenize_documents
    from longmem.evaluation.loading import load_comparison, load_tokenizer
    from longmem.evaluation.plots import plot_all
    from longmem.evaluation.results import write_json

    loaded = load_comparison(str(model), memory_sizes=MEMORY_SIZES)
    documents = tokenize_documents(
        read_documents([corpus.held_out]), load_tokenizer(loaded.tokenizer), max_tokens=max_tokens
    )
    say(f"measuring {sum(document.scored for document in documents):,} tokens of {len(documents)} held-out packages")
    folder.mkdir(parents=True, exist_ok=True)
    result = perplexity(
        loaded.comparison,
        documents,
        PerplexitySettings(window=loaded.default_window()),
        records=folder / "records.jsonl",
        command="longmem demo",
        config={"model": str(model), "data": str(corpus.held_out), "max_tokens": max_tokens},
    )
    write_json(folder / "perplexity.json", result)
    plot_all(result, folder)
    return result


def _shown(
    model: Path, corpus: Corpus, out: Path, result: PerplexityResult, max_tokens: int, say: Callable[[str], object]
) -> DemoResult:
    from longmem.evaluation.loading import load_comparison, load_tokenizer

    loaded = load_comparison(str(model))
    longmem = loaded.comparison.main
    assert longmem is not None
    name = next(name for name in (*PASSAGE_FROM, *corpus.held_out_names) if name in corpus.held_out_names)
    say(f"reading {name} again, to see what each token finds")
    passage = most_helped_passage(
        longmem,
        load_tokenizer(loaded.tokenizer),
        name,
        (corpus.held_out / f"{name}.txt").read_text(encoding="utf-8"),
        window=loaded.default_window(),
        memory_tokens=max(MEMORY_SIZES),
        max_tokens=max_tokens,
    )
    html, picture = out / "memory.html", out / "memory.png"
    html.write_text(page(passage, longmem.num_heads, perplexity_rows(result)), encoding="utf-8")
    save_picture(passage, picture)
    return DemoResult(result, passage, html, picture)
