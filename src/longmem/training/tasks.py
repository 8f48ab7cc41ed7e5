"""What the loop trains: the face that pre-training and adaptation have in common, and their losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from longmem.data.windows import IGNORE


@dataclass
class Scores:
    """Sums of losses (nats) and of the tokens they are over; kept on the device, so that adding never waits."""

    loss: Tensor | float = 0.0
    count: Tensor | float = 0.0

    def add(self, losses: Tensor, counted: Tensor) -> None:
        """Add the losses (B, T) at the tokens ``counted`` (B, T) bool."""
        self.loss = self.loss + (losses.detach() * counted).sum()
        self.count = self.count + counted.sum()

    def gather(self, device: torch.device) -> None:
        """Add up all processes; every one then has the sums."""
        self.loss, self.count = summed((self.loss, self.count), device)

    @property
    def mean(self) -> float:
        """Nats per token; NaN over no token."""
        count = float(self.count)
        return float(self.loss) / count if count else float("nan")


@dataclass
class StepScores:
    """What is added up between two log lines.

    Attributes:
        text: losses of ordinary text.
        practice: losses of copy-practice rows, pre-training only.
    """

    text: Scores = field(default_factory=Scores)
    practice: Scores = field(default_factory=Scores)

    def gather(self, accelerator: Accelerator) -> None:
        """Add up all processes; every one then has the sums."""
        if accelerator.num_processes == 1:
            return
        parts = (self.text.loss, self.text.count, self.practice.loss, self.practice.count)
        text_loss, text_count, practice_loss, practice_count = summed(parts, accelerator.device)
        self.text, self.practice = Scores(text_loss, text_count), Scores(practice_loss, practice_count)


class Task(Protocol):
    """One kind of training; the loop knows nothing else of it."""

    tokenizer: PreTrainedTokenizerBase
    tokens_per_batch: int

    @property
    def model(self) -> nn.Module:
        """What runs; one object for the whole run."""
        ...

    def describe(self) -> str:
        """One line for people: what is trained on what."""
        ...

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that change, by name; nothing else of ``model`` ever does."""
        ...

    def loss(self, model: nn.Module, scores: StepScores) -> Tensor:
        """Take the next batch through ``model`` (which may be wrapped); mean loss, ()."""
        ...

    def after_backward(self) -> None:
        """What may happen only once gradients are computed: memory is written."""
        ...

    def status(self) -> dict[str, Any]:
        """Further numbers of a log record."""
        ...

    def evaluate(self, autocast: AbstractContextManager[Any], final: bool) -> dict[str, Any]:
        """Losses on the validation text; empty without such text. All processes take part and get the same."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Position and memory of this process."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def dealt(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """This process's state, made from those of another number of processes.

        Raises:
            CheckpointError: they cannot be divided so.
        """
        ...

    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold of the model."""
        ...

    def load_weights(self, weights: Mapping[str, Tensor]) -> None: ...

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """The finished model, with these undivided ``weights``, and its tokenizer."""
        ...


def summed(values: Sequence[Tensor | float], device: torch.device) -> tuple[Tensor, ...]:
    """Each value's sum over all processes."""
    from accelerate.utils import reduce

    mine = torch.stack([torch.as_tensor(value, dtype=torch.float64, device="cpu") for value in values])
    return tuple(reduce(mine.to(device), reduction="sum").unbind())


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy per token.

    Args:
        logits: (B, T, V), any float type; scored in fp32.
        targets: (B, T) long, -100 where nothing is scored.

    Returns:
        (B, T) float32, 0 where nothing is scored.
    """
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none", ignore_index=IGNORE)
    return losses.view_as(targets)


def set_dropout(module: nn.Module, probability: float) -> None:
    """Give every dropout below ``module`` this probability, those written as a plain number included."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = probability
        for name in ("attention_dropout", "dropout", "activation_dropout"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, probability)


def runs_bf16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bfloat16; ``auto`` does where the hardware multiplies in it.

    A CPU without such instructions emulates them: at width 256 a step then takes fifteen times longer than in fp32.
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512" and _cpu_multiplies_bf16()


def _cpu_multiplies_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def storage_dtype(name: str | None) -> torch.dtype | None:
    """``bfloat16`` -> ``torch.bfloat16``; None and ``auto`` stay None."""
    return None if name in (None, "auto") else getattr(torch, str(name))
