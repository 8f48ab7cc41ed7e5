"""``AlibiGPT``: the paper's own backbone, GPT-2*, as a registered transformers model.

One norm feeds attention and feed-forward in parallel, positions enter as ALiBi alone, and the head is untied and has a
bias. Module names are those of the released checkpoint behind ``decoder.model.``.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class AlibiGPTConfig(PreTrainedConfig):
    """Shape of an ``AlibiGPT``; the defaults are the paper's 407M GPT-2* (section 4.1).

    Args:
        intermediate_size: width of the feed-forward; None is four times ``hidden_size``.
        max_position_embeddings: the window the model is trained on, in tokens. ALiBi itself sets no limit.
        dropout: on the outputs of attention and feed-forward, in training only.
        initializer_range: standard deviation of fresh weights; output projections are scaled down by sqrt(2L).
    """

    model_type = "alibi_gpt"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 51200
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int | None = None
    layer_norm_epsilon: float = 1e-6
    activation: str = "gelu_new"
    max_position_embeddings: int = 1024
    dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 0
    pad_token_id: int | None = 1
    eos_token_id: int | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**{**kwargs, "tie_word_embeddings": False})  # type: ignore[no-untyped-call]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.hidden_size // self.num_attention_heads


def alibi_slopes(heads: int) -> Tensor:
    """The slope of each head, (H,) float32 (Press et al. 2022; released code for H that is no power of two)."""
    closest = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / closest) for i in range(closest)]
    slopes += [2 ** (-8 * (i + 0.5) / closest) for i in range(heads - closest)]
    return torch.tensor(slopes)


def eager_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """Attention written out: heads (B, T, H, D) and their weights (B, H, T, T_keys)."""
    scores = torch.matmul(query, key.transpose(-1, -2)).float() * scaling + attention_mask.float()
    weights = scores.softmax(dim=-1).to(value.dtype)
    return torch.matmul(weights, value).transpose(1, 2), weights


class AlibiGPTAttention(nn.Module):
    """Bias-free projections, scores scaled by D^-0.5, ALiBi added by the mask."""

    def __init__(self, config: AlibiGPTConfig, layer_idx: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def project(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values (B, H, T, D) of (B, T, C)."""
        shape = (*hidden.shape[:-1], self.num_heads, self.head_dim)
        return tuple(each(hidden).view(shape).transpose(1, 2) for each in (self.q_proj, self.k_proj, self.v_proj))

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None = None
    ) -> Tensor:
        queries, keys, values = self.project(hidden_states)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        mask = None if attention_mask is None else attention_mask.to(queries.dtype)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(str(self.config._attn_implementation), eager_attention_forward)
        out, _ = attend(self, queries, keys, values, mask, scaling=self.scaling)
        return cast(Tensor, self.out_proj(out.flatten(2)))


class AlibiGPTMLP(nn.Module):
    """fc_in, activation, fc_out, both with bias."""

    def __init__(self, config: AlibiGPTConfig) -> None:
        super().__init__()
        inner = cast(int, config.intermediate_size)
        self.fc_in = nn.Linear(config.hidden_size, inner)
        self.fc_out = nn.Linear(inner, config.hidden_size)
        # the same function as "gelu_new" in one kernel instead of eight, a third of a small model's step on a CPU
        self.act = ACT2FN["gelu_pytorch_tanh" if config.activation == "gelu_new" else config.activation]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return cast(Tensor, self.fc_out(self.act(self.fc_in(hidden_states))))


class AlibiGPTBlock(nn.Module):
    """h + Attention(n) + FFN(n) with n = LayerNorm(h): one norm, two branches in parallel."""

    def __init__(self, config: AlibiGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = AlibiGPTAttention(config, layer_idx)
        self.mlp = AlibiGPTMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, past_key_values: Cache | None = None) -> Tensor:
        normed = self.ln_1(hidden_states)
        branches = self.attn(normed, attention_mask=attention_mask, past_key_values=past_key_values) + self.mlp(normed)
        return cast(Tensor, hidden_states + self.dropout(branches))


class AlibiGPTPreTrainedModel(PreTrainedModel):
    config_class = AlibiGPTConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "wte"
    _no_split_modules = ["AlibiGPTBlock"]  # noqa: RUF012  the base class declares it so
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if isinstance(module, AlibiGPTBlock):
            # GPT-2's rule: the sum of 2L branches keeps the variance of one
            scale = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            for projection in (module.attn.out_proj, module.mlp.fc_out):
                nn.init.normal_(projection.weight, std=scale)


class AlibiGPTModel(AlibiGPTPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: AlibiGPTConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(AlibiGPTBlock(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """(B, T) ids -> (B, T, C) after the final norm. ``attention_mask`` (B, T_past + T) is 0 at pads."""
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        hidden: Tensor = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        mask = self._mask(hidden, attention_mask, past_key_values)
        states = []
        for block in self.h:
            states.append(hidden)
            hidden = block(hidden, attention_mask=mask, past_key_values=past_key_values)
        hidden = self.ln_f(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*states, hidden) if output_hidden_states else None,
        )

    def _mask(self, hidden: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
        """Causal mask and ALiBi in one additive bias, (B or 1, H, T, T_keys) float32.

        The distance form ``-slope * (i - j)`` equals the released code's ``slope * j`` under the softmax, but stays
        small near the diagonal, so that half precision keeps it.
        """
        past = int(cache.get_seq_length()) if cache is not None else 0
        length, device = past + hidden.shape[1], hidden.device
        # a static cache hands over all its slots, used or not; the causal rule hides those still to come
        slots = int(cache.get_mask_sizes(hidden.shape[1], 0)[0]) if cache is not None else length
        key = torch.arange(slots, device=device)
        query = key[past:length, None]
        positions, unseen = key[None], key > query
        if attention_mask is not None and not bool(attention_mask.all()):
            real = F.pad(attention_mask.bool(), (0, slots - attention_mask.shape[1]), value=True)
            positions = (real.long().cumsum(-1) - 1).clamp(min=0)
            # a pad still sees itself, so that its (unused) row of the softmax stays finite
            unseen = unseen | (~real[:, None, None, :] & (key != query))
        slopes = alibi_slopes(self.config.num_attention_heads).to(device)
        distance = (positions[:, past:length, None] - positions[:, None, :]).to(slopes.dtype)
        bias = -slopes.view(1, -1, 1, 1) * distance[:, None]
        return bias.masked_fill(unseen, torch.finfo(bias.dtype).min)


class AlibiGPTForCausalLM(AlibiGPTPreTrainedModel, GenerationMixin):
    """``AlibiGPTModel`` with its own, untied head with bias."""

    def __init__(self, config: AlibiGPTConfig) -> None:
        super().__init__(config)
        self.transformer = AlibiGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()  # type: ignore[no-untyped-call]

    @staticmethod
    def create_masks_for_generate(*, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """``generate`` with a static cache would build a mask without ALiBi; the model builds its own."""
        return attention_mask

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits (B, T, V); with ``labels`` (B, T) also their mean cross entropy in nats, shifted inside."""
        out = self.transformer(
            input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, output_hidden_states
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )


AutoConfig.register("alibi_gpt", AlibiGPTConfig, exist_ok=True)
AutoModelForCausalLM.register(AlibiGPTConfig, AlibiGPTForCausalLM, exist_ok=True)
