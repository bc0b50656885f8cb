"""Tiny models of every architecture that goes into GGUF, random adapters for them, and what MLX computes with both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from support.tiny_models import MORE_TINY_MODELS, tiny_model_folder

IDS = [3, 41, 7, 99, 150, 12, 200, 31, 8, 77, 260, 5, 64, 18, 120, 222, 9, 45, 301, 13]
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
DENSE = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
EXPERTS = (*ATTENTION, "mlp.switch_mlp.gate_proj", "mlp.switch_mlp.up_proj", "mlp.switch_mlp.down_proj")
PHI3 = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
GATED = ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.in_proj_a", "linear_attn.in_proj_b")
GATED_DELTA = (*DENSE, *GATED, "linear_attn.out_proj")
SHARED = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj")
GATED_EXPERTS = (*EXPERTS, *GATED, "linear_attn.out_proj", *SHARED, "mlp.shared_expert_gate", "mlp.gate")
GEMMA4 = (*DENSE, "per_layer_input_gate", "per_layer_projection")
GEMMA4_EXPERTS = (*DENSE, *(f"experts.switch_glu.{part}_proj" for part in ("gate", "up", "down")), "router.proj")
GPT_OSS = (*ATTENTION, *(f"mlp.experts.{part}_proj" for part in ("gate", "up", "down")), "mlp.router")
LFM2_MIXERS = (*ATTENTION[:3], "self_attn.out_proj", "conv.in_proj", "conv.out_proj")
LFM2 = (*LFM2_MIXERS, *(f"feed_forward.w{i}" for i in (1, 2, 3)))
LFM2_EXPERTS = (
    *LFM2_MIXERS,
    *(f"feed_forward.{at}{part}_proj" for at in ("", "switch_mlp.") for part in ("gate", "up", "down")),
    "feed_forward.gate",
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [1.0 + i for i in range(8)],
}

GPT_OSS_YARN = YARN | {"factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
GEMMA4_MOE = MORE_TINY_MODELS["gemma4"]["text_config"] | {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "use_double_wide_mlp": False,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
}

EXACT, GELU = 2e-4, 0.03  # ggml looks its GELU up in a table of float16

CASES: dict[str, tuple[str, dict[str, Any], Sequence[str], float]] = {
    # name: the tiny model, what its config says besides, the adapted modules, the largest difference of a log-prob
    "llama": ("llama", {}, DENSE, EXACT),
    "llama_tied": ("llama_tied", {}, DENSE, EXACT),
    "llama3_rope": ("llama", {"rope_scaling": LLAMA3_ROPE}, DENSE, EXACT),
    "llama_linear_rope": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}, DENSE, EXACT),
    "llama_yarn": ("llama", {"rope_scaling": YARN}, DENSE, EXACT),
    "llama_bias": ("llama", {"attention_bias": True, "mlp_bias": True}, DENSE, EXACT),
    "llama_head_dim": ("llama", {"head_dim": 32}, DENSE, EXACT),
    "llama_head": ("llama", {}, (*DENSE, "lm_head"), EXACT),
    "mistral": ("llama", {"model_type": "mistral"}, DENSE, EXACT),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 4}, DENSE, EXACT),
    "qwen2": ("qwen2", {}, DENSE, EXACT),
    "qwen3": ("qwen3", {}, DENSE, EXACT),
    "qwen3_moe": ("qwen3_moe", {}, EXPERTS, EXACT),
    "gemma": ("gemma", {}, DENSE, GELU),
    "gemma2": ("gemma2", {"sliding_window": 4096}, DENSE, GELU),
    "gemma3": ("gemma3", {"sliding_window_pattern": 6, "num_hidden_layers": 7}, DENSE, GELU),
    "phi3": ("phi3", {}, PHI3, EXACT),
    "phi3_partial": ("phi3", {"partial_rotary_factor": 0.5}, PHI3, EXACT),
    "phi3_longrope": (
        "phi3",
        {"rope_scaling": LONGROPE, "original_max_position_embeddings": 64},
        PHI3,
        EXACT,
    ),
    "phi4_mini": (
        "phi3",
        {
            "rope_scaling": LONGROPE | {"short_factor": [1.0] * 6, "long_factor": [1.0 + i for i in range(6)]},
            "original_max_position_embeddings": 64,
            "partial_rotary_factor": 0.75,
            "tie_word_embeddings": True,
        },
        PHI3,
        EXACT,
    ),
    "qwen3_5": ("qwen3_5", {}, GATED_DELTA, EXACT),
    "qwen3_5_moe": ("qwen3_5_moe", {}, GATED_EXPERTS, EXACT),
    "gemma4": ("gemma4", {}, GEMMA4, GELU),
    "gemma4_moe": ("gemma4", {"text_config": GEMMA4_MOE}, GEMMA4_EXPERTS, GELU),
    "gpt_oss": ("gpt_oss", {"rope_scaling": GPT_OSS_YARN}, GPT_OSS, EXACT),
    "lfm2": ("lfm2", {"block_ff_dim": 200, "block_auto_adjust_ff_dim": True}, LFM2, EXACT),
    "lfm2_moe": ("lfm2_moe", {}, LFM2_EXPERTS, EXACT),
}


def make_folder(folder: Path, case: str, **more: Any) -> Path:
    arch, config, _, _ = CASES[case]
    tiny_model_folder(folder, arch, **{k: v for k, v in config.items() if k != "model_type"} | more)
    if arch == "gemma3":  # the tiny model writes the head that mlx-lm makes before it ties it
        weights = mx.load(str(folder / "model.safetensors"))
        assert isinstance(weights, dict)
        kept = {name: value for name, value in weights.items() if not name.startswith("lm_head.")}
        mx.eval(kept)
        mx.save_safetensors(str(folder / "model.safetensors"), kept)
    if "model_type" in config:
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | {"model_type": config["model_type"]}))
    return folder


def make_adapter(
    folder: Path, base: Path, keys: Sequence[str], rank: int = 4, scale: float = 2.0, deviation: float = 0.15
) -> Path:
    """A random adapter on every layer, in mlx-lm's own layout, that moves log-probs by several nats."""
    from mlx.utils import tree_flatten
    from mlx_lm import load
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, _ = load(str(base))
    model.freeze()
    settings = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": [key for key in keys if key != "lm_head"]}
    linear_to_lora_layers(model, len(model.layers), settings)
    if "lm_head" in keys:
        from mlx_lm.tuner.lora import LoRALinear

        model.lm_head = LoRALinear.from_base(model.lm_head, r=rank, scale=scale)
    weights = dict(tree_flatten(model.trainable_parameters()))
    random = mx.random.split(mx.random.key(1), len(weights))
    weights = {
        name: mx.random.normal(value.shape, scale=deviation, key=key)
        for (name, value), key in zip(weights.items(), random, strict=True)
    }
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": len(model.layers), "lora_parameters": settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def mlx_log_probs(base: Path, adapter: Path | None, ids: Sequence[int] = IDS) -> np.ndarray:
    """log p of every next token by mlx-lm in float32, `[tokens, vocab]`: the weights W + scale · (A B)ᵀ written out."""
    from mlx.utils import tree_map
    from mlx_lm import load

    model, _ = load(str(base))
    model.update(
        tree_map(lambda p: p.astype(mx.float32) if mx.issubdtype(p.dtype, mx.floating) else p, model.parameters())
    )
    if adapter is not None:
        rank_scale = json.loads((adapter / "adapter_config.json").read_text())["lora_parameters"]["scale"]
        weights = mx.load(str(adapter / "adapters.safetensors"))
        assert isinstance(weights, dict)
        for name in [name.removesuffix(".lora_a") for name in weights if name.endswith(".lora_a")]:
            module = model
            for part in name.split("."):
                module = module[int(part)] if part.isdigit() else module[part]
            a, b = weights[f"{name}.lora_a"], weights[f"{name}.lora_b"]
            module.weight = module.weight + rank_scale * (b @ a if a.ndim == 3 else (a @ b).T)
    logits = model(mx.array([list(ids)]))[0].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def as_hugging_face_stores_it(folder: Path) -> Path:
    """The tensors of a tiny Qwen3.5's or Gemma 4's folder, named and formed as in their own repositories."""
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    qwen = any("linear_attn" in name for name in weights)
    stored = {"mtp.norm.weight": mx.zeros((2,)), "model.visual.x": mx.zeros((2, 2))} if qwen else {}
    stored |= {} if qwen else {"model.vision_tower.x": mx.zeros((2, 2))}
    for name, value in weights.items():
        if ".switch_" in name:  # experts: two matrices in one
            if name.endswith("up_proj.weight"):
                value = mx.concatenate([weights[name.replace("up_proj", "gate_proj")], value], axis=-2)
                name = name.replace("up_proj", "gate_up_proj")
            elif "gate_proj" in name:
                continue
            name = name.replace("switch_mlp", "experts").replace(".switch_glu", "").removesuffix(".weight")
        elif qwen and name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
            value = value - 1.0
        elif name.endswith("conv1d.weight"):
            value = value.swapaxes(1, 2)
        stored[name.replace("language_model.model.", "model.language_model.").replace("language_model.lm", "lm")] = (
            value
        )
    mx.eval(stored)
    mx.save_safetensors(str(folder / "model.safetensors"), stored)
    return folder


def gpt_oss_in_four_bit_floats(folder: Path) -> Path:
    """A tiny gpt-oss whose experts are stored as in its own repository: MXFP4, rows of gate and up in turn."""
    make_folder(folder, "gpt_oss")
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    stored = {name: value for name, value in weights.items() if ".experts." not in name}
    for layer in range(4):
        at = f"model.layers.{layer}.mlp.experts."
        packed = {
            part: mx.quantize(weights[f"{at}{part}_proj.weight"], 32, 4, "mxfp4") for part in ("gate", "up", "down")
        }
        blocks = {part: w.view(mx.uint8).reshape(*scales.shape, 16) for part, (w, scales) in packed.items()}
        scales = {part: scales for part, (_, scales) in packed.items()}
        biases = {part: weights[f"{at}{part}_proj.bias"] for part in packed}
        for what, of in (("blocks", blocks), ("scales", scales), ("bias", biases)):
            both = mx.stack([of["gate"], of["up"]], 2).flatten(1, 2)
            stored |= {f"{at}gate_up_proj_{what}": both, f"{at}down_proj_{what}": of["down"]}
    mx.eval(stored)
    mx.save_safetensors(str(folder / "model.safetensors"), stored)
    settings = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder
