"""``longmem generate``: continue a text with memory."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longmem.cli.counts import TokenCount
from longmem.cli.memory.opening import check_namespace, layout_of, load_model, load_tokenizer, say
from longmem.cli.memory.options import namespace_option
from longmem.cli.memory.printing import counted, one_line, print_columns, print_json
from longmem.errors import DataError, StoreError

if TYPE_CHECKING:
    from longmem.generation.explained import ExplainedToken, Readings
    from longmem.memory.session import SessionMemory
    from longmem.store.records import Layout

ENDLESS = 1 << 40  # tokens; nobody waits for the last
SHOWN_CHUNKS = 2


@click.command(
    short_help="Continue a text with memory.",
    epilog='Example: longmem generate models/small/sidenet "def main(" --memory memory --max-new-tokens 100',
)
@click.argument("model")
@click.argument("prompt", required=False)
@click.option("--file", "file", type=click.Path(path_type=Path), help="Take the prompt from a file.")
@click.option("--memory", "store", type=click.Path(path_type=Path), help="Read the documents of this store.")
@namespace_option
@click.option("--read", "texts", multiple=True, metavar="FILE", help="Read a text into memory first; repeatable.")
@click.option("--keep", metavar="NAME", help="Keep prompt and answer in the store as a document of this name.")
@click.option("--max-new-tokens", "-m", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--endless", is_flag=True, help="Go on until the model ends the text, or you do (Ctrl-C).")
@click.option("--ignore-end", is_flag=True, help="Do not stop at the end-of-text token.")
@click.option("--temperature", type=click.FloatRange(min=0), help="Sample; 0, the default, takes the likeliest token.")
@click.option("--top-p", type=click.FloatRange(min=0, max=1), help="Sample from the likeliest tokens of this much.")
@click.option("--top-k", type=click.IntRange(min=1), help="Sample from so many tokens.")
@click.option("--repetition-penalty", type=click.FloatRange(min=0, min_open=True), help="Above 1: repeat less.")
@click.option("--beams", type=click.IntRange(min=1), default=1, show_default=True, help="Beams; not streamed.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of sampling.")
@click.option("--window", type=int, help="Tokens attended to directly; default: what the backbone was made for.")
@click.option("--window-move", type=int, help="Oldest tokens that move to memory when it is full; default: half.")
@click.option("--window-overlap", type=int, help="Tokens before them that their keys may see; default: none.")
@click.option(
    "--session-tokens", type=TokenCount(), help="Most tokens of this session in memory; default: the model's."
)
@click.option("--tokenizer", help="Folder or hub id; default: that of the model's backbone.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, ...; auto takes a GPU if there is one.")
@click.option("--explain", is_flag=True, help="Show what was read from memory for each token, as a table.")
@click.option("--page", type=click.Path(path_type=Path), help="The same as an HTML page, tokens shaded by their share.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of the text.")
def command(
    model: str,
    prompt: str | None,
    file: Path | None,
    store: Path | None,
    namespace: str,
    texts: tuple[str, ...],
    keep: str | None,
    device: str,
    tokenizer: str | None,
    explain: bool,
    page: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Continue PROMPT with MODEL: a LongMem, a run folder, or a causal LM by itself.

    Without PROMPT (or with -) the prompt is standard input. The continuation is streamed to standard output. The store
    is only read; what has left the window is in memory as long as the command runs, and --keep writes it.
    """
    if options["beams"] > 1 and (explain or page is not None):
        raise click.UsageError("--explain and --page follow one text; leave out --beams")
    if keep is not None and store is None:
        raise click.UsageError("--keep needs a store to keep it in; name it with --memory")
    text = _prompt(prompt, file)
    layout = None if store is None else _layout(store, namespace, keep)
    loaded = load_model(model, layout, device)
    words = load_tokenizer(tokenizer, loaded.tokenizer)
    if words is None:
        raise DataError(f"{model}: no tokenizer beside the model or its backbone; name one with --tokenizer")
    asked = _Asked(text, texts, store, namespace, keep, explain or page is not None, options)
    answer = _generate(loaded.model, words, asked, stream=not as_json and options["beams"] == 1)
    if as_json:
        print_json(answer.plain(model))
    elif options["beams"] > 1:
        click.echo(answer.text)
    if explain and not as_json:
        _print_table(answer.tokens)
    if page is not None:
        from longmem.generation.page import page as made

        page.write_text(made(model, answer.memory_in_words(), text, answer.tokens), encoding="utf-8")
        say(f"wrote {page}")


