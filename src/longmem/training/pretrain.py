"""``task = "pretrain"``: an ``AlibiGPT`` (or any causal model to go on from) on random windows of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longmem.data.tokenizer import load_tokenizer
from longmem.data.tokens import TokenCorpus
from longmem.data.windows import IGNORE, WindowSampler
from longmem.errors import BackboneError, ConfigError
from longmem.modeling.alibi_gpt import AlibiGPTForCausalLM
from longmem.modeling.copying import copy_loss, copy_score, random_tokens
from longmem.modeling.loading import load_backbone
from longmem.modeling.vocabulary import change_vocabulary, same_vocabulary
from longmem.training.backbone_shape import backbone_shape
from longmem.training.recipe import Recipe
from longmem.training.sharding import assign
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
        divided: the model stays on the CPU, until FSDP2 divides it.
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
        *,
        divided: bool = False,
    ) -> None:
        self.recipe, self.tokenizer, self.valid, self.device = recipe, tokenizer, valid, device
        self.model = build_model(recipe, tokenizer)
        if recipe.optim.gradient_checkpointing:
            _recompute(self.model)
        if not divided:
            self.model.to(device)  # type: ignore[arg-type]
        self.world = world
        self._compiled: Callable[..., Any] | None = None
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
        if self._compiled is None:
            self._compiled = torch.compile(model) if self.recipe.optim.compile else model
        losses = token_losses(self._compiled(input_ids=ids, use_cache=False).logits, targets)
        counted, practice = targets != IGNORE, batch.practice.to(self.device)[:, None]
        scores.text.add(losses, counted & ~practice)
        scores.practice.add(losses, counted & practice)
        count = counted.sum()
        if self.world > 1:
            # practice rows score fewer tokens: every target of all processes is to weigh the same
            count = reduce(count, reduction="sum") / self.world
        return losses.sum() / count.clamp(min=1)

    def after_backward(self) -> None:
        """Nothing waits for it."""

    def status(self) -> dict[str, Any]:
        """Passes over the corpus."""
        return {"epoch": round(self.sampler.epoch, 4)}

    @torch.no_grad()
    def evaluate(self, autocast: AbstractContextManager[Any], final: bool) -> dict[str, Any]:
        """Loss over windows spread evenly over the validation text, each read on its own, and the copy score."""
        result: dict[str, Any] = {}
        self.model.train(False)
        if self.valid is not None:
            scores = Scores()
            for ids, targets in self._valid_windows(self.valid):
                with autocast:
                    logits = self.model(input_ids=ids, use_cache=False).logits
                scores.add(token_losses(logits, targets), torch.ones_like(targets, dtype=torch.bool))
            result["loss"] = scores.mean
        if self.recipe.eval.copy_score:
            corpus = self.sampler.corpus if self.valid is None else self.valid
            result |= copy_scores(self.model, self.tokenizer, corpus, self.recipe.data.window)
        self.model.train()
        return result

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self.sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state["stream"])

    def dealt(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """All processes count the same windows."""
        return states[0]

    def weights(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        assign(self.trained(), weights)

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        names = {id(parameter): name for name, parameter in self.trained()}
        shared = self.model.named_parameters(remove_duplicate=False)
        state = self.model.state_dict() | {name: weights[names[id(parameter)]] for name, parameter in shared}
        self.model.save_pretrained(folder, state_dict=state)
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


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Fresh weights drawn from the global generator, or those of ``model.init`` with this tokenizer."""
    shape = recipe.model
    if shape.init is not None:
        try:
            model = load_backbone(shape.init, None, torch.float32)
        except BackboneError as error:
            raise BackboneError(f"model.init: {error}") from error
        set_dropout(model, recipe.optim.dropout)
        before = load_tokenizer(shape.init)
        return model if same_vocabulary(before, tokenizer) else change_vocabulary(model, before, tokenizer)
    if shape.vocab_size is not None and shape.vocab_size < len(tokenizer):
        raise ConfigError(f"model.vocab_size ({shape.vocab_size}) must be at least the tokenizer's ({len(tokenizer)})")
    config = backbone_shape(
        recipe,
        len(tokenizer),
        dropout=recipe.optim.dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AlibiGPTForCausalLM(config)


def _recompute(model: PreTrainedModel) -> None:
    """Recompute layers in backward, where the model can."""
    if not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"optim.gradient_checkpointing is true, but {type(model).__name__} cannot recompute its layers; set it to "
            "false and take fewer optim.rows with more optim.accumulate"
        )
    model.gradient_checkpointing_enable()


def copy_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: TokenCorpus, window: int, passages: int = 4
) -> dict[str, float | int]:
    """How well a model copies, and whether its keys are worth remembering yet: passages of half a window, read twice.

    Returns:
        ``copy_gain``: nats per token saved on the second pass over text; ``copy_gain_random``: over random tokens;
        ``copy_rank``: median rank of the right key over text, best head of the best layer; ``copy_layer``: that layer.
    """
    length = max(2, window // 2)
    starts = np.random.default_rng(0).integers(0, max(1, corpus.num_tokens - length), passages)
    text = torch.from_numpy(np.stack([corpus.ids[s : s + length].astype(np.int64) for s in starts]))
    noise = random_tokens(len(tokenizer), passages, length, special=tokenizer.all_special_ids)
    scores = copy_score(model, text.to(model.device))
    first, second = copy_loss(model, noise.to(model.device))
    return {
        "copy_gain": scores.gain,
        "copy_gain_random": first - second,
        "copy_rank": scores.rank[scores.best_layer],
        "copy_layer": scores.best_layer,
    }
