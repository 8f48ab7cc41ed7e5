"""The backbone that a recipe trains from scratch."""

from __future__ import annotations

from typing import Any

from longmem.modeling.alibi_gpt import AlibiGPTConfig
from longmem.training.recipe import Recipe


def backbone_shape(recipe: Recipe, vocab_size: int | None = None, **settings: Any) -> AlibiGPTConfig:
    """Its configuration.

    Args:
        recipe: ``[model]`` says its shape, ``data.window`` how many positions it has.
        vocab_size: of the tokenizer, where the recipe does not name one; None is the size that it asks for.
        settings: further ones of ``AlibiGPTConfig``.
    """
    shape = recipe.model
    return AlibiGPTConfig(
        vocab_size=shape.vocab_size or vocab_size or recipe.data.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate_size,
        activation=shape.activation,
        layer_norm_epsilon=shape.layer_norm_epsilon,
        max_position_embeddings=recipe.data.window,
        **settings,
    )