@dataclass(frozen=True)
class _Asked:
    """What the command line asks for."""

    prompt: str
    texts: tuple[str, ...]
    store: Path | None
    namespace: str
    keep: str | None
    explain: bool
    options: dict[str, Any]


@dataclass(frozen=True)
class _Answer:
    """What came of it."""

    asked: _Asked
    text: str
    new_ids: list[int]
    prompt_tokens: int
    seconds: float
    ended: bool
    store_tokens: int
    read: dict[str, int]
    session_tokens: int
    tokens: list[ExplainedToken]

    def plain(self, model: str) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": model,
            "prompt": self.asked.prompt,
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.new_ids),
            "ids": self.new_ids,
            "ended": self.ended,
            "seconds": self.seconds,
            "memory": {
                "store": self.asked.store,
                "namespace": None if self.asked.store is None else self.asked.namespace,
                "store_tokens": self.store_tokens,
                "read": self.read,
                "session_tokens": self.session_tokens,
                "kept": self.asked.keep,
            },
            "tokens": self.tokens if self.asked.explain else None,
        }

    def memory_in_words(self) -> str:
        """For the page."""
        parts = [f"{counted(tokens, 'token')} of {name}" for name, tokens in self.read.items()]
        if self.asked.store is not None:
            parts.insert(0, f"{counted(self.store_tokens, 'token')} of the namespace {self.asked.namespace}")
        return "memory: " + (", ".join(parts) or "what has left the window")


def _generate(model: Any, tokenizer: Any, asked: _Asked, *, stream: bool) -> _Answer:
    import torch

    from longmem.generation import THIS_TEXT, read
    from longmem.generation.explained import Readings, Speller, explained
    from longmem.store.store import MemoryStore

    ids = torch.tensor([_ids(tokenizer, asked.prompt, "the prompt")])
    texts = {name: torch.tensor(_ids(tokenizer, text, name)) for name, text in _texts(asked.texts)}
    settings = _settings(asked.options, tokenizer)
    readings: Readings | None = Readings() if asked.explain else None
    torch.manual_seed(asked.options["seed"])
    with ExitStack() as open_things:
        bank = None
        if asked.store is not None:
            store = open_things.enter_context(
                MemoryStore.open(asked.store, model=model, tokenizer=tokenizer, mode="read", create=False)
            )
            bank = store.bank(asked.namespace, device=model.device)
        length = ids.shape[1] + settings["max_new_tokens"] + sum(map(len, texts.values()))
        session = _session(model, bank, asked.options["session_tokens"], length)
        for name, text in texts.items():
            read(model, session, text, document=name)
            say(f"read {counted(len(text), 'token')} of {name}")
        writer = _Writer(tokenizer, ids[0].tolist(), shown=stream)
        start = time.perf_counter()
        more = {} if readings is None else {"explain": readings}
        with torch.no_grad():
            done = model.generate(
                ids.to(model.device),
                attention_mask=torch.ones_like(ids).to(model.device),
                memory=session,
                streamer=writer if asked.options["beams"] == 1 else None,
                **settings,
                **more,
            )
        seconds = time.perf_counter() - start
        whole = done[0].tolist()
        new = whole[ids.shape[1] :]
        spell = Speller(tokenizer, {**texts, THIS_TEXT: whole}, bank)
        tokens = [] if readings is None else explained(readings, new, ids[0].tolist(), spell, tokenizer)
        ends = model.generation_config.eos_token_id
        answer = _Answer(
            asked=asked,
            text=writer.text() if asked.options["beams"] == 1 else tokenizer.decode(new, skip_special_tokens=True),
            new_ids=new,
            prompt_tokens=ids.shape[1],
            seconds=seconds,
            ended=new[-1] in (ends if isinstance(ends, list) else [ends]),
            store_tokens=0 if bank is None else int(bank.tokens[0]),
            read={name: len(text) for name, text in texts.items()},
            session_tokens=int(session.tokens[0]),
            tokens=tokens,
        )
    if asked.keep is not None:
        with MemoryStore.open(asked.store or "", model=model, tokenizer=tokenizer, create=False) as store:
            receipt = store.add_document(asked.namespace, None, name=asked.keep, ids=whole)
        say(f"kept {counted(receipt.tokens, 'token')} as {asked.keep}")
    return answer


