"""Ask one system: likelihoods of options, and greedy continuations, after contexts that may be longer than its window.

What does not fit the window is read into memory by a system that has one, and is lost to the others.

B sequences of one batch · T window tokens · V vocabulary
"""

from __future__ import annotations

import copy
import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from longmem.data.tokens import token_ids
from longmem.errors import ConfigError
from longmem.memory import MemoryBank
from longmem.progress import track
from longmem.types import AttentionKV, Memory

Tokens = tuple[int, ...]
_TOGETHER = 256  # queries whose inputs are laid out at one time
_WORTH = 512  # tokens that take longer than the calls that save them


class LongText(Protocol):
    """A text that is read into memory in its own way, because reading it whole for each prompt would take too long.

    ``digest`` is the hash of its tokens. It is in the one row of the memory while what ``open`` gives is open.
    """

    @property
    def digest(self) -> str: ...

    def open(self, asker: Asker) -> AbstractContextManager[Memory]: ...


@dataclass(frozen=True)
class Prompt:
    """What one system is asked about one example.

    Attributes:
        contexts: the options are scored after each of them, the first is continued. As much of the end of a context as
            fits is in the window.
        options: each at least one token.
        new_tokens: to generate; 0 generates nothing.
        memory: text before the context that only memory can hold (demonstrations, sessions). A full-context system has
            it in front of the context, a system without memory never sees it.
    """

    contexts: tuple[Tokens, ...]
    options: tuple[Tokens, ...] = ()
    new_tokens: int = 0
    memory: Tokens | LongText = ()


class Scored(NamedTuple):
    """The options of a prompt after one context.

    ``logprobs`` of each option in nats, summed over its tokens; ``greedy``: whether each token of the option is the
    model's first choice; ``next_token``: the model's first choice right after the context.
    """

    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]
    next_token: int

    @property
    def best(self) -> int:
        """Number of the likeliest option, of equal ones the first."""
        return self.logprobs.index(max(self.logprobs))


class Answer(NamedTuple):
    """``scored``: one for each context of the prompt; ``said``: the tokens generated, up to the end of text."""

    scored: tuple[Scored, ...] = ()
    said: Tokens = ()


