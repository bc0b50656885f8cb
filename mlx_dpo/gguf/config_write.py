"""The settings of a GGUF file from a base model's config.json, and the rotary tensors that go with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from mlx_dpo.errors import ModelError
from mlx_dpo.gguf.architectures import LLAMA3_DEFAULTS, llama3_factors
from mlx_dpo.gguf.base import Base

Settings = dict[str, Any]


def write_config(base: Base) -> tuple[Settings, dict[str, np.ndarray]]:
    """The file's settings by key, and extra tensors by name (the factors of a scaled rotary embedding).

    Raises ModelError that lists everything in the config that llama.cpp computes otherwise than mlx-lm.
    """
    problems = [said for check in CHECKS if (said := check(base))]
    if problems:
        raise ModelError(
            f"{base.folder}: llama.cpp would compute another function than mlx-lm: {'; '.join(problems)}.",
            "Use the model with mlx-lm: `mlx-dpo fuse` writes it as a plain folder.",
        )
    prefix = base.architecture.gguf
    head_dim = base.setting("head_dim") or base.setting("hidden_size") // base.setting("num_attention_heads")
    found: Settings = {}
    for name, key in base.architecture.settings.items():
        value = base.setting(key)
        if value is not None:
            found[f"{prefix}.{name}"] = float(value) if isinstance(value, float) or "freq" in name else int(value)
    for name in ("key_length", "value_length"):
        found[f"{prefix}.attention.{name}"] = head_dim
    found[f"{prefix}.vocab_size"] = base.shapes["model.embed_tokens.weight"][0]
    rotated = int(head_dim * (base.setting("partial_rotary_factor") or 1.0))
    found[f"{prefix}.rope.dimension_count"] = rotated
    scaling, tensors = _rope(base, rotated)
    return found | {f"{prefix}.rope.scaling.{name}": value for name, value in scaling.items()}, tensors


def _rope(base: Base, dims: int) -> tuple[Settings, dict[str, np.ndarray]]:
    scaling = _rope_scaling(base)
    kind = scaling.get("type") or scaling.get("rope_type", "default")
    if kind == "linear":
        return {"type": "linear", "factor": float(scaling["factor"])}, {}
    if kind == "llama3":
        known = LLAMA3_DEFAULTS | scaling
        return {}, {"rope_freqs.weight": llama3_factors(dims, base.setting("rope_theta"), known)}
    if kind == "yarn":
        original = int(scaling.get("original_max_position_embeddings", 4096))
        return {"type": "yarn", "factor": float(scaling["factor"]), "original_context_length": original}, {}
    if kind in ("longrope", "su"):
        original = int(base.setting("original_max_position_embeddings"))
        ratio = base.setting("max_position_embeddings") / original
        attention = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
        factors = {
            f"rope_factors_{length}.weight": np.asarray(scaling[f"{length}_factor"], np.float32)
            for length in ("long", "short")
        }
        return {"type": "longrope", "original_context_length": original, "attn_factor": attention}, factors
    return {}, {}


def _rope_scaling(base: Base) -> dict[str, Any]:
    """What mlx-lm's model reads: models without the argument ignore the config's."""
    return getattr(base.args, "rope_scaling", None) or {}


def _scaling_known(base: Base) -> str | None:
    scaling = _rope_scaling(base)
    kind = scaling.get("type") or scaling.get("rope_type", "default")
    known = {"phi3": ("default", "linear", "longrope", "su")}
    if kind not in known.get(base.model_type, ("default", "linear", "llama3", "yarn")):
        return f"its rotary embedding is scaled by {kind!r}"
    if kind == "yarn" and any(scaling.get(key, value) != value for key, value in YARN_DEFAULTS.items()):
        return f"its yarn scaling has other settings than {YARN_DEFAULTS}"
    return None


YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 0}


def _stray_head(base: Base) -> str | None:
    stray = "lm_head.weight" in base.files and not base.architecture.untied_head
    return "it has an output head of its own, which a GGUF file of this architecture cannot" if stray else None


def _traditional(base: Base) -> str | None:
    return "its rotary embedding rotates neighbours" if base.setting("rope_traditional") else None


def _sliding_llama(base: Base) -> str | None:
    types = set(base.setting("layer_types") or ()) if base.architecture.gguf == "llama" else set()
    return "some of its layers attend within a sliding window" if types - {"full_attention"} else None


def _sliding_gemma3(base: Base) -> str | None:
    pattern = base.setting("sliding_window_pattern") if base.model_type == "gemma3_text" else 6
    return None if pattern == 6 else f"its sliding_window_pattern is {pattern}, not 6"


def _smollm3_layers(base: Base) -> str | None:
    if base.model_type != "smollm3":
        return None
    layers = base.setting("no_rope_layers")
    usual = [int((i + 1) % 4 != 0) for i in range(len(layers))]
    return None if list(layers) == usual else "other layers than every fourth lack the rotary embedding"


def _experts(base: Base) -> str | None:
    if base.model_type != "qwen3_moe":
        return None
    mixed = base.setting("mlp_only_layers") or base.setting("decoder_sparse_step") != 1
    if mixed or not base.setting("norm_topk_prob"):
        return "its experts are not in every layer, or their weights are not normalised"
    return None


def _query_scale(base: Base) -> str | None:
    if base.architecture.query_scalar_big is None:
        return None
    layers, _ = base.architecture.query_scalar_big
    heads, hidden = base.setting("num_attention_heads"), base.setting("hidden_size")
    big = base.setting("num_hidden_layers") == layers
    expected = hidden / heads if big else base.setting("head_dim")
    said = base.setting("query_pre_attn_scalar")
    return None if said == expected else f"its query_pre_attn_scalar is {said}, not {expected:g}"


CHECKS: tuple[Callable[[Base], str | None], ...] = (
    _scaling_known,
    _stray_head,
    _traditional,
    _sliding_llama,
    _sliding_gemma3,
    _smollm3_layers,
    _experts,
    _query_scale,
)
