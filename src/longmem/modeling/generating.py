"""What transformers' own ``generate`` needs to know about memory, and about text longer than the local window.

The decoding loops stay transformers': they see the whole text, the model sees what ``prepare_inputs_for_generation``
makes of it. Where the text outgrows the window, that is what ``longmem.generation.LocalWindow`` says.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin, StoppingCriteriaList
from transformers.utils import GENERATION_CONFIG_NAME

from longmem.config import LongMemGenerationConfig
from longmem.errors import ConfigError, MemoryBankError
from longmem.types import Memory

if TYPE_CHECKING:
    from longmem.generation import LocalWindow
    from longmem.modeling.backbone import Backbone

OURS = ("memory", "memory_rows", "explain", "local_window")
"""Arguments of ours among those of the model, which an assistant model would not know."""


def _windowed(name: str, *, moves: bool) -> Any:
    """transformers' decoding loop of that name, entered with a window where the text needs one.

    Args:
        moves: whether text may move to memory on the way. Beams and assisted decoding take back what they try.
    """
    original = getattr(GenerationMixin, name)

    @functools.wraps(original)  # ``generate`` reads the signature
    def loop(
        self: MemoryGenerationMixin,
        input_ids: Tensor,
        *,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Any:
        window = self._open_window(input_ids, generation_config, kwargs, moves=moves)
        if window is not None and moves:
            stopping_criteria = window.watched(stopping_criteria)
        return original(
            self, input_ids, stopping_criteria=stopping_criteria, generation_config=generation_config, **kwargs
        )

    return loop


class MemoryGenerationMixin(GenerationMixin):
    """``generate(..., memory=...)`` for a model with a ``backbone``; everything else is transformers' own."""

    if TYPE_CHECKING:
        backbone: Backbone
        config: Any

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        memory: Memory | Sequence[Memory | None] | None = None,
        memory_rows: Tensor | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue the prompts (B, T), reading memory.

        The caller's memory is never written, unless it is a session. Text that leaves the local window (see
        ``LongMemGenerationConfig``) goes to a session over it, which is gone when this call ends; pass a
        ``SessionMemory`` to keep it, and to go on with the same text later.

        Args:
            inputs: as in ``GenerationMixin.generate``, whose further arguments all hold.
            memory: what every row of the batch searches, or a list of memories, one (or None) for each prompt.
            memory_rows: (B,) the memory's row of every prompt; None is row b for prompt b, or the one row there is.
                Beams and ``num_return_sequences`` read what their prompt reads.

        Raises:
            MemoryBankError: if the memory has neither one row nor one for every prompt and ``memory_rows`` is None.
            ConfigError: if the settings of the window contradict each other, or what was asked for does not fit it.
        """
        from longmem.generation import as_memory

        if not isinstance(self.generation_config, LongMemGenerationConfig):
            self.generation_config = LongMemGenerationConfig.over(self.generation_config)
        searched = as_memory(memory)
        if memory_rows is not None:
            memory_rows = torch.as_tensor(memory_rows)
        elif searched is not None:
            memory_rows = rows_for(searched, _batch(inputs, kwargs))
        return super().generate(inputs, *args, memory=searched, memory_rows=memory_rows, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        local_window: LocalWindow | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What the backbone makes of the text in the window: families differ in masks and positions."""
        if local_window is not None:
            local = local_window.inputs(input_ids, past_key_values, next_sequence_length)
            input_ids, next_sequence_length = local.input_ids, local.next_sequence_length
            attention_mask, kwargs["position_ids"] = local.attention_mask, local.position_ids
        prepared = self.backbone.model.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        return cast("dict[str, Any]", prepared)

    def load_generation_config(self, folder: Path) -> None:
        """Take the settings saved in a checkpoint's folder, if it has any."""
        if (folder / GENERATION_CONFIG_NAME).is_file():
            self.generation_config = LongMemGenerationConfig.from_pretrained(folder)

    _sample = _windowed("_sample", moves=True)
    _beam_search = _windowed("_beam_search", moves=False)
    _assisted_decoding = _windowed("_assisted_decoding", moves=False)

    def _open_window(
        self, input_ids: Tensor, settings: GenerationConfig, kwargs: dict[str, Any], *, moves: bool
    ) -> LocalWindow | None:
        """Put a window, and the session it writes to, among the model's arguments if this run needs one."""
        from longmem.generation import open_window

        cache = kwargs.get("past_key_values")
        filled = isinstance(cache, Cache) and cache.get_seq_length() > 0
        if filled or kwargs.get("inputs_embeds") is not None:
            _refuse_beyond_window(self, settings, "past_key_values with tokens in it" if filled else "inputs_embeds")
            return None
        window = open_window(
            self,
            kwargs.get("memory"),
            kwargs.get("memory_rows"),
            input_ids,
            kwargs.get("attention_mask"),
            settings,
            copies=max(settings.num_beams or 1, settings.num_return_sequences or 1),
            moves=moves,
        )
        if window is not None:
            settings.prefill_chunk_size = None  # the window is read at once; what is before it never is
            rows = torch.tensor(window.rows)
            kwargs.update(memory=window.session, memory_rows=rows, local_window=window, position_ids=None)
        return window

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: Any, mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        """A static cache need not be longer than the window."""
        from longmem.generation import WindowPolicy

        memory = model_kwargs.get("memory")
        policy = WindowPolicy.of(
            generation_config, self, self.config.chunk_size if memory is None else memory.chunk_size
        )
        if policy is not None:
            max_cache_length = min(max_cache_length, policy.window)
        return super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, mode, batch_size, max_cache_length
        )

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """An assistant gets the text in the window and no memory: it need not be a LongMem, and is only a guess."""
        window: LocalWindow | None = kwargs["model_kwargs"].get("local_window")
        kwargs["model_kwargs"] = {k: v for k, v in kwargs["model_kwargs"].items() if k not in OURS}
        hidden = 0 if window is None or kwargs.get("assistant_model") is None else window.hidden()
        if not hidden:
            return super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]
        if kwargs["model_kwargs"].get("attention_mask") is not None:
            kwargs["model_kwargs"]["attention_mask"] = kwargs["model_kwargs"]["attention_mask"][:, hidden:]
        for name in ("input_ids", "inputs_tensor"):
            kwargs[name] = kwargs[name][:, hidden:]
        kwargs["generation_config"] = copy.deepcopy(kwargs["generation_config"])
        kwargs["generation_config"].max_length -= hidden
        return _LocalCandidates(super()._get_candidate_generator(*args, **kwargs), hidden)  # type: ignore[misc]


