"""``longmem demo``: a model remembers texts and a conversation that it has never seen, and all is measured on them."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from longmem.chat import Recall, keep, reply
from longmem.data.facts import told_session
from longmem.data.text import Document, numbered, package_text, read_documents
from longmem.data.tokens import tokenize_documents
from longmem.errors import BackboneError, DataError
from longmem.evaluation.perplexity import PerplexitySettings, perplexity
from longmem.evaluation.results import write_json
from longmem.evaluation.systems import load_systems
from longmem.generation.page import generate_explained, page, read_tokens
from longmem.modeling.loading import default_model, shipped
from longmem.store import MemoryStore

DEFAULT_TEXTS = ("http", "email")
"""Packages of the standard library; the small pair has not been trained on them."""
NAMESPACE, TALK = "demo", "demo-talk"
MEMORY_SIZES = [1024, 8_192]
MAX_TOKENS, REAL_TOKENS = 8_192, 3_072
"""Of each text that are remembered and measured; of the default model, what two cores measure in a minute."""
PROMPT, NEW = 96, 64
"""Tokens of the prompt, and of its continuation."""
FACTS = 10
"""Told and asked for, of kinds and with values that no model here was trained on, and drawn, not chosen."""


def demo_model(say: Callable[[str], object]) -> tuple[str, str | None]:
    """The checkpoint and its backbone; where the default model cannot be had, the small pair, which is in its own."""
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


def find_texts(names: Sequence[str]) -> list[Document]:
    """Texts of files, folders, archives, or packages of this Python; equal names get numbers.

    Raises:
        DataError: a name is none of these.
    """
    libraries = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")]
    found: list[Document] = []
    for name in names:
        if Path(name).exists() or any(sign in name for sign in "/*:"):
            found += read_documents([name])
            continue
        places = ((top, library) for library in libraries for top in (library / name, library / f"{name}.py"))
        text = next((text for top, library in places if top.exists() and (text := package_text(top, library))), None)
        if text is None:
            raise DataError(f"{name}: neither a file nor a package of this Python; name a text file, or say e.g. json")
        found.append(Document(name, text, name))
    ids = numbered([document.id for document in found])
    return [replace(document, id=name) for name, document in zip(ids, found, strict=True)]


def run_demo(
    out: Path,
    texts: Sequence[str] = (),
    *,
    model: str | Path | None = None,
    seed: int = 0,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Remember the beginnings of texts and a conversation, continue the first text, ask for what was told, measure.

    Args:
        out: folder for the store, the texts, ``perplexity.json`` and ``memory.html``.
        texts: see ``find_texts``; none are ``DEFAULT_TEXTS``, of the default model the first of them.
        model: folder or hub id of a model that reads memory; None is the default one, or the small pair.
        seed: draws the facts.
        say: called with every line of the story as it happens.

    Returns:
        ``model``, ``store`` (a folder) and ``tokens`` in it, ``perplexity`` as in the file, and what ``_continued`` and
        ``_conversation`` return; without a conversation where the model has no chat template.

    Raises:
        LongMemError: a text or the model is missing, or a text is too short.
    """
    named = find_texts(texts or DEFAULT_TEXTS)
    path, backbone = demo_model(say) if model is None else (str(model), None)
    most, sizes = MAX_TOKENS, MEMORY_SIZES
    if backbone is not None:  # a hundred times as large as the small pair: it reads less in as much time
        most, sizes, named = REAL_TOKENS, MEMORY_SIZES[-1:], named if texts else named[:1]
    systems = load_systems(path, backbone=backbone, default_sizes=sizes)
    reader, tokenizer = systems[-1].model, systems[-1].tokenizer
    if not hasattr(reader, "memory_layers"):
        raise DataError(f"{path} reads no memory; name the folder of a LongMem with --model")
    kept = [_beginning(text, tokenizer, most) for text in named]
    # the memories of another model are kept in another store
    place = out / "-".join(["memory", reader.fingerprint[:8], *map(str, reader.memory_layers)])
    made: dict[str, Any] = {"model": path, "store": place, "page": out / "memory.html"}
    with MemoryStore.open(place, model=reader, tokenizer=tokenizer) as store:
        for text, whole in zip(kept, named, strict=True):
            file = out / "text" / (text.id if Path(text.id).suffix else f"{text.id}.txt")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(whole.text, encoding="utf-8")
            receipt = store.add_document(NAMESPACE, text.text, name=text.id, replace=True)
            say(f"{text.id}: {receipt.tokens:,} tokens remembered in {place}")
        made["tokens"] = store.stats(NAMESPACE).tokens
        made |= _continued(reader, tokenizer, store, named[0].text[len(kept[0].text) :], say)
        if getattr(tokenizer, "chat_template", None):
            made |= _conversation(reader, tokenizer, store, seed, say)
    note = f"The prompt is what follows in {kept[0].id} after the part that is in memory; the model goes on with it."
    held = f"memory: {made['tokens']:,} tokens of {', '.join(text.id for text in kept)}"
    made["page"].write_text(page(path, held, made["prompt"], made["read"], [note]), encoding="utf-8")
    documents = tokenize_documents(kept, tokenizer)
    say(f"\nmeasuring {sum(document.scored for document in documents):,} tokens with every system")
    made["perplexity"] = perplexity(
        systems,
        documents,
        # segments would take the text before each of them from the backbone, and flatter the memory
        PerplexitySettings(protocols=("sliding",)),
        config={"model": path, "texts": [text.id for text in kept], "max_tokens": most},
    )
    write_json(out / "perplexity.json", made["perplexity"])
    return made


