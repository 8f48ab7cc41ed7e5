"""``longmem chat``: a conversation in the terminal that remembers earlier ones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from longmem.cli.common import counted, layout_of, load_model, load_tokenizer, one_line, read_text, say
from longmem.cli.options import FOLDER, checked, options
from longmem.errors import LongMemError

HELP = """/remember FILE  read a text into memory     /memories  what is remembered
/forget NAME    forget a document           /why       what the last answer read
/quit           end"""


@click.command(
    short_help="Talk with a model that remembers.",
    epilog="Example: longmem chat models/small/sidenet --memory memory -n ann",
)
@click.argument("model", required=False)
@click.option("--memory", "folder", type=FOLDER, default="memory", help="The store.")
@options("namespace", "tokenizer", "device")
@click.option("--no-keep", is_flag=True, help="Do not keep what is said.")
@click.option("--recall", type=click.IntRange(min=0), default=5, help="Passages read once more.")
@click.option("--system", help="What the model is told first.")
@click.option("--max-new-tokens", "-m", type=click.IntRange(min=1), default=256)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0)
@options("seed")
def command(model: str | None, folder: Path, namespace: str, temperature: float, **given: Any) -> None:
    """Talk with MODEL; by default what the store was made with, in a new one SmolLM2-135M-Instruct, fetched once.

    It answers line by line, from the conversation, from memory, and from passages that share words with the question.

    Everything that is said is kept as a document of the namespace, one for each conversation, and read by later ones;
    --no-keep leaves it out. Lines that begin with / are for the program: /help lists them.
    """
    import torch

    from longmem.chat import conversation_name
    from longmem.store.store import MemoryStore

    loaded = load_model(model, layout_of(folder, writing=True), given["device"], default=True, closed=True)
    words = load_tokenizer(given["tokenizer"], loaded)
    settings: dict[str, Any] = {"max_new_tokens": given["max_new_tokens"], "do_sample": temperature > 0}
    if temperature > 0:
        torch.manual_seed(given["seed"])
        settings["temperature"] = temperature
    with MemoryStore.open(folder, model=loaded.model, tokenizer=words) as store:
        kept = None if given["no_keep"] else conversation_name()
        talk = _Talk(loaded.model, words, store, namespace, kept, given["recall"], settings)
        if system := given["system"]:
            talk.messages.append({"role": "system", "content": system})
        say(f"memory {folder}, namespace {namespace}: {counted(len(talk.documents()), 'document')}; /help, /quit")
        while (line := _line()) is not None:
            try:
                if line.startswith("/"):
                    if not talk.do(*line.split(maxsplit=1)):
                        break
                elif line:
                    talk.answer(checked(line, "the line"))
            except LongMemError as problem:  # one line that went wrong does not end the conversation
                say(f"error: {problem}")


class _Talk:
    """A conversation: its messages, and the document ``name`` that keeps them; None keeps nothing."""

    def __init__(
        self, model: Any, words: Any, store: Any, namespace: str, name: str | None, recall: int, settings: Any
    ) -> None:
        from longmem.store.recall import Recall

        self.model, self.words, self.store, self.namespace = model, words, store, namespace
        self.name, self.passages, self.settings = name, recall, settings
        self.messages: list[dict[str, str]] = []
        self.recall = Recall(store, namespace)
        self.reads = not getattr(model.config, "closed", False)
        self.why: list[str] = []

    def documents(self) -> list[Any]:
        """What is remembered."""
        return list(self.store.documents(self.namespace)) if self.namespace in self.store.namespaces() else []

    def answer(self, text: str) -> None:
        """Answer a line, on stdout as it comes, and keep both."""
        from transformers import TextStreamer

        from longmem.chat import keep, reply

        self.messages.append({"role": "user", "content": text})
        earlier = [info.name for info in self.documents() if info.name != self.name]
        said = reply(
            self.model,
            self.words,
            self.messages,
            bank=self.store.bank(self.namespace) if earlier and self.reads else None,
            recall=self.recall if self.passages and earlier else None,
            passages=self.passages,
            without=[self.name] if self.name else [],
            streamer=TextStreamer(self.words, skip_prompt=True, skip_special_tokens=True),
            **self.settings,
        )
        self.messages.append({"role": "assistant", "content": said.text})
        self.why = [f"passage  {each.document}: {one_line(each.text)}" for each in said.recalled]
        self.why += [
            f"heads    {each.origin.document} from token {each.origin.start_token}: {each.share:.1%} of the output"
            for each in said.read[:3]
        ]
        if self.name is not None:
            keep(self.store, self.namespace, self.name, self.messages[-2:])

    def do(self, verb: str, rest: str = "") -> bool:
        """A line for the program; False ends it."""
        if verb == "/quit":
            return False
        if verb == "/why":
            click.echo("\n".join(self.why) or "the last answer read no memory")
        elif verb == "/memories":
            for info in self.documents():
                click.echo(f"{info.name}  {info.tokens:,} tokens")
        elif verb == "/forget" and rest:
            report = self.store.forget(self.namespace, name=rest)
            click.echo(f"forgot {rest}: {counted(report.tokens, 'token')}")
        elif verb == "/remember" and rest:
            receipt = self.store.add_document(self.namespace, read_text(rest), name=Path(rest).name)
            click.echo(f"{receipt.status} {receipt.name}: {counted(receipt.tokens, 'token')}")
        else:
            click.echo(HELP)
        return True


def _line() -> str | None:
    """The next line; None at the end."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  line editing

        try:
            return input("> ").strip()
        except EOFError:
            return None
    line = sys.stdin.readline()
    return line.strip() if line else None
