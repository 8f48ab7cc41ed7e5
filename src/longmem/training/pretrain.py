"""``task = "pretrain"``: an ``AlibiGPT`` (or any causal model to go on from) on random windows of text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from longmem.data.tokens import TokenCorpus
from longmem.data.windows import IGNORE, WindowSampler
from longmem.errors import BackboneError
from longmem.modeling.alibi_gpt import AlibiGPTConfig, AlibiGPTForCausalLM
from longmem.training.recipe import Recipe
from longmem.training.tasks import Scores, StepScores, set_dropout, token_losses


class Pretraining:
    """See ``Task``. Every weight of the model is trained.

    Args:
        recipe: with ``task = "pretrain"``.
        tokenizer: decides the vocabulary.
        train: corpus to train on.
        valid: corpus of [eval]; may be None.
        device: where the model runs.
        rank: number of this process.
        world: number of processes.
    """

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        train: TokenCorpus,
        valid: TokenCorpus | None,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.recipe, self.tokenizer, self.valid, self.device = recipe, tokenizer, valid, device
        self.model: nn.Module = build_model(recipe, tokenizer).to(device)
        self.forward = torch.compile(self.model) if recipe.optim.compile else None
        data, optim = recipe.data, recipe.optim
        self.sampler = WindowSampler(
            train,
            data.window,
            optim.rows,
            recipe.run.seed,
            repeat_fraction=data.repeat_fraction,
            repeat_random=data.repeat_random,
            rank=rank,
            world=world,
            special_ids=3 if data.tokenizer is None else 0,
            vocab_size=len(tokenizer),
        )
        self.tokens_per_batch = optim.rows * data.window

    def describe(self) -> str:
        count = sum(weight.numel() for weight in self.model.parameters())
        corpus = self.sampler.corpus
        return f"pre-training {count:,} parameters on {corpus.num_tokens:,} tokens of {len(corpus):,} documents"

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()

    def loss(self, model: nn.Module, scores: StepScores) -> Tensor:
        batch = self.sampler.next()
        ids, targets = batch.ids.to(self.device), batch.targets.to(self.device)
        forward = self.forward if self.forward is not None and model is self.model else model
        losses = token_losses(forward(input_ids=ids, use_cache=False).logits, targets)
        counted, practice = targets != IGNORE, batch.practice.to(self.device)[:, None]
        scores.text.add(losses, counted & ~practice)
        scores.practice.add(losses, counted & practice)
        scores.extra["epoch"] = self.sampler.epoch
        return losses.sum() / counted.sum().clamp(min=1)

    def after_backward(self) -> None:
        """Nothing waits for it."""

    @torch.no_grad()
    def evaluate(self, autocast: AbstractContextManager[Any], final: bool) -> dict[str, Any]:
        """Loss over windows spread evenly over the validation text, each read on its own, and the copy score."""
        result: dict[str, Any] = {}
        self.model.eval()
        if self.valid is not None:
            scores = Scores()
            for ids, targets in self._valid_windows(self.valid):
                with autocast:
                    logits = self.model(input_ids=ids, use_cache=False).logits
                scores.add(token_losses(logits, targets), torch.ones_like(targets, dtype=torch.bool))
            result["loss"] = scores.mean
        if self.recipe.eval.copy_score:
            result |= copy_scores(self.model, self.tokenizer, self.valid or self.sampler.corpus, self.recipe)
        self.model.train()
        return result

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self.sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state["stream"])

    def weights(self) -> dict[str, Tensor]:
        return {name: weight for name, weight in self.model.named_parameters()}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        self.model.load_state_dict(weights, strict=False)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)  # type: ignore[operator]
        self.tokenizer.save_pretrained(str(folder))

    def _valid_windows(self, corpus: TokenCorpus) -> Iterator[tuple[Tensor, Tensor]]:
        window, rows = self.recipe.data.window, self.recipe.eval.rows
        fits = max(1, (corpus.num_tokens - 1) // window)
        wanted = min(fits, max(1, self.recipe.eval.tokens // window))
        starts = np.unique(np.linspace(0, fits - 1, wanted).astype(np.int64)) * window
        length = min(window, corpus.num_tokens - 1)
        for first in range(0, len(starts), rows):
            tokens = np.stack([corpus.ids[s : s + length + 1].astype(np.int64) for s in starts[first : first + rows]])
            batch = torch.from_numpy(tokens).to(self.device)
            yield batch[:, :-1], batch[:, 1:]


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """Fresh weights drawn from the global generator, or those of ``model.init``."""
    shape = recipe.model
    if shape.init is not None:
        try:
            model: nn.Module = AutoModelForCausalLM.from_pretrained(shape.init, dtype=torch.float32)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise BackboneError(f"model.init ({shape.init}) cannot be loaded ({reason}); name a folder or hub id") from error
        set_dropout(model, recipe.optim.dropout)
        return model
    config = AlibiGPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate_size,
        activation=shape.activation,
        layer_norm_epsilon=shape.layer_norm_epsilon,
        max_position_embeddings=recipe.data.window,
        dropout=recipe.optim.dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AlibiGPTForCausalLM(config)


def copy_scores(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, corpus: TokenCorpus, recipe: Recipe, passages: int = 4
) -> dict[str, float]:
    """How well a model copies from its context: passages are fed twice, first and second loss compared.

    Returns:
        ``copy_text_first``, ``copy_text_second``: nats per token of the first and second pass over passages of the corpus;
        ``copy_random_first``, ``copy_random_second``: the same over random tokens. Half a window each.
    """
    length = recipe.data.window // 2
    random = np.random.default_rng(0)
    starts = random.integers(0, max(1, corpus.num_tokens - length), passages)
    text = np.stack([corpus.ids[s : s + length].astype(np.int64) for s in starts])
    noise = random.integers(3, len(tokenizer), text.shape)
    result = {}
    device = next(model.parameters()).device
    for name, passage in (("text", text), ("random", noise)):
        ids = torch.from_numpy(np.concatenate([passage, passage], axis=1)).to(device)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = token_losses(logits, ids[:, 1:])
        # the first token of the second pass cannot be foreseen
        result[f"copy_{name}_first"] = float(losses[:, : passage.shape[1] - 1].mean())
        result[f"copy_{name}_second"] = float(losses[:, passage.shape[1] :].mean())
    return result
