"""Conversations: prompts from messages, passages of memory read once more, and what was said kept.

Used by ``longmem chat``, ``longmem demo`` and the server; no state is kept between two calls but in the store.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError

from longmem.errors import DataError, first_line
from longmem.generation.page import Readings
from longmem.store import MemoryStore
from longmem.store.recall import Recall, RecalledPassage

Message = dict[str, str]
"""``role`` (``system``, ``user`` or ``assistant``) and ``content``."""


class Prompt(NamedTuple):
    """What a model continues."""

    ids: list[int]
    recalled: list[RecalledPassage]
    """The passages that were put into it."""


class Reply(NamedTuple):
    """An answer."""

    text: str
    recalled: list[RecalledPassage]
    """Passages that were put into the window."""
    read: list[Any]
    """``ChunkReading`` of the chunks that heads read, each with its largest share of an output, largest first."""


def chat_prompt(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    recall: Recall | None = None,
    passages: int = 5,
    without: Sequence[str] = (),
) -> Prompt:
    """Messages as the model's chat template has them, or plainly where it has none, up to the answer to be given.

    Args:
        messages: oldest first; the last is the one to answer.
        recall: where passages are looked up that share words with the last message; None leaves them out.
        passages: how many at most; together they have at most ``NOTES_TOKENS`` tokens.
        without: documents whose passages are not wanted, such as this very conversation.
    """
    notes, found = "", list[RecalledPassage]()
    if recall is not None:
        notes, found = recall.notes(messages[-1]["content"], tokenizer, passages, without=without)
    said = list(messages)
    if notes and said[0]["role"] == "system":
        said[0] = {"role": "system", "content": f"{said[0]['content']}\n\n{notes}"}
    elif notes:
        said.insert(0, {"role": "system", "content": notes})
    if _templated(tokenizer):
        return Prompt(_through_template(tokenizer, said), found)
    lines = [f"{message['role'].capitalize()}: {message['content']}" for message in said]
    ids = tokenizer("\n".join([*lines, "Assistant:"]), add_special_tokens=False)["input_ids"]
    begin = getattr(tokenizer, "bos_token_id", None)
    return Prompt(ids if begin is None else [begin, *ids], found)


@torch.no_grad()
def reply(
    model: Any,
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    bank: Any = None,
    recall: Recall | None = None,
    passages: int = 5,
    without: Sequence[str] = (),
    **settings: Any,
) -> Reply:
    """Answer the last message; heads read ``bank``, ``settings`` are those of ``generate``; see ``chat_prompt``."""
    prompt = chat_prompt(tokenizer, messages, recall=recall, passages=passages, without=without)
    ids, ends, readings = torch.tensor([prompt.ids], device=model.device), stop_words(tokenizer), Readings()
    settings |= {"stop_strings": ends, "tokenizer": tokenizer} if ends else {}
    settings |= {"memory": bank, "explain": readings} if bank is not None else {}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = model.generate(ids, pad_token_id=pad, **settings)
    said = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    for end in ends:
        said = said.removesuffix(end)
    chunks = sorted((chunk for reading in readings for chunk in reading.chunks), key=lambda chunk: chunk.share)
    best = {(chunk.origin.document, chunk.origin.start_token): chunk for chunk in chunks}
    return Reply(said.strip(), prompt.recalled, sorted(best.values(), key=lambda chunk: -chunk.share))


def _through_template(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Token ids of messages; a template that refuses a system message has it before the first question."""
    ways, (first, *rest) = [messages], messages
    if first["role"] == "system" and rest:
        ways.append([{**rest[0], "content": f"{first['content']}\n\n{rest[0]['content']}"}, *rest[1:]])
    for way in ways:
        try:
            ids: list[int] = tokenizer.apply_chat_template(way, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
            return ids
        except TemplateError as error:
            problem = error
    raise DataError(
        f"the model's chat template refuses these messages ({first_line(problem)}); let user and assistant take turns"
    ) from problem


def _templated(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def stop_words(tokenizer: Any) -> list[str]:
    """What ends an answer besides the model's own end token: without a template the next speaker's name."""
    return [] if _templated(tokenizer) else ["\nUser:", "\nSystem:", "\nAssistant:"]


def transcript(messages: Sequence[Message]) -> str:
    """Messages as a document of the memory keeps them: a line for each, so that each can be found by itself."""
    return "".join(f"{message['role']}: {' '.join(message['content'].split())}\n" for message in messages)


def conversation_name() -> str:
    """A name for the document of a new conversation, in the order of time."""
    moment = time.time()
    return time.strftime("chat-%Y%m%d-%H%M%S", time.gmtime(moment)) + f"-{int(moment % 1 * 1e6):06}"


def keep(store: MemoryStore, namespace: str, name: str, messages: Sequence[Message]) -> None:
    """Append messages to a conversation's document, or begin it."""
    add = store.append if store.has(namespace, name) else store.add_document
    add(namespace, transcript(messages), name=name)