class _Writer:
    """A streamer to standard output that spells tokens as they come."""

    def __init__(self, tokenizer: Any, prompt: list[int], *, shown: bool) -> None:
        from longmem.generation.pieces import Pieces

        self._pieces = Pieces(tokenizer, prompt)
        self._shown = shown
        self._prompt = True
        self._said: list[str] = []

    def put(self, value: Any) -> None:
        if self._prompt:
            self._prompt = False
            return
        for token in value.flatten().tolist():
            self._say(self._pieces.push(token))

    def end(self) -> None:
        self._say(self._pieces.end())
        if self._shown:
            click.echo()

    def text(self) -> str:
        return "".join(self._said)

    def _say(self, text: str) -> None:
        self._said.append(text)
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
    try:
        if file is not None:
            text = file.read_text(encoding="utf-8")
        elif given in (None, "-"):
            text = sys.stdin.buffer.read().decode("utf-8")
        else:
            text = str(given)
    except UnicodeDecodeError as error:
        raise DataError(f"{file or 'standard input'} is not UTF-8 text (byte {error.start}); convert it") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); check the path") from error
    if not text:
        raise DataError("the prompt is empty; give it as an argument, in --file, or on standard input")
    return text


def _texts(paths: tuple[str, ...]) -> list[tuple[str, str]]:
    """What --read names, each under its own name."""
    from longmem.data.text import TextSource, read_documents

    found = [(each.id, each.text) for path in paths for each in read_documents(TextSource((path,)))]
    names = [name for name, _ in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"two texts are called {twice}; read them one by one, or rename one")
    return found


def _ids(tokenizer: Any, text: str, what: str) -> list[int]:
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    if not ids:
        raise DataError(f"{what} has no tokens")
    return ids


def _layout(store: Path, namespace: str, keep: str | None) -> Layout:
    """What the store was made for; wrong names show before a model is loaded."""
    from longmem.store.store import MemoryStore

    layout = layout_of(store, writing=keep is not None)
    with MemoryStore.open(store, mode="read", create=False) as opened:
        check_namespace(opened, namespace)
        if keep is not None and any(each.name == keep for each in opened.documents(namespace)):
            raise StoreError(f"namespace {namespace!r} has a document {keep!r} already; choose another name for --keep")
        return layout or opened.layout


def _session(model: Any, bank: Any, capacity: int | None, length: int) -> SessionMemory:
    """Over the store's documents or over nothing, as large as this text can need."""
    from longmem.memory.session import SessionMemory

    size = model.config.chunk_size if bank is None else bank.chunk_size
    most = model.config.memory_size // size * size if capacity is None else capacity
    # every text may end in a chunk that is not full
    needed = -(-2 * length // size) * size
    tokens = min(most, needed)
    if bank is None:
        return SessionMemory.for_model(model, capacity_tokens=tokens)
    session: SessionMemory = bank.session(capacity_tokens=tokens)
    return session


def _settings(options: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The arguments of ``generate``."""
    sampling = {name: options[name] for name in ("temperature", "top_p", "top_k") if options[name] is not None}
    if not sampling.get("temperature", 1):
        sampling = {}
    settings: dict[str, Any] = {
        "max_new_tokens": ENDLESS if options["endless"] else options["max_new_tokens"],
        "do_sample": bool(sampling),
        "num_beams": options["beams"],
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **(sampling or {"temperature": None, "top_p": None, "top_k": None}),
    }
    if options["ignore_end"]:
        settings["eos_token_id"] = None
    for name in ("repetition_penalty", "window", "window_move", "window_overlap", "session_tokens"):
        if options[name] is not None:
            settings[name] = options[name]
    return settings


def _print_table(tokens: list[ExplainedToken]) -> None:
    rows = []
    for token in tokens:
        found = [
            f"{each.share:.1%} {each.document or 'unnamed'}:{each.start_token} [[{_visible(each.text)}]]"
            for each in token.found[:SHOWN_CHUNKS]
        ]
        rows.append((_visible(token.text), f"{token.share:.1%}", "  ".join(found)))
    print_columns(("token", "memory", "read"), rows)


def _visible(text: str) -> str:
    """White space as signs, nothing that a terminal would obey."""
    return one_line(text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣"))
