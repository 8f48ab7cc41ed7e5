"""What transformers' own ``generate`` needs to know about memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin

from longmem.errors import MemoryBankError
from longmem.types import Memory

if TYPE_CHECKING:
    from longmem.modeling.backbone import Backbone


class MemoryGeneration(GenerationMixin):
    """``generate(..., memory=...)`` for a model with a ``backbone``; everything else is transformers' own."""

    if TYPE_CHECKING:
        backbone: Backbone

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        memory: Memory | None = None,
        memory_rows: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue the prompts (B, T), reading memory and never writing it.

        Args:
            inputs: as in ``GenerationMixin.generate``, whose further arguments all hold.
            memory: what every row of the batch searches.
            memory_rows: (B,) the memory's row of every prompt; None is row b for prompt b, or the one row there is.
                Beams and ``num_return_sequences`` read what their prompt reads.

        Raises:
            MemoryBankError: if the memory has neither one row nor one for every prompt and ``memory_rows`` is None.
        """
        if memory is not None and memory_rows is None:
            memory_rows = rows_for(memory, _batch(inputs, kwargs))
        return super().generate(inputs, *args, memory=memory, memory_rows=memory_rows, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What the backbone makes of it: families differ in masks and positions."""
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

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """An assistant gets the prompt and no memory: it need not be a LongMem, and is only a guess."""
        ours = ("memory", "memory_rows")
        kwargs["model_kwargs"] = {k: v for k, v in kwargs["model_kwargs"].items() if k not in ours}
        return super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]


def rows_for(memory: Memory, batch: int) -> Tensor:
    """(B,) the memory's row of every prompt where nobody says: its own, or the only one."""
    rows = getattr(memory, "rows", batch)
    if rows not in (1, batch):
        raise MemoryBankError(
            f"the memory has {rows} rows, the batch {batch} prompts; pass memory_rows= to say which row each one reads"
        )
    return torch.zeros(batch, dtype=torch.long) if rows == 1 else torch.arange(batch)


def _batch(inputs: Tensor | None, kwargs: dict[str, Any]) -> int:
    for given in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")):
        if isinstance(given, Tensor):
            return int(given.shape[0])
    return 1  # generate begins with one beginning-of-sequence token
