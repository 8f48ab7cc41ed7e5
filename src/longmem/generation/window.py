"""``generate`` with memory, for text of any length: the oldest tokens of a running ``generate`` move to memory.

``read`` and ``remember`` write a text to a session; ``LocalWindow`` does so with what leaves the window.
``MemoryGenerationMixin`` puts it into transformers' own ``generate``. The decoding loops stay transformers' and see the
whole text; the model sees the tokens in the local window. All that a call needs is among its arguments; nothing of it
is kept on the model.

B rows of the batch · T tokens of the text so far · t tokens that the model sees next
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, GenerationConfig, GenerationMixin, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from longmem.config import LongMemGenerationConfig, positions, usual_window
from longmem.errors import ConfigError, MemoryBankError
from longmem.memory.session import JoinedMemory, SessionMemory, rows_under
from longmem.types import AttentionKV, Memory, check_memory

TOKENS_AT_ONCE = 8192  # encoded together: enough to keep a device busy, little beside what a forward pass holds
THIS_TEXT = "(this text)"
"""The document name of a text's own earlier part."""


def read(model: Any, session: SessionMemory, ids: Tensor, *, document: str, row: int = 0) -> int:
    """Read a whole text (t,) into a row of a session, window by window; returns how many tokens were written.

    ``document`` is the name of the text in provenances.
    """
    ids = _one_text(session, ids)
    session.end_document(torch.tensor([row]))
    write(model, [(session, row, ids, 0)], usual_window(model.config.backbone_config), document)
    session.end_document(torch.tensor([row]))
    return len(ids)


def remember(model: Any, session: SessionMemory, ids: Tensor, *, row: int = 0) -> int:
    """Write the part of a text to its session that ``generate`` has left in the local window; returns how many tokens.

    Afterwards the session holds the whole text, so a session over a store can be committed. ``generate`` may go on
    with the text; its window then begins after what is written. ``ids`` (t,) are of the whole text, including the part
    that is in the session already.
    """
    ids = _one_text(session, ids)
    known = already_written(session, row, ids)
    write(model, [(session, row, ids[known:], known)], usual_window(model.config.backbone_config), THIS_TEXT)
    session.bank.end_document(torch.tensor([row]))  # the last chunk is found then, although it is not full
    return len(ids) - known


def _one_text(session: Any, ids: Any) -> Tensor:
    """The tokens (t,) of one text, or (1, t) as a tokenizer gives them; else a MemoryBankError."""
    if not isinstance(session, SessionMemory):
        given = type(session).__name__
        raise MemoryBankError(f"a text goes to a session, not to a {given}; make SessionMemory.for_model(model, bank)")
    try:
        tokens: Tensor = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):  # a text, rows of unequal length
        raise MemoryBankError(f"ids (a {type(ids).__name__}) must be the token ids (t,) of one text") from None
    if tokens.dim() != 1 and tokens.shape[:-1] != (1,):
        raise MemoryBankError(f"ids ({tuple(tokens.shape)}) must be the token ids (t,) of one text")
    return tokens.reshape(-1).long()


def already_written(session: SessionMemory, row: int, ids: Tensor) -> int:
    """How many tokens of a text (t,) its session holds already; another text ends the one before it."""
    known = session.followed(row)
    if torch.equal(known, ids[: len(known)].cpu()):
        return len(known)
    session.end_document(torch.tensor([row]))
    return 0


