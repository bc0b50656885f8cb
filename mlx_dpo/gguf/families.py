"""Families of models whose settings no table says: those that hold for some layers, or are made of several others.

Each is written into a GGUF file, read back, and has its own limits: what llama.cpp takes for granted. Sources are
llama.cpp's loader (src/models) and converter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Setting = Callable[[str], Any]
"""A setting of config.json by its key; None where it has none."""

Settings = dict[str, Any]
"""Settings of a file, by key without the architecture's name before it."""

FULL, SLIDING, CONV = "full_attention", "sliding_attention", "conv"
SIGMOID = 2  # of expert_gating_func
NOT_ROTATED = 1e30  # what ggml divides a frequency by that mlx-lm takes as 0


class Family(NamedTuple):
    """What one family's files say beyond the table, both ways, and what llama.cpp would compute otherwise."""

    write: Callable[[Setting], Settings]
    read: Callable[[Mapping[str, Any], Mapping[str, Any]], Settings]  # config.json's from a file's, and its tensors
    differences: Callable[[Setting], Iterator[str]]


def proportional_factors(head_dim: int, rotated: float) -> np.ndarray:
    """What each of `[head_dim / 2]` frequencies is divided by where only the first `rotated` of them turn (Gemma 4)."""
    factors = np.full(head_dim // 2, NOT_ROTATED, np.float32)
    factors[: int(head_dim * rotated) // 2] = 1.0
    return factors


def _write_gated_delta(setting: Setting) -> Settings:
    half = int(setting("head_dim") * setting("partial_rotary_factor")) // 2
    sections = (setting("rope_parameters") or {}).get("mrope_section") or [
        (half + 2) // 3,
        (half + 1) // 3,
        half // 3,
    ]
    return {
        "ssm.inner_size": setting("linear_value_head_dim") * setting("linear_num_value_heads"),
        "rope.dimension_sections": [*sections, 0],  # pairs that turn in turn by a token's time, row and column
    }


def _read_gated_delta(fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> Settings:
    rotated = fields["rope.dimension_count"] / fields["attention.key_length"]
    return {
        "linear_value_head_dim": int(fields["ssm.inner_size"]) // int(fields["ssm.time_step_rank"]),
        "rope_parameters": {
            "type": "default",
            "rope_theta": float(fields["rope.freq_base"]),
            "partial_rotary_factor": float(rotated),
        },
    }


def _gated_delta_differs(setting: Setting) -> Iterator[str]:
    if setting("linear_key_head_dim") != setting("linear_value_head_dim"):
        yield "keys and values of its linear attention have heads of two sizes"
    if setting("attention_bias"):
        yield "its attention has biases"
    if setting("num_experts") and not setting("norm_topk_prob"):
        yield "the weights of its experts are not normalised"


def _write_gemma4(setting: Setting) -> Settings:
    layers, shared = setting("num_hidden_layers"), setting("num_kv_shared_layers")
    types = setting("layer_types")
    rope = setting("rope_parameters")
    few = (setting("attention_k_eq_v") and setting("num_global_key_value_heads")) or setting("num_key_value_heads")
    wide = setting("intermediate_size") * (2 if setting("use_double_wide_mlp") and shared < layers else 1)
    whole = setting("global_head_dim") or setting("head_dim")
    found: Settings = {
        "attention.sliding_window_pattern": [kind == SLIDING for kind in types],
        "attention.head_count_kv": [few if kind == FULL else setting("num_key_value_heads") for kind in types],
        "feed_forward_length": [setting("intermediate_size") if i < layers - shared else wide for i in range(layers)],
        "rope.freq_base": float(rope[FULL]["rope_theta"]),
        "rope.freq_base_swa": float(rope[SLIDING]["rope_theta"]),
        "rope.dimension_count": whole,
        "rope.dimension_count_swa": setting("head_dim"),
    }
    for name in ("key_length", "value_length"):
        found |= {f"attention.{name}": whole, f"attention.{name}_swa": setting("head_dim")}
    return found


def _read_gemma4(fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> Settings:
    types = [SLIDING if slides else FULL for slides in fields["attention.sliding_window_pattern"]]
    kv = _per_layer(fields["attention.head_count_kv"], len(types))
    wide = _per_layer(fields["feed_forward_length"], len(types))
    few = {kind: int(kv[types.index(kind)]) for kind in (FULL, SLIDING) if kind in types}
    shared = int(fields.get("attention.shared_kv_layers", 0))
    factors = tensors["rope_freqs.weight"].data
    rotated = float(np.sum(np.asarray(factors) == 1.0) / len(factors))
    theta = {FULL: float(fields["rope.freq_base"]), SLIDING: float(fields.get("rope.freq_base_swa", 1e4))}
    return {
        "layer_types": types,
        "num_key_value_heads": few.get(SLIDING, few.get(FULL)),
        "num_global_key_value_heads": few.get(FULL),
        "intermediate_size": int(wide[0]),
        "use_double_wide_mlp": wide[-1] != wide[0],
        "global_head_dim": int(fields["attention.key_length"]),
        "head_dim": int(fields["attention.key_length_swa"]),
        "num_kv_shared_layers": shared,
        "attention_k_eq_v": not all(f"blk.{i}.attn_v.weight" in tensors for i in range(len(types) - shared)),
        "enable_moe_block": bool(fields.get("expert_count")),
        "final_logit_softcapping": fields.get("final_logit_softcapping"),
        "rope_parameters": {
            FULL: {"rope_type": "proportional", "rope_theta": theta[FULL], "partial_rotary_factor": rotated},
            SLIDING: {"rope_type": "default", "rope_theta": theta[SLIDING], "partial_rotary_factor": 1.0},
        },
    }


def _gemma4_differs(setting: Setting) -> Iterator[str]:
    rope, types = setting("rope_parameters"), setting("layer_types")
    kinds = [rope.get(kind, {}).get("rope_type", "default") for kind in (FULL, SLIDING)]
    if kinds != ["proportional", "default"]:
        yield f"its rotary embeddings are {kinds[0]!r} and {kinds[1]!r}, not 'proportional' and 'default'"
    own = len(types) - setting("num_kv_shared_layers")
    if own < len(types) and list(types[own - 2 : own]) != [SLIDING, FULL]:
        yield "its last layers with keys of their own are not one with a sliding window and one without"
    if setting("hidden_size_per_layer_input") and setting("vocab_size_per_layer_input") != setting("vocab_size"):
        yield "its embeddings for each layer are not of the same tokens"


def _gpt_oss_differs(setting: Setting) -> Iterator[str]:
    types = setting("layer_types")
    if types and any(kind != (FULL if i % 2 else SLIDING) for i, kind in enumerate(types)):
        yield "its layers do not attend in turn within a sliding window and to everything"


def _write_lfm2(setting: Setting) -> Settings:
    attends = set(setting("full_attn_idxs"))
    kv = [setting("num_key_value_heads") if i in attends else 0 for i in range(setting("num_hidden_layers"))]
    found: Settings = {"attention.head_count_kv": kv}
    if setting("num_experts"):
        return found | {"expert_gating_func": SIGMOID}
    wide = setting("block_ff_dim")
    if setting("block_auto_adjust_ff_dim"):  # as mlx-lm's layer does
        wide = int(2 * wide / 3)
        if (factor := setting("block_ffn_dim_multiplier")) is not None:
            wide = int(factor * wide)
        multiple = setting("block_multiple_of")
        wide = multiple * -(-wide // multiple)
    return found | {"feed_forward_length": wide}


def _read_lfm2(fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> Settings:
    kv = _per_layer(fields["attention.head_count_kv"], int(fields["block_count"]))
    found: Settings = {
        "num_key_value_heads": int(max(kv)),
        "layer_types": [FULL if heads else CONV for heads in kv],
        "conv_bias": False,
    }
    if "expert_count" in fields:
        return found | {"use_expert_bias": any(name.endswith("exp_probs_b.bias") for name in tensors)}
    return found | {
        "block_dim": int(fields["embedding_length"]),
        "block_ff_dim": int(fields["feed_forward_length"]),
        "block_multiple_of": 1,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
    }


def _lfm2_differs(setting: Setting) -> Iterator[str]:
    if setting("conv_bias"):
        yield "its convolutions have biases"
    if setting("num_experts") and not setting("norm_topk_prob"):
        yield "the weights of its experts are not normalised"
    if (setting("routed_scaling_factor") or 1.0) != 1.0:
        yield f"the weights of its experts are multiplied by {setting('routed_scaling_factor')}"


def _per_layer(value: Any, layers: int) -> Sequence[int]:
    """A setting that files give once for all layers or once for each."""
    return list(value) if np.ndim(value) else [int(value)] * layers


def _nothing(*_: Any) -> Settings:
    return {}


FAMILIES: dict[str, Family] = {
    "gated_delta": Family(_write_gated_delta, _read_gated_delta, _gated_delta_differs),
    "gemma4": Family(_write_gemma4, _read_gemma4, _gemma4_differs),
    "gpt_oss": Family(_nothing, _nothing, _gpt_oss_differs),
    "lfm2": Family(_write_lfm2, _read_lfm2, _lfm2_differs),
}
