"""Pre-training: an ``AlibiGPT``, or any causal model to go on from, on random windows of text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from longmem.data.stream import IGNORE, WindowBatch, WindowSampler
from longmem.data.tokens import TokenCorpus
from longmem.modeling.copying import copy_loss, random_tokens, retrieval_by_layer
from longmem.progress import Progress
from longmem.training.trainer import Scores, StreamTrainer, token_losses


class Pretrainer(StreamTrainer):
    """Trains every weight of a causal language model.

    Evaluations read ``eval_tokens`` of ``valid``, and with ``copy`` also measure how well the model copies from its
    context.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        sampler: WindowSampler,
        valid: TokenCorpus | None,
        eval_tokens: int,
        copy: bool,
        quiet: bool,
        **trainer: Any,
    ) -> None:
        super().__init__(model, args, stream=sampler, **trainer)
        self.valid, self.eval_tokens, self.copy, self.quiet = valid, eval_tokens, copy, quiet

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
        """Loss over windows spread evenly over the validation text, each read on its own, and the copy score."""
        metrics: dict[str, float] = {}
        model: Any = self.accelerator.unwrap_model(self.model)
        model.train(False)
        if self.valid is not None:
            scores, window, rows = Scores(), self.stream.window, self.args.per_device_eval_batch_size
            fits = max(1, (self.valid.num_tokens - 1) // window)
            wanted = min(fits, max(1, self.eval_tokens // window))
            starts = np.unique(np.linspace(0, fits - 1, wanted).astype(np.int64)) * window
            with Progress("validating", self.eval_tokens, "tokens", quiet=self.quiet) as progress:
                for first in range(0, len(starts), rows):
                    tokens = _passages(self.valid, starts[first : first + rows], window + 1).to(self.args.device)
                    ids, targets = tokens[:, :-1], tokens[:, 1:]
                    with self.accelerator.autocast():
                        losses = token_losses(model(input_ids=ids, use_cache=False).logits, targets)
                    scores.add(losses, torch.ones_like(targets, dtype=torch.bool))
                    progress.advance(ids.numel())
            metrics[f"{metric_key_prefix}_loss"] = scores.mean
        if self.copy:
            corpus = self.stream.corpus if self.valid is None else self.valid
            devices = [self.args.device] if self.args.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                found = copy_scores(model, self.tokenizer, corpus, self.stream.window)
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        return self.told(metrics)

    def save_weights(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Weights that are tied have both their names."""
        model: Any = self.accelerator.unwrap_model(self.model)
        names = {id(parameter): name for name, parameter in self.trained()}
        shared = model.named_parameters(remove_duplicate=False)
        super().save_weights(folder, model.state_dict() | {n: weights[names[id(weight)]] for n, weight in shared})


def copy_scores(model: PreTrainedModel, tokenizer: Any, corpus: TokenCorpus, window: int) -> dict[str, float]:
    """How well a model copies, and whether its keys are worth remembering yet: passages of half a window, read twice.

    Returns:
        ``copy_gain``: nats per token saved on the second pass over text; ``copy_gain_random``: over random tokens;
        ``copy_rank``: median rank of the right key over text, best head of the best layer; ``copy_layer``: that layer.
    """
    length = max(2, window // 2)
    starts = np.random.default_rng(0).integers(0, max(1, corpus.num_tokens - length), 4)
    text = _passages(corpus, starts, length)
    noise = random_tokens(len(tokenizer), 4, length, special=tokenizer.all_special_ids)
    gains = [first - second for first, second in (copy_loss(model, each.to(model.device)) for each in (text, noise))]
    heads = retrieval_by_layer(model, text.to(model.device), segment=length)
    rank = {layer: found.rank.min().item() for layer, found in heads.items()}
    best = min(rank, key=lambda layer: rank[layer])
    return {"copy_gain": gains[0], "copy_gain_random": gains[1], "copy_rank": rank[best], "copy_layer": best}


def _passages(corpus: TokenCorpus, starts: Any, length: int) -> Tensor:
    """Token ids (n, length), or less of a shorter corpus."""
    return torch.from_numpy(np.stack([corpus.ids[start : start + length].astype(np.int64) for start in starts]))