class _LocalCandidates:
    """A candidate generator that sees a text without its first ``hidden`` tokens."""

    def __init__(self, inner: Any, hidden: int) -> None:
        self._inner = inner
        self._hidden = hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        candidates, logits = self._inner.get_candidates(input_ids[:, self._hidden :], **kwargs)
        return torch.cat((input_ids[:, : self._hidden], candidates), dim=1), logits

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        self._inner.update_candidate_strategy(input_ids[:, self._hidden :], scores, num_matches)


def rows_for(memory: Memory, batch: int) -> Tensor:
    """(B,) the memory's row of every prompt where nobody says: its own, or the only one."""
    rows = getattr(memory, "rows", batch)
    if rows not in (1, batch):
        raise MemoryBankError(
            f"the memory has {rows} rows, the batch {batch} prompts; pass memory_rows= to say which row each one reads"
        )
    return torch.zeros(batch, dtype=torch.long) if rows == 1 else torch.arange(batch)


def _refuse_beyond_window(model: Any, settings: Any, what: str) -> None:
    from longmem.generation import WindowPolicy

    policy = WindowPolicy.of(settings, model, model.config.chunk_size)
    if policy is not None and settings.max_length - 1 > policy.window:
        raise ConfigError(
            f"{what} cannot go beyond the window ({policy.window} tokens): what leaves it must be known as token ids; "
            "pass input_ids and no filled cache, or ask for fewer new tokens"
        )


def _batch(inputs: Tensor | None, kwargs: dict[str, Any]) -> int:
    for given in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")):
        if isinstance(given, Tensor):
            return int(given.shape[0])
    return 1  # generate begins with one beginning-of-sequence token
