"""``longmem generate``: continue a text with memory."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longmem.cli.common import (
    check_namespace,
    counted,
    load_model,
    load_tokenizer,
    one_line,
    open_store,
    print_columns,
    print_json,
    read_text,
    say,
)
from longmem.cli.options import FOLDER, checked, options, token_count
from longmem.errors import DataError, StoreError

if TYPE_CHECKING:
    from longmem.generation.page import ReadToken
    from longmem.memory.session import SessionMemory
    from longmem.store.recall import RecalledPassage
    from longmem.types import ChunkOrigin

ENDLESS = 1 << 40  # tokens; nobody waits for the last
SHOWN_CHUNKS = 2
QUERY_WORDS = 60


@click.command(
    short_help="Continue a text with memory.",
    epilog='Example: longmem generate models/small/sidenet "def main(" --memory memory --max-new-tokens 100',
)
@click.argument("model")
@click.argument("prompt", required=False)
@click.option("--file", "file", type=FOLDER, help="Take the prompt from a file.")
@click.option("--memory", "store", type=FOLDER, help="Read the documents of this store.")
@options("namespace")
@click.option(
    "--recall",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Passages of the store that share words with the prompt and are read once more, before it.",
)
@click.option("--recall-tokens", type=token_count(), default=400, help="That they may take together.")
@click.option("--read", "texts", multiple=True, metavar="FILE", help="Read a text into memory first; repeatable.")
@click.option("--keep", metavar="NAME", help="Keep prompt and answer in the store as a document of this name.")
@click.option("--max-new-tokens", "-m", type=click.IntRange(min=1), default=200)
@click.option("--endless", is_flag=True, help="Go on until the model ends the text, or you do (Ctrl-C).")
@click.option("--ignore-end", is_flag=True, help="Do not stop at the end-of-text token.")
@click.option("--temperature", type=click.FloatRange(min=0), help="Sample; 0, the default, takes the likeliest token.")
@click.option("--top-p", type=click.FloatRange(min=0, max=1), help="Sample from the likeliest tokens of this much.")
@click.option("--top-k", type=click.IntRange(min=1), help="Sample from so many tokens.")
@click.option("--repetition-penalty", type=click.FloatRange(min=0, min_open=True), help="Above 1: repeat less.")
@click.option("--beams", "num_beams", type=click.IntRange(min=1), help="Beams; not streamed, must fit the window.")
@options("seed")
@click.option("--window", type=int, help="Tokens attended to directly; default: what the backbone was made for.")
@click.option("--window-move", type=int, help="Oldest tokens that move to memory when it is full; default: half.")
@click.option("--window-overlap", type=int, help="Tokens before them that their keys may see; default: none.")
@click.option(
    "--session-tokens", type=token_count(), help="Most tokens of this session in memory; default: the model's."
)
@options("backbone", "revision", "subfolder", "gguf_file", "dtype", "tokenizer", "device")
@click.option("--explain", is_flag=True, help="Show as a table what memory did to each token, and what was read.")
@click.option("--page", type=FOLDER, help="The same as an HTML page, with tokens shaded by what memory did to them.")
@options("json")
def command(model: str, prompt: str | None, explain: bool, page: Path | None, as_json: bool, **options: Any) -> None:
    """Continue PROMPT with MODEL: a LongMem, a run folder, or a causal LM by itself.

    Without PROMPT (or with -) the prompt is standard input. The continuation is streamed to standard output. The store
    is only read; what has left the window is in memory as long as the command runs, and --keep writes it.
    """
    beams, endless, explained = (options["num_beams"] or 1) > 1, options["endless"], explain or page is not None
    if explained and (beams or endless):
        raise click.UsageError("--explain and --page follow one text to its end; leave out --beams and --endless")
    if options["store"] is None and (options["keep"] is not None or options["recall"]):
        needs = "--keep needs a store to keep it in" if options["keep"] is not None else "--recall needs a store"
        raise click.UsageError(f"{needs}; name it with --memory")
    answer = _generate(
        model, _prompt(prompt, options["file"]), options, stream=not as_json and not beams, read=explained
    )
    if as_json:
        print_json(answer.plain())
    elif beams:
        click.echo(answer.text)
    elif explain:
        _print_table(answer.tokens)
    if page is not None:
        from longmem.generation.page import page as made

        page.write_text(made(model, answer.memory, answer.prompt, answer.tokens), encoding="utf-8")
        say(f"wrote {page}")


@dataclass(frozen=True)
class _Answer:
    """What came of it: ``record`` is the JSON but for the tokens; ``memory`` says what was read, in words."""

    prompt: str
    text: str
    memory: str
    tokens: list[ReadToken]
    record: dict[str, Any]

    def plain(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "text": self.text, **self.record, "tokens": self.tokens or None}


def _generate(name: str, prompt: str, asked: dict[str, Any], *, stream: bool, read: bool) -> _Answer:
    """Open the store, load the model, read the texts, generate, and keep the answer where that is asked."""
    import torch

    from longmem.generation import THIS_TEXT
    from longmem.generation import read as read_into
    from longmem.generation.page import Passages, generate_explained, read_tokens
    from longmem.store.recall import Recall
    from longmem.store.store import MemoryStore

    namespace, keep = asked["namespace"], asked["keep"]
    with ExitStack() as open_things:
        store = None
        if asked["store"] is not None:  # before the model: wrong names show at once
            store = open_things.enter_context(open_store(asked["store"]))
            check_namespace(store, namespace)
            if keep is not None and any(each.name == keep for each in store.documents(namespace)):
                raise StoreError(
                    f"namespace {namespace!r} has a document {keep!r} already; choose another name for --keep"
                )
        how = {each: asked[each] for each in ("device", "backbone", "revision", "subfolder", "gguf_file", "dtype")}
        loaded = load_model(name, None if store is None else store.layout, **how)
        model, tokenizer = loaded.model, load_tokenizer(asked["tokenizer"], loaded)
        if tokenizer is None:
            raise DataError(f"{name}: no tokenizer beside the model or its backbone; name one with --tokenizer")
        found: list[RecalledPassage] = []
        notes = ""
        if asked["recall"]:
            # the end of the prompt is what goes on; a long one would ask for everything
            query = " ".join(prompt.split()[-QUERY_WORDS:])
            top, budget = asked["recall"], asked["recall_tokens"]
            # with the tokenizer: documents that were kept as token ids have no text without it
            readable = open_things.enter_context(open_store(asked["store"], tokenizer=tokenizer))
            notes, found = Recall(readable, namespace).notes(query, tokenizer, top, budget=budget)
            for passage in found:
                say(f"recalled {passage.document}: {one_line(passage.text)}")
        before = _ids(tokenizer, model, f"{notes}\n\n", "the notes") if notes else []
        own = _ids(tokenizer, model, prompt, "the prompt", special=not notes)
        ids = torch.tensor([before + own])
        texts = {each: torch.tensor(_ids(tokenizer, model, text, each)) for each, text in _texts(asked["texts"])}
        bank = None if store is None else store.bank(namespace, device=model.device)
        settings = _settings(asked, tokenizer)
        length = ids.shape[1] + settings["max_new_tokens"] + sum(map(len, texts.values()))
        session = _session(model, bank, asked["session_tokens"], length)
        for each, text in texts.items():
            read_into(model, session, text, document=each)
            say(f"read {counted(len(text), 'token')} of {each}")
        torch.manual_seed(asked["seed"])
        noted, before, start, writer = len(before), ids[0].tolist(), time.perf_counter(), None
        if asked["num_beams"] in (None, 1):
            writer = settings["streamer"] = _Writer(tokenizer, before, shown=stream)
        gains: list[float] = []
        readings: list[Any] = []
        settings |= {"attention_mask": torch.ones_like(ids).to(model.device)}
        with torch.no_grad():
            if read:
                whole, gains, readings = generate_explained(model, ids.to(model.device), session, **settings)
            else:
                whole = model.generate(ids.to(model.device), memory=session, **settings)[0]
        seconds, whole = time.perf_counter() - start, whole.cpu()
        new = whole[ids.shape[1] :].tolist()

        def ids_of(origin: ChunkOrigin) -> Any:
            if origin.namespace is not None:
                assert store is not None
                return store.token_ids(origin.namespace, origin.document or "")
            return {**texts, THIS_TEXT: whole}.get(origin.document or "")

        tokens = read_tokens(new, before, gains, readings, tokenizer, Passages(tokenizer, ids_of)) if read else []
        held = 0 if bank is None else int(bank.tokens[0])
        parts = [] if bank is None else [f"{counted(held, 'token')} of the namespace {namespace}"]
        parts += [f"{counted(len(text), 'token')} of {each}" for each, text in texts.items()]
        ends = model.generation_config.eos_token_id
        record = {
            "model": name,
            "prompt_tokens": len(before),
            "new_tokens": len(new),
            "ids": new,
            "ended": new[-1] in (ends if isinstance(ends, list) else [ends]),
            "seconds": seconds,
            "memory": {
                "store": asked["store"],
                "namespace": None if store is None else namespace,
                "store_tokens": held,
                "read": {each: len(text) for each, text in texts.items()},
                "session_tokens": int(session.tokens[0]),
                "kept": keep,
                "recalled": found,
            },
        }
    if keep is not None:  # only now: nobody else could write while the text was generated
        with MemoryStore.open(asked["store"], model=model, tokenizer=tokenizer, create=False) as writing:
            receipt = writing.add_document(namespace, None, name=keep, ids=whole[noted:])
        say(f"kept {counted(receipt.tokens, 'token')} as {keep}")
    said = tokenizer.decode(new, skip_special_tokens=True) if writer is None else "".join(writer.said)
    return _Answer(prompt, said, "memory: " + (", ".join(parts) or "what has left the window"), tokens, record)


class _Writer:
    """A streamer to standard output that spells tokens as they come."""

    def __init__(self, tokenizer: Any, prompt: list[int], *, shown: bool) -> None:
        from longmem.generation.pieces import Pieces

        self._pieces, self._shown, self._prompt = Pieces(tokenizer, prompt), shown, True
        self.said: list[str] = []

    def put(self, value: Any) -> None:
        if self._prompt:  # generate hands over the prompt first
            self._prompt = False
            return
        for token in value.flatten().tolist():
            self._say(self._pieces.push(token))

    def end(self) -> None:
        self._say(self._pieces.end())
        if self._shown:
            click.echo()

    def _say(self, text: str) -> None:
        self.said.append(text)
        if self._shown and text:
            click.echo(text, nl=False)
            sys.stdout.flush()


def _prompt(given: str | None, file: Path | None) -> str:
    """The prompt from its one source.

    Raises:
        DataError: it is empty, missing, or no UTF-8 text.
    """
    if given not in (None, "-") and file is not None:
        raise click.UsageError("the prompt is given twice; leave out PROMPT or --file")
    text = read_text(file or "-") if given in (None, "-") else checked(str(given), "the prompt")
    if not text:
        raise DataError("the prompt is empty; give it as an argument, in --file, or on standard input")
    return text


def _texts(paths: tuple[str, ...]) -> list[tuple[str, str]]:
    """What --read names, each under its own name."""
    from longmem.data.text import read_documents

    found = [(each.id, each.text) for path in paths for each in read_documents([path])]
    names = [name for name, _ in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"two texts are called {twice}; read them one by one, or rename one")
    return found


def _ids(tokenizer: Any, model: Any, text: str, what: str, *, special: bool = True) -> list[int]:
    """The token ids of a text to be continued: what the tokenizer puts after a text (``</s>``) is left out."""
    from longmem.data.tokenizer import check_ids

    whole: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    plain: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    starts = range(len(whole) - len(plain) + 1)
    before = next((start for start in starts if whole[start : start + len(plain)] == plain), None)
    ids = whole if before is None else whole[:before] + plain
    if not ids:
        raise DataError(f"{what} has no tokens")
    check_ids(ids, model, what)
    return ids


def _session(model: Any, bank: Any, capacity: int | None, length: int) -> SessionMemory:
    """Over the store's documents or over nothing, as large as this text can need."""
    from longmem.memory.session import SessionMemory

    size = model.config.chunk_size if bank is None else bank.chunk_size
    most = model.config.memory_size // size * size if capacity is None else capacity
    # every text may end in a chunk that is not full
    return SessionMemory.for_model(model, bank, capacity_tokens=min(most, -(-2 * length // size) * size))


def _settings(asked: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The arguments of ``generate``."""
    sampling = {name: asked[name] for name in ("temperature", "top_p", "top_k") if asked[name] is not None}
    if not sampling.get("temperature", 1):
        sampling = {}
    settings: dict[str, Any] = {
        "max_new_tokens": ENDLESS if asked["endless"] else asked["max_new_tokens"],
        "do_sample": bool(sampling),
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **(sampling or {"temperature": None, "top_p": None, "top_k": None}),
    }
    if asked["ignore_end"]:
        settings["eos_token_id"] = None
    names = ("num_beams", "repetition_penalty", "window", "window_move", "window_overlap", "session_tokens")
    return settings | {name: asked[name] for name in names if asked[name] is not None}


def _print_table(tokens: list[ReadToken]) -> None:
    rows = []
    for token in tokens:
        found = [
            f"{each.share:.1%} {each.document or 'unnamed'}:{each.start_token} [[{_visible(each.text)}]]"
            for each in token.found[:SHOWN_CHUNKS]
        ]
        rows.append((_visible(token.text), f"{token.gain:+.2f}", f"{token.share:.1%}", "  ".join(found)))
    print_columns(("token", "nats", "memory", "read"), rows)


def _visible(text: str) -> str:
    """White space as signs, nothing that a terminal would obey."""
    return one_line(text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣"))
