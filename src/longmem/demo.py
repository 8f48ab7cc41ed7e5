"""``longmem demo``: a model remembers texts and a conversation that it has never seen, and all is measured on them."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from longmem.chat import Reply, keep, reply
from longmem.data.python_source import package_text
from longmem.data.text import read_documents
from longmem.data.told import told_session
from longmem.default_model import default_model, shipped
from longmem.errors import BackboneError, DataError
from longmem.evaluation.documents import tokenize_documents
from longmem.evaluation.loading import has_memory, load_comparison, load_tokenizer
from longmem.evaluation.perplexity import PerplexitySettings, perplexity
from longmem.evaluation.results import write_json
from longmem.evaluation.task import numbered
from longmem.generation.page import Passages, ReadToken, log_probabilities, page, read_tokens, reading_at
from longmem.progress import Progress
from longmem.store import MemoryStore
from longmem.store.recall import Recall

DEFAULT_TEXTS = ("http", "email")
"""Packages of the standard library; the small pair has not been trained on them."""
NAMESPACE, TALK = "demo", "demo-talk"
MAX_TOKENS = 8_192
MEMORY_SIZES = (1024, 8_192)
REAL_TOKENS = 3_072
"""Of one text, with the default model: what two cores measure in a minute."""
PROMPT, NEW = 96, 64
"""Tokens of the prompt, and of its continuation."""
FACTS = 10
"""Told and asked for, of kinds and with values that no model here was trained on, and drawn, not chosen."""
ANSWER: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}


@dataclass(frozen=True)
class Asked:
    """A fact that was told in an earlier conversation, and what came of asking for it.

    Attributes:
        told: what was said, in the document ``document``.
        question: asked in another conversation.
        value: that the answer has to name.
        without: the answer without memory.
        answer: the answer with it.
        document: the name of the earlier conversation.
        recalled: the documents whose passages were read once more.
        heads: documents that the heads read most in, with the largest share of an output.
    """

    told: str
    question: str
    value: str
    document: str
    without: str
    answer: str
    recalled: list[str]
    heads: dict[str, float]

    @property
    def named(self) -> bool:
        return self.value.lower() in self.answer.lower()


@dataclass(frozen=True)
class Demo:
    """What the demo made.

    Attributes:
        model: what remembered.
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
        asked: facts told in one conversation and asked for in another; none where the model has no chat template.
        forgotten: the first of them that was named, asked for again after its conversation was forgotten.
    """

    model: str
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
    asked: list[Asked] = field(default_factory=list)
    forgotten: Asked | None = None


@dataclass(frozen=True)
class _Text:
    id: str
    text: str
    rest: str = ""


def demo_model(say: Callable[[str], object]) -> tuple[str, str | None]:
    """The checkpoint and its backbone; where the default model cannot be had, the small pair, which is in its own.

    Raises:
        DataError: that is not here either.
    """
    try:
        found = default_model(say)
        return str(found.checkpoint), str(found.backbone)
    except BackboneError as problem:
        small = shipped("small/sidenet")
        if small is None:
            raise DataError(
                f"{problem}; the small pair is in models/small of the source tree, not in the installed package: run "
                "the demo there, or name the folder or hub id of a LongMem with --model"
            ) from problem
        say(f"{problem}; going on with the pair of 5 million parameters, which holds no conversation")
        return str(small), None


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
    texts: Sequence[str] = (),
    *,
    model: str | Path | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    say: Callable[[str], object] = print,
) -> Demo:
    """Remember the beginnings of texts and a conversation, measure, continue the first text, and ask for what was told.

    Args:
        out: folder for the store, the texts, ``perplexity.json`` and ``memory.html``.
        texts: see ``find_texts``; none are ``DEFAULT_TEXTS``, of the default model the first of them.
        model: folder or hub id of a model that reads memory; None is the default one, or the small pair.
        max_tokens: of each text that are remembered and measured; None is ``REAL_TOKENS`` of the default model, or
            else ``MAX_TOKENS``.
        seed: draws the facts.
        say: called with one line for each step.

    Raises:
        LongMemError: a text or the model is missing, or a text is too short.
    """
    named = find_texts(texts or DEFAULT_TEXTS)
    path, backbone = demo_model(say) if model is None else (str(model), None)
    large = backbone is not None  # a hundred times as large as the small pair: it reads less in as much time
    if large and not texts:
        named = named[:1]
    most = max_tokens or (REAL_TOKENS if large else MAX_TOKENS)
    sizes = MEMORY_SIZES[-1:] if large else MEMORY_SIZES
    loaded = load_comparison(path, backbone=backbone, memory_sizes=sizes if has_memory(path) else None)
    systems = loaded.comparison.systems
    reader: Any = next((each.reader for each in reversed(systems) if each.reader is not None), None)
    if reader is None:
        raise DataError(f"{loaded.model} reads no memory; name the folder of a LongMem with --model")
    tokenizer, window = load_tokenizer(loaded.tokenizer, loaded.comparison.model), loaded.default_window()
    kept = [_beginning(text, tokenizer, most) for text in named]
    asked: list[Asked] = []
    forgotten = None
    # the memories of another model are kept in another store
    place = out / "-".join(["memory", reader.fingerprint[:8], *map(str, reader.memory_layers)])
    with MemoryStore.open(place, model=reader, tokenizer=tokenizer) as store:
        for text in kept:
            file = out / "text" / text.id
            file.parent.mkdir(parents=True, exist_ok=True)
            (file if file.suffix else file.with_suffix(".txt")).write_text(text.text + text.rest, encoding="utf-8")
            receipt = store.add_document(NAMESPACE, text.text, name=text.id, replace=True)
            say(f"{text.id}: {receipt.tokens:,} tokens remembered in {place}")
        prompt, real, made, read = _continued(reader, tokenizer, store, kept[0])
        tokens = store.stats(NAMESPACE).tokens
        if getattr(tokenizer, "chat_template", None):
            asked, forgotten = _conversation(reader, tokenizer, store, seed)
    documents = tokenize_documents(kept, tokenizer)
    say(f"measuring {sum(document.scored for document in documents):,} tokens with every system")
    result = perplexity(
        loaded.comparison,
        documents,
        # segments would take the text before each of them from the backbone, and flatter the memory
        PerplexitySettings(window=window, protocols=("sliding",)),
        command="longmem demo",
        config={"model": loaded.model, "texts": [text.id for text in kept], "max_tokens": most},
    )
    write_json(out / "perplexity.json", result)
    note = f"The tokens are those that follow the prompt in {kept[0].id}; the text before the prompt is in memory."
    html = page(loaded.model, f"memory: {tokens:,} tokens of {', '.join(t.id for t in kept)}", prompt, read, [note])
    (out / "memory.html").write_text(html, encoding="utf-8")
    return Demo(
        model=loaded.model,
        store=place,
        tokens=tokens,
        perplexity=result,
        document=kept[0].id,
        prompt=prompt,
        real=real,
        with_memory=made[0],
        without=made[1],
        read=read,
        page=out / "memory.html",
        asked=asked,
        forgotten=forgotten,
    )


def _conversation(model: Any, tokenizer: Any, store: MemoryStore, seed: int) -> tuple[list[Asked], Asked | None]:
    """Tell facts, each in a conversation of its own; ask for them in others; forget one, and ask for it once more."""
    session = told_session(random.Random(seed), FACTS, held_out=True)
    names = [f"talk-{number}" for number in range(1, FACTS + 1)]
    turns = [list(session.messages[at : at + 2]) for at in range(0, 2 * FACTS, 2)]
    if TALK in store.namespaces():  # of an earlier run
        store.forget(TALK, everything=True)
    for name, said in zip(names, turns, strict=True):
        keep(store, TALK, name, said)
    recall, asked = Recall(store, TALK), list[Asked]()

    def ask(question: str, *, memory: bool = True) -> Reply:
        reads: dict[str, Any] = {"bank": store.bank(TALK), "recall": recall} if memory else {}
        return reply(model, tokenizer, [{"role": "user", "content": question}], **reads, **ANSWER)

    def outcome(number: int, without: str) -> Asked:
        fact, said = session.facts[number], ask(session.facts[number].asked)
        heads: dict[str, float] = {}
        for chunk in said.read:
            heads.setdefault(str(chunk.origin.document), chunk.share)
        recalled = list(dict.fromkeys(each.document for each in said.recalled))
        told = turns[number][0]["content"]
        return Asked(told, fact.asked, fact.value, names[number], without, said.text, recalled, heads)

    with Progress("asking", FACTS, "facts") as progress:
        for number, fact in enumerate(session.facts):
            asked.append(outcome(number, ask(fact.asked, memory=False).text))
            progress.advance()
    first = next((number for number, each in enumerate(asked) if each.named), None)
    if first is None:
        return asked, None
    store.forget(TALK, name=names[first])
    return asked, outcome(first, asked[first].without)


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
