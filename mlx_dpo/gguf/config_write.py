"""The settings of a GGUF file from a base model's config.json, and the rotary tensors that go with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from mlx_dpo.errors import ModelError
from mlx_dpo.gguf.architectures import LLAMA3_DEFAULTS, llama3_factors
from mlx_dpo.gguf.base import Base
from mlx_dpo.gguf.families import FAMILIES, FULL, proportional_factors

Settings = dict[str, Any]

ROPE = ("default", "mrope", "linear", "llama3", "yarn")
ROPE_OF_PHI3 = ("default", "linear", "longrope", "su")
"""Scalings of the rotary embedding that a GGUF file can say."""

YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 0}
"""What llama.cpp takes yarn's other settings to be."""


def write_config(base: Base) -> tuple[Settings, dict[str, np.ndarray]]:
    """The file's settings by key, and extra tensors by name (the factors of a scaled rotary embedding).

    Raises ModelError that lists everything in the config that llama.cpp computes otherwise than mlx-lm.
    """
    problems = list(_differences(base))
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
    if family := FAMILIES.get(base.architecture.family):
        found |= {f"{prefix}.{name}": value for name, value in family.write(base.setting).items()}
    return found | {f"{prefix}.rope.scaling.{name}": value for name, value in scaling.items()}, tensors


def _rope(base: Base, dims: int) -> tuple[Settings, dict[str, np.ndarray]]:
    if base.model_type == "gemma4_text":
        whole = base.setting("rope_parameters")[FULL]
        head_dim = base.setting("global_head_dim") or base.setting("head_dim")
        rotated = whole.get("partial_rotary_factor", 1.0)
        return {}, {"rope_freqs.weight": proportional_factors(head_dim, rotated)}
    scaling, kind = _rope_scaling(base)
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


def _rope_scaling(base: Base) -> tuple[dict[str, Any], str]:
    """What mlx-lm's model reads, and its kind: models without the argument ignore the config's."""
    scaling = getattr(base.args, "rope_scaling", None) or {}
    return scaling, scaling.get("type") or scaling.get("rope_type", "default")


def _differences(base: Base) -> Iterator[str]:
    """What llama.cpp would compute otherwise than mlx-lm, in words.

    Each is something that llama.cpp's loader takes for granted of an architecture and that no setting of the file can
    say: such a file would load, answer and be wrong.
    """
    setting, model_type = base.setting, base.model_type
    scaling, kind = _rope_scaling(base)
    if kind not in (ROPE_OF_PHI3 if model_type == "phi3" else ROPE):
        yield f"its rotary embedding is scaled by {kind!r}"
    if kind == "yarn" and any(scaling.get(key, value) != value for key, value in YARN_DEFAULTS.items()):
        yield f"its yarn scaling has other settings than {YARN_DEFAULTS}"
    if "lm_head.weight" in base.stored and not base.architecture.untied_head:
        yield "it has an output head of its own, which a GGUF file of this architecture cannot"
    if setting("rope_traditional"):
        yield "its rotary embedding rotates neighbours"
    if base.architecture.gguf == "llama" and set(setting("layer_types") or ()) - {"full_attention"}:
        yield "some of its layers attend within a sliding window"
    if model_type == "gemma3_text" and (pattern := setting("sliding_window_pattern")) != 6:
        yield f"its sliding_window_pattern is {pattern}, not 6"
    if model_type == "smollm3":
        layers = list(setting("no_rope_layers"))
        if layers != [int((i + 1) % 4 != 0) for i in range(len(layers))]:
            yield "other layers than every fourth lack the rotary embedding"
    if model_type == "qwen3_moe":
        mixed = setting("mlp_only_layers") or setting("decoder_sparse_step") != 1
        if mixed or not setting("norm_topk_prob"):
            yield "its experts are not in every layer, or their weights are not normalised"
    if family := FAMILIES.get(base.architecture.family):
        yield from family.differences(setting)
    if base.architecture.query_scalar_big is not None:
        big = setting("num_hidden_layers") == base.architecture.query_scalar_big[0]
        expected = setting("hidden_size") / setting("num_attention_heads") if big else setting("head_dim")
        if (said := setting("query_pre_attn_scalar")) != expected:
            yield f"its query_pre_attn_scalar is {said}, not {expected:g}"
