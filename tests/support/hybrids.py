"""Tiny random models of the families whose blocks keep another state than keys and values."""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from support.tiny_models import TINY_MODELS

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
}
_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
_HEADS = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
GATED_DELTA: dict[str, tuple[dict[str, Any], int]] = {
    # mlx-lm's file: settings of a model of four blocks, and how many of these are gated-delta blocks
    "qwen3_5": (TINY_MODELS["qwen3_5"]["text_config"] | {"vocab_size": 64}, 2),
    "qwen3_next": (
        _COMMON
        | _HEADS
        | _EXPERTS
        | {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "shared_expert_intermediate_size": 32,
            "partial_rotary_factor": 0.5,
        },
        3,
    ),
    "olmo_hybrid": (
        _COMMON | _HEADS | {"linear_allow_neg_eigval": True, "tie_word_embeddings": False, "attention_bias": False},
        3,
    ),
    "kimi_linear": (  # a decay for each channel
        _COMMON
        | _EXPERTS
        | {
            "linear_attn_config": {"kda_layers": [1, 2, 3], "full_attn_layers": [4], "num_heads": 2, "head_dim": 16},
            "model_max_length": 256,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
            "mla_use_nope": True,
        },
        3,
    ),
}

_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
    "attention_bias": False,
}

STATES: dict[str, dict[str, Any]] = {
    # mlx-lm's file: settings of a model of four blocks
    **{family: settings for family, (settings, _) in GATED_DELTA.items()},
    "lfm2": _COMMON | TINY_MODELS["lfm2"] | {"vocab_size": 64},
    "lfm2_moe": _COMMON
    | _EXPERTS
    | {
        "norm_topk_prob": True,
        "use_expert_bias": True,
        "num_dense_layers": 1,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "full_attn_idxs": [1, 3],
    },
    "mamba2": TINY_MODELS["mamba2"] | {"vocab_size": 64},
    "falcon_h1": _COMMON | _MAMBA | {"mamba_d_ssm": 64, "tie_word_embeddings": True},  # both kinds in each block
    "granitemoehybrid": _COMMON
    | _MAMBA
    | {
        "layer_types": ["mamba", "attention", "mamba", "attention"],
        "embedding_multiplier": 1.0,
        "attention_multiplier": 0.25,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "mamba_proj_bias": False,
        "mamba_conv_bias": True,
        "shared_intermediate_size": 32,
    },
    "nemotron_h": _COMMON  # fewer caches than blocks
    | {
        "hybrid_override_pattern": ["M", "-", "*", "M"],
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "mamba_proj_bias": False,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "n_groups": 1,
        "mlp_bias": False,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
    },
    "plamo2": _COMMON
    | {"hidden_size_per_head": 16, "mamba_num_heads": 4, "mamba_step": 2, "mamba_d_state": 16, "mamba_d_conv": 4},
    "jamba": _COMMON
    | {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 16,
        "mamba_expand": 2,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "mamba_dt_rank": 4,
    },
}


def tiny_hybrid(family: str, scale: float = 0.1) -> nn.Module:
    """A random model of one of `STATES`, all of it trainable; `scale` is how far weights are from their first ones."""
    module = importlib.import_module(f"mlx_lm.models.{family}")
    settings = STATES[family] | {"model_type": family}
    if family == "qwen3_5":
        settings = {"model_type": family, "text_config": settings}
    model = module.Model(module.ModelArgs.from_dict(settings))
    keys = iter(mx.random.split(mx.random.key(3), 300))
    model.update(
        tree_map(lambda w: w + mx.random.normal(w.shape, scale=scale, key=next(keys)), model.trainable_parameters())
    )
    return model
