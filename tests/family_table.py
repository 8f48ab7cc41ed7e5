"""Tiny, random models of every supported family: the table that laws 9 to 13 are tested over."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from longmem import AlibiGPTConfig, AlibiGPTForCausalLM, MemoryBank

V, C, H, L = 97, 32, 4, 4

# fmt: off
_LLAMA = {
    "vocab_size": V, "hidden_size": C, "intermediate_size": 48, "num_hidden_layers": L, "num_attention_heads": H,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
_HYBRID = ["sliding_attention", "full_attention"] * (L // 2)
_GPT2 = {"vocab_size": V, "n_embd": C, "n_layer": L, "n_head": H, "n_positions": 128}
_NO_DROP = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_OPT = {
    "vocab_size": V, "hidden_size": C, "ffn_dim": 48, "num_hidden_layers": L, "num_attention_heads": H,
    "max_position_embeddings": 128, "dropout": 0.0,
}
_FALCON = {"vocab_size": V, "hidden_size": C, "num_hidden_layers": L, "num_attention_heads": H}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}

# name -> (model_type, config fields)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "alibi_gpt": ("alibi_gpt", {
        "vocab_size": V, "hidden_size": C, "num_hidden_layers": L, "num_attention_heads": H,
        "max_position_embeddings": 128,
    }),
    "gpt2": ("gpt2", {**_GPT2, **_NO_DROP}),
    "llama": ("llama", _LLAMA),
    "llama-yarn": ("llama", {**_LLAMA, "rope_parameters": _YARN}),
    "qwen2": ("qwen2", _LLAMA),
    "qwen3": ("qwen3", {**_LLAMA, "head_dim": 8}),
    "mistral-sliding": ("mistral", {**_LLAMA, "sliding_window": 8, "head_dim": 8}),
    "mixtral": ("mixtral", {**_LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": None}),
    "gemma2": ("gemma2", {
        **_LLAMA, "head_dim": 8, "query_pre_attn_scalar": 16, "sliding_window": 8, "layer_types": _HYBRID,
    }),
    "gemma3": ("gemma3_text", {**_LLAMA, "head_dim": 8, "sliding_window": 8, "layer_types": _HYBRID}),
    "gpt-neox": ("gpt_neox", {**_LLAMA, "num_key_value_heads": H, "rotary_pct": 0.5, "hidden_dropout": 0.0}),
    "opt": ("opt", {**_OPT, "word_embed_proj_dim": C}),
    "opt-post-norm": ("opt", {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "phi": ("phi", {**_LLAMA, "num_key_value_heads": H, "partial_rotary_factor": 0.5}),
    "phi3": ("phi3", _LLAMA),
    "stablelm": ("stablelm", {**_LLAMA, "use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "cohere": ("cohere", {**_LLAMA, "use_qk_norm": True}),
    "granite": ("granite", {**_LLAMA, "attention_multiplier": 0.2, "residual_multiplier": 0.7, "logits_scaling": 2.0}),
    "olmo2": ("olmo2", _LLAMA),
    "smollm3": ("smollm3", {**_LLAMA, "no_rope_layers": [1, 0, 1, 0]}),
    "bloom": ("bloom", {"vocab_size": V, "hidden_size": C, "n_layer": L, "n_head": H}),
    "mpt": ("mpt", {
        "vocab_size": V, "d_model": C, "n_layers": L, "n_heads": H, "expansion_ratio": 2, "max_seq_len": 128,
    }),
    "falcon-rope-gqa": ("falcon", {
        **_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False, "bias": False,
    }),
    "falcon-alibi": ("falcon", {
        **_FALCON, "multi_query": True, "new_decoder_architecture": False, "parallel_attn": True, "alibi": True,
        "bias": True,
    }),
    "gptj": ("gptj", {**_GPT2, **_NO_DROP, "rotary_dim": 4}),
    # hybrids: layers differ in kind, in the names of their parts, and in Gemma 4 in head size
    "qwen3.5": ("qwen3_5_text", {
        **_LLAMA, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    }),
    "lfm2": ("lfm2", {
        **_LLAMA, "num_hidden_layers": 6, "layer_types": ["conv", "conv", "full_attention"] * 2, "block_dim": C,
    }),
    "granite4-hybrid": ("granitemoehybrid", {
        **_LLAMA, "num_hidden_layers": 6, "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
        "num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 48, "mamba_n_heads": 4,
        "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8,
        "position_embedding_type": "rope",
    }),
    "gemma4": ("gemma4_text", {
        **_LLAMA, "head_dim": 8, "global_head_dim": 16, "sliding_window": 8, "layer_types": _HYBRID,
        "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": V, "num_kv_shared_layers": 1,
        "final_logit_softcapping": 3.0,
    }),
}
# fmt: on

# cannot take tokens back, so nothing can be looked up ahead
RECURRENT = ("qwen3.5", "lfm2", "granite4-hybrid")


def make_backbone(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny random model, in eval mode, with weights large enough that every part matters."""
    model_type, fields = FAMILIES[name]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**fields, **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    return model


def tiny_gpt(seed: int = 0, **shape: Any) -> AlibiGPTForCausalLM:
    """A random AlibiGPT over the byte tokenizer: 4 layers, width 32, 4 heads, 32 positions unless told otherwise."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 32}
    config = AlibiGPTConfig(**{"vocab_size": 260, "initializer_range": 0.1, **sizes, **shape})
    return AlibiGPTForCausalLM(config).eval()


# what most tests give a model to remember with, to read and to have read

SETTINGS: dict[str, Any] = {"chunk_size": 2, "num_retrieved": 8, "memory_size": 64}


def ids(rows: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(3, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def filled(model: Any, segments: Tensor, **settings: Any) -> MemoryBank:
    """A bank in which every row holds one of the segments."""
    bank = MemoryBank.for_model(model, rows=segments.shape[0], capacity_tokens=64, **settings)
    bank.add(model.encode(segments), documents=["a"] * len(segments))
    return bank


def disturbed(model: Any, scale: float, seed: int = 2) -> Any:
    """The same model, every trained number moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.trainable_parameters():
            weight.add_(scale * torch.randn(weight.shape, generator=generator))
    return model