@dataclass(frozen=True)
class Asker:
    """One of the systems that are compared: a model with its memory and its window.

    Attributes:
        name: its key in results: ``backbone``, ``memory_off``, ``memory_<tokens>``, ``control``, ``memtrm_off``,
            ``memtrm_<tokens>``, ``training_free_<share>_<tokens>``, ``window_<tokens>``, ``full_<tokens>``.
        label: its name for people.
        identity: what its numbers depend on, hashed into the key of its records.
        model: any causal language model, or one that can read memory.
        memory_size: tokens of memory a row holds; None is no memory.
        window: T; also the length of the segments in which text is read into memory.
        rows: B.
        whole: ``memory`` of a prompt is put in front of its context, as far as the window goes.
        recall: passages that text search finds are put into the window, at most so many.
    """

    name: str
    label: str
    identity: dict[str, Any]
    model: Any
    memory_size: int | None = None
    tokenizer: Any = None
    window: int = 1024
    rows: int = 8
    whole: bool = False
    recall: int = 0

    def bank(self, rows: int, longest: int) -> MemoryBank | None:
        """A fresh bank for texts of at most ``longest`` tokens; None where there is no memory, or nothing to read."""
        if self.memory_size is None or longest == 0:
            return None
        chunk = self.model.config.chunk_size
        # a bank larger than the longest text is never filled: do not reserve it
        return MemoryBank.for_model(self.model, rows, min(self.memory_size, -(-longest // chunk) * chunk))

    @property
    def reads_memory(self) -> bool:
        return self.memory_size is not None

    def ask(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        """Answer prompts; those with equal memory share one reading of it, and what is equal is asked once.

        Yields:
            (number of the prompt, answer), in the order in which they are done.

        Raises:
            ConfigError: an option is empty, or leaves no room in the window for a context.
        """
        places: dict[Query, list[tuple[int, int]]] = {}
        found: list[list[Any]] = []
        for number, prompt in enumerate(prompts):
            queries = list(self._queries(prompt))
            found.append([None] * len(queries))
            for place, query in enumerate(queries):
                places.setdefault(query, []).append((number, place))
        for query, result in self._answers(list(places)):
            for number, place in places[query]:
                found[number][place] = result
                if None not in found[number]:
                    generated = bool(prompts[number].new_tokens)
                    scored = tuple(found[number][:-1] if generated else found[number])
                    yield number, Answer(scored, found[number][-1] if generated else ())

    def seen(self, prompt: Prompt) -> tuple[str, bool]:
        """Hash of all that the system sees, so that prompts which differ only beyond its window and memory have one;
        and whether anything goes to memory: else the answer is that of the same model without memory."""
        found, remembers = hashlib.sha256(), False
        for memory, context, options, new in self._queries(prompt):
            remembers |= memory != ()
            found.update(array("q", memory).tobytes() if isinstance(memory, tuple) else memory.digest.encode())
            found.update(f"|{new}|".encode())
            for tokens in (context, *options):
                found.update(array("q", tokens).tobytes() + b"|")
        return found.hexdigest()[:16], remembers

    def _queries(self, prompt: Prompt) -> Iterator[Query]:
        """One query for each context with options, and one for the continuation, cut where the window begins."""
        if prompt.options:
            longest = max(map(len, prompt.options))
            if min(map(len, prompt.options)) == 0 or longest > self.window:
                raise ConfigError(
                    f"every option must have 1 to {self.window} tokens (the window), not {longest}; cut or drop it, or "
                    "pass a larger --window"
                )
            for context in prompt.contexts:
                # the last token of an option is scored and never read, so that it takes no room
                yield self._query(prompt, context, longest - 1, prompt.options, 0)
        if prompt.new_tokens:
            if prompt.new_tokens >= self.window:
                raise ConfigError(f"new tokens ({prompt.new_tokens}) must be fewer than the window ({self.window})")
            yield self._query(prompt, prompt.contexts[0], prompt.new_tokens, (), prompt.new_tokens)

    def _query(self, prompt: Prompt, context: Tokens, room: int, options: tuple[Tokens, ...], new: int) -> Query:
        memory = prompt.memory
        if not isinstance(memory, tuple):
            return Query(memory if self.reads_memory else (), context[room - self.window :], options, new)
        text = (*memory, *context) if self.whole else context
        cut = max(0, len(text) - (self.window - room))
        before = () if not self.reads_memory else memory if not cut else (*memory, *text[:cut])
        return Query(before, text[cut:] if cut else text, options, new)

    def _answers(self, queries: Sequence[Query]) -> Iterator[tuple[Query, Any]]:
        """Queries of equal memory together, and so many memories in one bank that a batch is full."""
        groups: dict[Any, list[Query]] = {}
        for query in queries:
            groups.setdefault(query.memory, []).append(query)
        for text in [before for before in groups if not isinstance(before, tuple)]:
            with text.open(self) as memory:
                yield from self._pack(groups.pop(text), memory, {text: 0})
        # nothing to remember first, then by length: rows of about the same length are read together
        waiting = sorted(groups, key=len)
        while waiting:
            chosen: list[Tokens] = []
            load = 0
            while waiting and load < self.rows:
                chosen.append(waiting.pop(0))
                load += sum(max(1, len(query.options)) for query in groups[chosen[-1]])
            rows = {before: row for row, before in enumerate(chosen)}
            together = [query for before in chosen for query in groups[before]]
            yield from self._pack(together, self.read(chosen), rows)

    @torch.no_grad()
    def _pack(
        self, queries: Sequence[Query], memory: Memory | None, row: dict[Any, int]
    ) -> Iterator[tuple[Query, Any]]:
        """Queries whose memories are rows of one: score the options of each, or continue it."""

        def reads(some: Iterable[Query]) -> dict[str, Any]:
            rows = torch.tensor([row[query.memory] for query in some])
            return {} if memory is None else {"memory": memory, "memory_rows": rows}

        for at in range(0, len(queries), _TOGETHER):
            yield from self._score_all(queries[at : at + _TOGETHER], row, reads)
        continued = sorted((query for query in queries if query.new_tokens), key=lambda query: -len(query.context))
        for at in range(0, len(continued), self.rows):
            waiting = continued[at : at + self.rows]
            yield from zip(waiting, self._continue(waiting, reads(waiting)), strict=True)

    def _score_all(self, queries: Sequence[Query], row: dict[Any, int], reads: Any) -> Iterator[tuple[Query, Scored]]:
        """Score the options of queries; a beginning that several inputs share goes through the model once."""
        # what goes through the model, and the numbers of the options that it scores: those of equal inputs
        sequences: list[_Sequence] = []
        for query in queries:
            alike: dict[Tokens, list[int]] = {}
            for number, tokens in enumerate(query.options):
                alike.setdefault(tokens[:-1], []).append(number)
            sequences += [_Sequence(query, (*query.context, *read), numbers) for read, numbers in alike.items()]
        scores: dict[int, list[Any]] = {}
        for some, shared in _beginnings(sequences, row):
            begun = self._begin(some[0].inputs[:shared], reads([some[0].query])) if shared else None
            shared = shared if begun is not None else 0
            some.sort(key=lambda sequence: -len(sequence.inputs))
            for at in range(0, len(some), self.rows):
                batch = some[at : at + self.rows]
                # the logits of the last token of a context score the first of an option
                first = min(len(query.context) for query, _, _ in batch) - 1 - shared
                tails = [inputs[shared:] for _, inputs, _ in batch]
                logits = self._logits(tails, first, begun, reads(query for query, _, _ in batch))
                for (query, inputs, numbers), of_row in zip(batch, logits, strict=True):
                    # by id: hashing a query reads all of its text
                    mine = scores.setdefault(id(query), [None] * len(query.options))
                    start = len(query.context) - 1 - shared - first
                    _score(of_row[start : len(inputs) - shared - first], query, numbers, mine)
                    if None not in mine:
                        yield query, _scored(mine)

    def _begin(self, tokens: Tokens, reads: dict[str, Any]) -> DynamicCache | None:
        """The cache of a beginning; None of a model that does not go on from one with several tokens at once."""
        if getattr(self.model, "_is_stateful", False):
            return None
        ids = torch.tensor([tokens], device=self.model.device)
        cache = getattr(self.model(input_ids=ids, logits_to_keep=1, use_cache=True, **reads), "past_key_values", None)
        return cache if type(cache) is DynamicCache else None  # those of single models hold states too

    def _logits(self, tails: Sequence[Tokens], first: int, begun: DynamicCache | None, reads: dict[str, Any]) -> Tensor:
        """Logits (B, T - first, V) of the last tokens of each row, which go on from ``begun``."""
        ids, _ = padded(tails, self.model.device)
        keep, cache = ids.shape[1] - first, copy.deepcopy(begun)
        if cache is not None:
            cache.batch_repeat_interleave(len(tails))
            reads = reads | {"past_key_values": cache}
        out = self.model(input_ids=ids, logits_to_keep=keep, use_cache=cache is not None, **reads)
        return cast(Tensor, out.logits[:, -keep:])

    def _continue(self, batch: Sequence[Query], reads: dict[str, Any]) -> Iterator[Tokens]:
        # padded on the left, so that every continuation begins at one position
        prompts, real = padded([query.context for query in batch], self.model.device, "left")
        end = self.tokenizer.eos_token_id
        generated = self.model.generate(
            input_ids=prompts,
            attention_mask=real.long(),
            max_new_tokens=max(query.new_tokens for query in batch),
            do_sample=False,
            num_beams=1,
            eos_token_id=end,
            pad_token_id=end if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id,
            **reads,
        )
        for query, ids in zip(batch, generated[:, prompts.shape[1] :].tolist(), strict=True):
            yield tuple((ids[: ids.index(end) + 1] if end in ids else ids)[: query.new_tokens])

    @torch.no_grad()
    def read(self, texts: Sequence[Tokens]) -> MemoryBank | None:
        """A bank with a row for each text, read segment by segment, all rows in one batch; None where there is nothing
        to read, or the system has no memory."""
        bank, window = self.bank(len(texts), max(map(len, texts))), self.window
        if bank is None:
            return None
        # segments that memory would have evicted by the end are not read: they do not change what is in it, unless
        # they end within a chunk
        over = [max(0, len(text) - bank.capacity_tokens) if window % bank.chunk_size == 0 else 0 for text in texts]
        kept = [text[tokens // window * window :] for text, tokens in zip(texts, over, strict=True)]
        starts = range(0, max(map(len, kept)), window)
        for start in track(starts, "reading into memory", len(starts), "segments"):
            parts = {row: text[start : start + window] for row, text in enumerate(kept) if len(text) > start}
            ids, real = padded(list(parts.values()), self.model.device)
            kv = self.model.encode(ids, real.long())
            bank.add(AttentionKV(kv.keys, kv.values, real), rows=torch.tensor(list(parts)))
        bank.end_document(torch.arange(len(texts)))
        return bank


def _score(logits: Tensor, query: Query, numbers: Sequence[int], scores: list[Any]) -> None:
    """Score the options that these logits (T, V) predict: log probability, whether it is greedy, the first choice."""
    logprobs = logits.float().log_softmax(-1)
    best = logprobs.argmax(-1)
    for number in numbers:
        option = torch.tensor(query.options[number], device=best.device)
        logprob = logprobs.gather(1, option[:, None]).double().sum().item()
        scores[number] = (logprob, bool((best == option).all()), int(best[0]))


def _scored(scores: list[Any]) -> Scored:
    logprobs, greedy, choices = zip(*scores, strict=True)
    return Scored(logprobs, greedy, choices[0])


class Query(NamedTuple):
    """One thing asked: ``memory`` is read, ``context`` is in the window; options to score, or new tokens."""

    memory: Any
    context: Tokens
    options: tuple[Tokens, ...]
    new_tokens: int


class _Sequence(NamedTuple):
    """A context with the beginning of an option, and the numbers of the options that it scores."""

    query: Query
    inputs: Tokens
    numbers: list[int]


def _beginnings(sequences: Iterable[_Sequence], row: dict[Any, int]) -> list[tuple[list[_Sequence], int]]:
    """Groups of sequences over one row of memory that begin alike, and how many tokens they share, to be read once.

    Those where that saves little, or less than half of the tokens, are one group, with 0.
    """
    groups: list[tuple[tuple[int, int], list[_Sequence], int]] = []
    # short contexts and long ones may begin alike too: apart, the long ones share more
    keyed = (((row[each.query.memory], len(each.inputs).bit_length()), each) for each in sequences)
    for kind, one in sorted(keyed, key=lambda pair: (pair[0], pair[1].inputs)):  # neighbours begin alike
        most = len(one.query.context) - 1  # the logits of the last token score an option
        if groups and groups[-1][0] == kind:
            _, some, shared = groups[-1]
            less = min(shared, most, _alike(some[-1].inputs, one.inputs))
            if 2 * less > len(one.inputs) and len(some) * less > (len(some) - 1) * shared:
                groups[-1] = kind, [*some, one], less
                continue
        groups.append((kind, [one], most))
    alone, found = list[_Sequence](), []
    for _, some, shared in groups:
        saved = (len(some) - 1) * shared
        if saved > max(_WORTH, sum(len(each.inputs) for each in some) / 2):
            found.append((some, shared))
        else:
            alone += some
    return [*found, (alone, 0)]


def _alike(one: Tokens, other: Tokens) -> int:
    """How many tokens both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


# tokens


def padded(rows: Sequence[Sequence[int]], device: torch.device | str, side: str = "right") -> tuple[Tensor, Tensor]:
    """Ids (B, T), padded at their ends where a causal model cannot look, and which are real (B, T) bool."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    real = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    together, which = (pad_sequence(each, batch_first=True, padding_side=side) for each in (ids, real))
    return together.to(device), which.to(device)


def encode(tokenizer: Any, text: str) -> Tokens:
    """Token ids without special ones."""
    return tuple(token_ids(tokenizer, text))


def encode_after(tokenizer: Any, before: str, texts: Sequence[str]) -> list[Tokens]:
    """Token ids of texts, without special ones, as they are after another text.

    Some tokenizers put a space sign before every beginning, which is none where a text goes on.
    """
    if not texts:
        return []
    ahead = encode(tokenizer, before)
    joined = tokenizer([before + text for text in texts], add_special_tokens=False, verbose=False)["input_ids"]
    if all(tuple(ids[: len(ahead)]) == ahead for ids in joined):
        return [tuple(ids[len(ahead) :]) for ids in joined]
    return [encode(tokenizer, text) for text in texts]