def _conversation(
    model: Any, tokenizer: Any, store: MemoryStore, seed: int, say: Callable[[str], object]
) -> dict[str, Any]:
    """Tell facts, each in a conversation of its own; ask for them in others; forget one, and ask for it once more.

    Returns:
        ``asked``, a record of each fact, and ``forgotten``, one more of the first that was named, None if none was.
    """
    session = told_session(random.Random(seed), FACTS, held_out=True)
    store.forget(TALK, everything=True)  # of an earlier run
    turns = [session.messages[at : at + 2] for at in range(0, 2 * FACTS, 2)]
    for number, said in enumerate(turns, 1):
        keep(store, TALK, f"talk-{number}", said)
    recall = Recall(store, TALK)
    how: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}

    def ask(number: int) -> dict[str, Any]:
        """What comes of asking for a fact in another conversation, without memory and with it."""
        fact, name = session.facts[number], f"talk-{number + 1}"
        question = [{"role": "user", "content": fact.asked}]
        without = reply(model, tokenizer, question, **how).text
        said = reply(model, tokenizer, question, bank=store.bank(TALK), recall=recall, **how)
        heads = {str(chunk.origin.document): chunk.share for chunk in reversed(said.read)}
        read = sorted(heads.items(), key=lambda head: -head[1])[:2]
        recalled = list(dict.fromkeys(each.document for each in said.recalled))
        named = fact.value.lower() in said.text.lower()
        say(f"    asked           {fact.asked}")
        say(f"    without memory  {_line(without)}")
        say(f"    with memory     {_line(said.text)}  [{'' if named else 'not '}{fact.value}]")
        shares = ", ".join(f"{document} {share:.1%}" for document, share in read) or "nothing"
        say(f"    read            passages of {', '.join(recalled) or 'nothing'}; heads: {shares}")
        told = {"document": name, "told": turns[number][0]["content"], "question": fact.asked, "value": fact.value}
        return {**told, "without": without, "answer": said.text, "named": named, "recalled": recalled, "heads": heads}

    say(f"\n{FACTS} facts were told, each in a conversation of its own. Asked for in new conversations:")
    asked = []
    for number, turn in enumerate(turns):
        say(f"\n{number + 1:>2}  {_line(turn[0]['content'])}")
        asked.append(ask(number))
    named = [number for number, each in enumerate(asked) if each["named"]]
    alone = sum(each["value"].lower() in each["without"].lower() for each in asked)
    say(f"\nvalues named: {len(named)} of {FACTS} with memory, {alone} without")
    if not named:
        return {"asked": asked, "forgotten": None}
    name = asked[named[0]]["document"]
    store.forget(TALK, name=name)
    say(f"\n{name} was forgotten, then asked for again:")
    return {"asked": asked, "forgotten": ask(named[0])}


def _line(text: str) -> str:
    return " ".join(text.split())


def _beginning(document: Document, tokenizer: Any, most: int) -> Document:
    """What is remembered: so much that a prompt comes next."""
    encoded = tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = encoded["offset_mapping"]
    kept = min(most, len(spans) - PROMPT)
    if kept < PROMPT:
        raise DataError(
            f"{document.id}: {len(spans)} tokens are too few to remember and to continue; it needs {2 * PROMPT}"
        )
    return replace(document, text=document.text[: spans[kept][0]])


def _continued(
    model: Any, tokenizer: Any, store: MemoryStore, rest: str, say: Callable[[str], object]
) -> dict[str, Any]:
    """Continue what was remembered.

    Returns:
        ``prompt``, the first tokens of ``rest``; ``with_memory`` and ``without``, what the model writes after it;
        ``read``, for each token that it wrote with memory what memory did to it and what was read.
    """
    ids = tokenizer(rest[: 40 * PROMPT], add_special_tokens=False, return_tensors="pt").input_ids[:, :PROMPT]
    how: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "pad_token_id": tokenizer.pad_token_id}
    how |= {"max_new_tokens": NEW, "do_sample": False}
    whole, gains, readings = generate_explained(model, ids, store.bank(NAMESPACE), **how)
    before, new = ids[0].tolist(), whole[PROMPT:].tolist()
    read = read_tokens(new, before, gains, readings, tokenizer, lambda _, name: store.token_ids(NAMESPACE, name))
    written = (new, model.generate(ids, **how)[0, PROMPT:])
    texts = [tokenizer.decode(before), *(tokenizer.decode(each, skip_special_tokens=True) for each in written)]
    titles = ("the text goes on after the part that was remembered", "with memory", "without")
    for title, text in zip(titles, texts, strict=True):
        say("\n".join([f"\n{title}:", *(f"  │ {line}" for line in text.splitlines())]))
    return dict(zip(("prompt", "with_memory", "without"), texts, strict=True)) | {"read": read}
