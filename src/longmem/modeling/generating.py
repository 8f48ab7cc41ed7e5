"""``MemoryGenerationMixin``: transformers' own ``generate`` with memory, for texts of any length.

The decoding loops stay transformers' and see the whole text; the model sees the tokens in the local window
(``longmem.generation.window``). All that a call needs is among its arguments; nothing of it is kept on the model.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from longmem.config import LongMemGenerationConfig
from longmem.errors import ConfigError
from longmem.generation.window import LocalWindow, WindowPolicy, as_memory, open_window
from longmem.types import Memory

if TYPE_CHECKING:
    from longmem.modeling.backbone import Backbone

_OURS = ("memory", "memory_rows", "explain")  # arguments that an assistant model would not know


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
        read, rows = as_memory(memory, memory_rows, batch)
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
