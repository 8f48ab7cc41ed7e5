"""Pre-training: an ``AlibiGPT`` on random windows of text."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from accelerate.utils import reduce
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from longmem.data.stream import IGNORE, WindowBatch, WindowSampler
from longmem.data.tokens import TokenCorpus
from longmem.progress import Progress
from longmem.training.trainer import Scores, StreamTrainer, token_losses


class Pretrainer(StreamTrainer):
    """Trains every weight of a causal language model; evaluations read ``eval_tokens`` of ``valid``."""

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        sampler: WindowSampler,
        valid: TokenCorpus | None,
        eval_tokens: int,
        quiet: bool,
        **trainer: Any,
    ) -> None:
        super().__init__(model, args, stream=sampler, **trainer)
        self.valid, self.eval_tokens, self.quiet = valid, eval_tokens, quiet

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross entropy, in nats, over the targets of all processes; practice rows score fewer tokens."""
        batch: WindowBatch = inputs
        device = self.args.device
        ids, targets = batch.ids.to(device), batch.targets.to(device)
        out = model(input_ids=ids, use_cache=False)
        losses = token_losses(out.logits, targets)
        counted, practice = targets != IGNORE, batch.practice.to(device)[:, None]
        self.scores.add(losses, counted & ~practice)
        self.practice.add(losses, counted & practice)
        count = counted.sum()
        if self.args.world_size > 1:
            count = reduce(count, reduction="sum") / self.args.world_size
        loss = losses.sum() / count.clamp(min=1)
        return (loss, out) if return_outputs else loss

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Loss over windows spread evenly over the validation text, each read on its own."""
        if self.valid is None:
            return {}
        model: Any = self.accelerator.unwrap_model(self.model)
        model.train(False)
        scores, window, rows = Scores(), self.stream.window, self.args.per_device_eval_batch_size
        fits = max(1, (self.valid.num_tokens - 1) // window)
        wanted = min(fits, max(1, self.eval_tokens // window))
        starts = np.unique(np.linspace(0, fits - 1, wanted).astype(np.int64)) * window
        with Progress("validating", self.eval_tokens, "tokens", quiet=self.quiet) as progress:
            for some in np.split(starts, range(rows, len(starts), rows)):
                windows = np.stack([self.valid.ids[start : start + window + 1].astype(np.int64) for start in some])
                tokens = torch.from_numpy(windows).to(self.args.device)
                ids, targets = tokens[:, :-1], tokens[:, 1:]
                with self.accelerator.autocast():
                    losses = token_losses(model(input_ids=ids, use_cache=False).logits, targets)
                scores.add(losses, torch.ones_like(targets, dtype=torch.bool))
                progress.advance(ids.numel())
        return self.told({f"{metric_key_prefix}_loss": scores.mean})
