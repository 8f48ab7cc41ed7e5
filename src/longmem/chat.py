"""Conversations: prompts from messages, passages of memory read once more, and what was said kept.

Used by ``longmem chat`` and by the server; no state is kept between two calls but in the store.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from longmem.generation.page import Readings
from longmem.store.recall import NOTES_TOKENS, Recall, RecalledPassage

Message = dict[str, str]
"""``role`` (``system``, ``user`` or ``assistant``) and ``content``."""


@dataclass(frozen=True)
class Prompt:
    """What a model continues.

    Attributes:
        ids: token ids.
        recalled: the passages that were put into it.
    """

    ids: list[int]
    recalled: tuple[RecalledPassage, ...] = ()


def chat_prompt(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    recall: Recall | None = None,
    passages: int = 5,
    budget: int = NOTES_TOKENS,
    without: Sequence[str] = (),
) -> Prompt:
    """Messages as the model's chat template has them, or plainly where it has none, up to the answer to be given.

    Args:
        tokenizer: of the model.
        messages: oldest first; the last is the one to answer.
        recall: where passages are looked up that share words with the last message; None leaves them out.
        passages: how many at most.
        budget: tokens that they may take together.
        without: documents whose passages are not wanted, such as this very conversation.
    """
    notes, found = "", list[RecalledPassage]()
    if recall is not None and messages:
        query = messages[-1]["content"]
        notes, found = recall.notes(query, tokenizer, passages, budget=budget, without=without)
    said = [dict(message) for message in messages]
    if notes:
        if said[0]["role"] == "system":
            said[0]["content"] += "\n\n" + notes
        else:
            said.insert(0, {"role": "system", "content": notes})
    return Prompt(_ids(tokenizer, said), tuple(found))


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: what is said.
        recalled: passages that were put into the window.
        read: the chunks that heads read with the largest share of an output, largest first.
    """

    text: str
    recalled: tuple[RecalledPassage, ...]
    read: tuple[Any, ...]


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
    """Answer the last message.

    Args:
        model: a model of ours.
        tokenizer: of it.
        messages: oldest first.
        bank: what the heads read; None is no memory.
        recall, passages, without: see ``chat_prompt``.
        **settings: of ``generate``.
    """
    prompt = chat_prompt(tokenizer, messages, recall=recall, passages=passages, without=without)
    ids = torch.tensor([prompt.ids], device=model.device)
    ends, readings = stop_words(tokenizer), Readings()
    more = {"stop_strings": ends, "tokenizer": tokenizer} if ends else {}
    more |= {"memory": bank, "explain": readings} if bank is not None else {}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = model.generate(ids, pad_token_id=pad, **settings, **more)
    said = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    for end in ends:
        said = said.removesuffix(end)
    best: dict[tuple[Any, int], Any] = {}
    for chunk in (chunk for reading in readings for chunk in reading.chunks):
        at = (chunk.origin.document, chunk.origin.start_token)
        if at not in best or best[at].share < chunk.share:
            best[at] = chunk
    return Reply(said.strip(), prompt.recalled, tuple(sorted(best.values(), key=lambda chunk: -chunk.share)))


def _ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        encoded = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
        return [int(token) for token in encoded["input_ids"]]
    lines = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
    ids = tokenizer("\n".join([*lines, "Assistant:"]), add_special_tokens=False)["input_ids"]
    begin = getattr(tokenizer, "bos_token_id", None)
    return [*([] if begin is None else [begin]), *ids]


def stop_words(tokenizer: Any) -> list[str]:
    """What ends an answer besides the model's own end token: without a template the next speaker's name."""
    return [] if getattr(tokenizer, "chat_template", None) else ["\nUser:", "\nSystem:", "\nAssistant:"]


def transcript(messages: Sequence[Message]) -> str:
    """Messages as a document of the memory keeps them: a line for each, so that each can be found by itself."""
    return "".join(f"{message['role']}: {' '.join(message['content'].split())}\n" for message in messages)


def conversation_name(now: float | None = None) -> str:
    """A name for the document of a new conversation, in the order of time."""
    moment = time.time() if now is None else now
    return time.strftime("chat-%Y%m%d-%H%M%S", time.gmtime(moment)) + f"-{int(moment % 1 * 1e6):06}"


def keep(store: Any, namespace: str, name: str, messages: Sequence[Message]) -> int:
    """Append messages to a conversation's document, or begin it; returns the tokens that were added."""
    text = transcript(messages)
    known = {info.name: info.tokens for info in store.documents(namespace)} if namespace in store.namespaces() else {}
    if name in known:
        return int(store.append(namespace, text, name=name).tokens) - int(known[name])
    return int(store.add_document(namespace, text, name=name).tokens)