@torch.no_grad()
def write(model: Any, texts: Sequence[tuple[SessionMemory, int, Tensor, int]], size: int, document: str) -> None:
    """Encode texts in pieces of ``size``, the last of each may be shorter, and write them to their sessions.

    ``texts``: session, its row, tokens (t,), and the place of the first of them in the document.
    """
    pieces = [
        (session, torch.tensor([row]), piece, offset + number * size)
        for session, row, ids, offset in texts
        for number, piece in enumerate(ids.split(size) if len(ids) else ())
    ]
    for length, alike in groupby(pieces, key=lambda piece: len(piece[2])):  # pieces of several rows go together
        while batch := list(islice(alike, max(1, TOKENS_AT_ONCE // length))):
            kv = model.encode(torch.stack([ids for _, _, ids, _ in batch]).to(model.device))
            for (session, row, ids, place), *pair in zip(batch, kv.keys.split(1), kv.values.split(1), strict=True):
                session.add(AttentionKV(*pair), rows=row, documents=[document], offsets=[place], ids=[ids])


@dataclass(frozen=True)
class WindowPolicy:
    """The window's part of ``LongMemGenerationConfig`` with the defaults filled in.

    Attributes:
        window: most tokens attended to directly.
        move: oldest tokens that move together.
        session_tokens: most tokens that moved text takes in memory.
    """

    window: int
    move: int
    session_tokens: int

    @classmethod
    def of(cls, settings: Any, model: Any, memory: Memory | None) -> WindowPolicy | None:
        """The policy for a model and its memory; None where nothing limits the text."""
        chunk = model.config.chunk_size if memory is None else memory.chunk_size
        limit = positions(model.config.backbone_config)
        window, move, capacity = (getattr(settings, n, None) for n in ("window", "window_move", "session_tokens"))
        window = limit if window is None else window
        if window is None:
            return None
        move = max(chunk, window // 2 // chunk * chunk) if move is None else move
        capacity = model.config.memory_size // chunk * chunk if capacity is None else capacity
        policy = cls(int(window), int(move), int(capacity))
        if problems := policy._problems(chunk, limit):
            raise ConfigError(problems)
        return policy

    def pieces_over(self, local: int) -> int:
        """How many pieces must move so that ``local`` tokens fit the window."""
        return max(0, -(-(local - self.window) // self.move))

    def _problems(self, chunk: int, limit: int | None) -> list[str]:
        window, move, capacity = self.window, self.move, self.session_tokens
        found, multiple = [], f"must be a multiple of the memory's chunk size ({chunk}); try"
        if window < 2 * chunk:
            found.append(f"window ({window}) must hold two chunks of {chunk} tokens; try {2 * chunk}")
        elif limit is not None and window > limit:
            found.append(f"window ({window}) must not exceed the backbone's {limit} positions; try {limit}")
        if move < 1 or move % chunk:
            found.append(f"window_move ({move}) {multiple} {max(chunk, round(move / chunk) * chunk)}")
        elif move >= window:
            found.append(f"window_move ({move}) must leave something in the window ({window}); try {window // 2}")
        if capacity < chunk or capacity % chunk:
            found.append(f"session_tokens ({capacity}) {multiple} {max(chunk, capacity // chunk * chunk)}")
        return found


class LocalWindow:
    """Cuts every input of the model to the window and moves what is older to the session.

    How much of a row has moved depends on the length of its text alone; rows of different lengths are left-padded. So
    a row of a batch is that row alone, and generating in two calls is generating in one.

    Args:
        memory: a session, or sessions joined; is written, with what the model's ``encode`` makes.
        rows: the memory's row of every batch row.
        input_ids: (B, T), the prompts, left-padded.
        attention_mask: (B, T), or None.
    """

    def __init__(
        self,
        model: Any,
        memory: SessionMemory | JoinedMemory,
        rows: Sequence[int],
        policy: WindowPolicy,
        input_ids: Tensor,
        attention_mask: Tensor | None,
    ) -> None:
        self.model, self.memory, self.rows, self.policy = model, memory, list(rows), policy
        # the session, and the row of it, that each batch row is written to
        self._places: list[tuple[Any, int]] = [
            (memory.banks[row], 0) if isinstance(memory, JoinedMemory) else (memory, row) for row in rows
        ]
        self._width = input_ids.shape[1]
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self._prompts = [line[keep.bool()] for line, keep in zip(input_ids, real, strict=True)]
        # an earlier call may have moved some, never the last token: the model has yet to see it
        pairs = zip(self._places, self._prompts, strict=True)
        self._starts = [already_written(*place, ids[:-1]) for place, ids in pairs]
        self._ended = [False] * len(self.rows)
        self._cached = False  # whether the cache holds the window's beginning
        self._move(input_ids)

    def inputs(
        self, input_ids: Tensor, cache: Cache | None, next_sequence_length: int | None
    ) -> tuple[Tensor, Tensor | None, Tensor, int | None]:
        """What to feed for texts (B, T) that begin with the prompts; moves what no longer fits.

        Returns:
            the ids (B, t), their attention mask (B, cached + t) or None where nothing is padded, their positions
            (B, t), and how many of them are new to the cache, None for all.
        """
        moved = self._move(input_ids)
        lengths = self._lengths(input_ids)
        width = max(lengths)
        pads = torch.tensor([[width - length] for length in lengths], device=input_ids.device)
        place = torch.arange(width, device=input_ids.device)
        mask = (place >= pads).long() if min(lengths) < width else None
        positions = (place - pads).clamp(min=0)
        if self._cached and not moved and cache is not None and next_sequence_length is not None:
            return input_ids, mask, positions[:, -next_sequence_length:], next_sequence_length
        if cache is not None:
            cache.reset()
        self._cached = True
        texts = [self._text(input_ids, line)[-length:] for line, length in enumerate(lengths)]
        return pad_sequence(texts, batch_first=True, padding_side="left"), mask, positions, None

    def watched(self, criteria: StoppingCriteriaList) -> StoppingCriteriaList:
        """The same criteria, which also tell the window which rows have ended: the pads after an end are no text."""
        for each in criteria:
            if isinstance(each, MaxLengthCriteria):
                each.max_position_embeddings = None  # it would warn of positions that the window never reaches
        return _Watched(criteria, self._ended)

    def _lengths(self, input_ids: Tensor) -> list[int]:
        """Tokens of each row that have not moved."""
        grown = input_ids.shape[1] - self._width
        return [len(ids) + grown - start for ids, start in zip(self._prompts, self._starts, strict=True)]

    def _text(self, input_ids: Tensor, line: int) -> Tensor:
        """(T,) all tokens of a row without its pads."""
        return torch.cat((self._prompts[line], input_ids[line, self._width :]))

    def _move(self, input_ids: Tensor) -> bool:
        """Move what no longer fits; returns whether anything moved."""
        counts, texts = [self.policy.pieces_over(length) for length in self._lengths(input_ids)], []
        for line, count in enumerate(counts):
            begin = self._starts[line]
            self._starts[line] += count * self.policy.move
            if count and not self._ended[line]:
                text = self._text(input_ids, line)[begin : self._starts[line]]
                texts.append((*self._places[line], text, begin))
        write(self.model, texts, self.policy.move, THIS_TEXT)
        return any(counts)


class _Watched(StoppingCriteriaList):
    def __init__(self, criteria: StoppingCriteriaList, ended: list[bool]) -> None:
        super().__init__(criteria)
        self._ended = ended

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        done = super().__call__(input_ids, scores, **kwargs)
        self._ended[:] = [before or now for before, now in zip(self._ended, done.tolist(), strict=True)]
        return done


def open_window(
    model: Any,
    memory: Memory | None,
    memory_rows: Tensor | None,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    settings: Any,
) -> LocalWindow | None:
    """The window of a ``generate`` about to start; None where the whole text fits and no session follows it.

    ``memory_rows`` (B,) are the memory's rows of the prompts (B, T); ``settings`` have all lengths filled in. A memory
    that is a session is written, too.
    """
    policy = WindowPolicy.of(settings, model, memory)
    longest = settings.max_length - 1  # the last token is not read
    each = memory.banks if isinstance(memory, JoinedMemory) else [memory]
    is_session = all(isinstance(one, SessionMemory) for one in each) and len(set(map(id, each))) == len(each)
    if policy is None or (not is_session and longest <= policy.window):
        return None
    rows = list(range(input_ids.shape[0]))
    if not is_session:
        chunk = model.config.chunk_size if memory is None else memory.chunk_size
        capacity = min(policy.session_tokens, -(-longest // chunk) * chunk)
        memory = SessionMemory.for_model(model, memory, len(rows), capacity, memory_rows)
    elif memory_rows is not None:
        rows = memory_rows.tolist()
        if len(set(rows)) < len(rows) and longest > policy.window:
            raise MemoryBankError(
                f"the session's rows ({rows}) must each follow one text; give every sequence a row of its own, or pass "
                "the memory without a session"
            )
    return LocalWindow(model, cast("SessionMemory | JoinedMemory", memory), rows, policy, input_ids, attention_mask)


_OURS = ("memory", "memory_rows", "explain")  # arguments that an assistant model would not know


class MemoryGenerationMixin(GenerationMixin):
    """``generate(..., memory=...)`` for a model with a ``backbone``; everything else is transformers' own."""

    backbone: Any
    config: Any

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        memory: Memory | Sequence[Memory | None] | None = None,
        memory_rows: Tensor | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue the prompts (B, T), reading memory; all arguments of ``GenerationMixin.generate`` hold.

        The caller's memory is never written, unless it is a session. Text that leaves the local window (see
        ``LongMemGenerationConfig``) goes to a session over it, which is dropped when this call ends; pass a
        ``SessionMemory`` to keep it, and to go on with the same text later.

        Args:
            memory: what every row of the batch searches, or a list of memories, one (or None) for each prompt.
            memory_rows: (B,) the memory's row of every prompt; None is row b for prompt b, or the one row there is.
                Beams and ``num_return_sequences`` read what their prompt reads.

        Raises:
            MemoryBankError: if the memory has neither one row nor one for every prompt and ``memory_rows`` is None.
            ConfigError: if the settings of the window contradict each other, or if the text outgrows the window in a
                way of decoding that cannot move text to memory (beams, assisted decoding, embeddings, a filled cache).
        """
        if not isinstance(self.generation_config, LongMemGenerationConfig):
            self.generation_config = LongMemGenerationConfig.over(self.generation_config)
        given = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        # without a prompt generate begins with one beginning-of-sequence token
        batch = next((len(each) for each in given if each is not None), 1)
        read = JoinedMemory(memory) if isinstance(memory, Sequence) else memory
        check_memory(read)
        if memory_rows is None and read is not None:
            memory_rows = rows_under(read, batch, "the batch", "memory_rows")
        rows = None if memory_rows is None else torch.as_tensor(memory_rows)
        return super().generate(inputs, *args, memory=read, memory_rows=rows, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        local_window: LocalWindow | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What the backbone makes of the tokens in the window: families differ in masks and positions."""
        if local_window is not None:
            local = local_window.inputs(input_ids, past_key_values, next_sequence_length)
            input_ids, kwargs["attention_mask"], kwargs["position_ids"], next_sequence_length = local
        kwargs |= {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds}
        prepare = self.backbone.model.prepare_inputs_for_generation
        return {**prepare(input_ids, next_sequence_length=next_sequence_length, **kwargs), "keep": False}

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """No cache need be longer than the window. Here the text's length is known: refuse what cannot outgrow it."""
        policy = WindowPolicy.of(generation_config, self, model_kwargs.get("memory"))
        if policy is not None and max_cache_length > policy.window:
            reason = None
            if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
                reason = f"{generation_mode.value.replace('_', ' ')} takes back what it tries"
            elif known := _known_without_ids(model_kwargs):
                reason = f"the token ids behind {known} are unknown"
            if reason is not None:
                raise ConfigError(
                    f"{reason}, so the text ({max_cache_length} tokens) must fit the window ({policy.window}); ask for "
                    "fewer new tokens, shorten the prompt, or pass input_ids alone and num_beams=1"
                )
            max_cache_length = policy.window
        return super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    @functools.wraps(GenerationMixin._sample)  # ``generate`` reads the signature
    def _sample(  # type: ignore[override]
        self,
        input_ids: Tensor,
        *,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Any:
        """transformers' loop, with a window and the session it writes to among the model's arguments if need be."""
        window = None
        if not _known_without_ids(kwargs):
            memory, rows, mask = (kwargs.get(name) for name in ("memory", "memory_rows", "attention_mask"))
            window = open_window(self, memory, rows, input_ids, mask, generation_config)
        if window is not None:
            generation_config.prefill_chunk_size = None  # the window is read at once; what is before it never is
            kwargs |= {"memory": window.memory, "memory_rows": torch.tensor(window.rows)}
            kwargs |= {"local_window": window, "position_ids": None}
            stopping_criteria = window.watched(stopping_criteria)
        return super()._sample(  # type: ignore[misc]
            input_ids,  # type: ignore[arg-type]
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            **kwargs,
        )

    def _get_candidate_generator(  # type: ignore[override]
        self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> Any:
        """An assistant reads no memory: it need not be a model of ours, and only guesses."""
        known = {name: value for name, value in model_kwargs.items() if name not in _OURS}
        return super()._get_candidate_generator(*args, model_kwargs=known, **kwargs)  # type: ignore[misc]


def _known_without_ids(kwargs: dict[str, Any]) -> str | None:
    """The argument that brings text as something other than token ids."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, Cache) and cache.get_seq_length() > 0:
        return "past_key_values with tokens in it"
    return "inputs_embeds" if kwargs.get("inputs_embeds") is not None else None
