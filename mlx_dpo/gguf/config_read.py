"""config.json from the settings of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlx_dpo.errors import ModelError
from mlx_dpo.gguf.architectures import ARCHITECTURES, LLAMA3_DEFAULTS, llama3_factors
from mlx_dpo.gguf.families import FAMILIES

AGAIN = "Download it again."
LONG = "rope_factors_{}.weight"


def read_config(model_type: str, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of config.json.

    `fields` are the file's settings by key, `tensors` its tensors by name. Raises ModelError that lists every setting
    that is missing, or for a RoPE scaling that mlx-lm's model of this type cannot do.
    """
    architecture = ARCHITECTURES[model_type]
    prefix = architecture.gguf
    found = {
        key: _plain(fields[f"{prefix}.{name}"])
        for name, key in architecture.settings.items()
        if f"{prefix}.{name}" in fields
    }
    config: dict[str, Any] = {"model_type": model_type, "architectures": [architecture.model_class]}
    config |= {**architecture.constants, **found}
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps", "norm_eps")
    missing = [f"{prefix}.{name}" for name, key in architecture.settings.items() if key in needed and key not in found]
    if missing:
        raise ModelError(f"The GGUF file lacks the settings {', '.join(missing)}.", AGAIN)
    config["num_hidden_layers"] -= fields.get(f"{prefix}.nextn_predict_layers", 0)  # blocks that mlx-lm leaves out
    config["vocab_size"] = len(fields["tokenizer.ggml.tokens"])
    if "token_embd.weight" in tensors:
        config["vocab_size"] = int(tensors["token_embd.weight"].shape[1])
    if family := FAMILIES.get(architecture.family):
        own = {name.removeprefix(f"{prefix}."): value for name, value in fields.items()}
        try:
            config |= family.read(own, tensors)
        except KeyError as error:
            raise ModelError(f"The GGUF file lacks {error}, which a {model_type} model has.", AGAIN) from error
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config.setdefault("intermediate_size", 0)
    config.setdefault("rope_theta", 10000.0)
    config["tie_word_embeddings"] = "output.weight" not in tensors
    if model_type == "llama":  # the one whose biases are a setting; the file says it by having them
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    if architecture.query_scalar_big is not None:
        layers, scalar = architecture.query_scalar_big
        big = config["num_hidden_layers"] == layers
        config["query_pre_attn_scalar"] = scalar if big else config["head_dim"]
    if model_type == "gemma3_text":
        config.setdefault("rope_local_base_freq", 10000.0)
    if model_type == "gemma4_text":  # with two rotary embeddings, which the family has read
        return config | {"vocab_size_per_layer_input": config["vocab_size"]}
    rotated = fields.get(f"{prefix}.rope.dimension_count", config["head_dim"])
    if rotated != config["head_dim"]:
        config["partial_rotary_factor"] = rotated / config["head_dim"]
    scaling = _rope_scaling(prefix, config, fields, tensors)
    if scaling:
        config["rope_scaling"] = scaling
        if scaling["type"] == "longrope":
            config["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    return config


def _rope_scaling(
    prefix: str, config: Mapping[str, Any], fields: Mapping[str, Any], tensors: Mapping[str, Any]
) -> dict[str, Any] | None:
    original = fields.get(f"{prefix}.rope.scaling.original_context_length")
    if LONG.format("long") in tensors:  # whatever kind the file names
        factors = {f"{length}_factor": tensors[LONG.format(length)].data.tolist() for length in ("long", "short")}
        return _scaling("longrope", **factors, original_max_position_embeddings=original)
    if "rope_freqs.weight" in tensors:
        return _llama3_scaling(config, np.asarray(tensors["rope_freqs.weight"].data))
    kind = fields.get(f"{prefix}.rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        known = {"original_max_position_embeddings": int(original)} if kind == "yarn" and original else {}
        return _scaling(kind, factor=_plain(fields[f"{prefix}.rope.scaling.factor"]), **known)
    if kind == "none":
        return None
    raise ModelError(
        f"The GGUF file scales its rotary embedding by {kind!r}, which is not read here.",
        "Give the original model's folder or Hub name instead of the GGUF file.",
    )


def _scaling(kind: str, **settings: Any) -> dict[str, Any]:
    """mlx-lm's models read `type` or `rope_type`, by their age."""
    return {"type": kind, "rope_type": kind} | settings


def _llama3_scaling(config: Mapping[str, Any], factors: np.ndarray) -> dict[str, Any]:
    scaling = _scaling("llama3", factor=_plain(factors.max()), **LLAMA3_DEFAULTS)
    expected = llama3_factors(config["head_dim"], config["rope_theta"], scaling)
    if not np.allclose(factors, expected, rtol=1e-4):
        raise ModelError(
            "The GGUF file's rope_freqs are not those of Llama 3's scaling with its usual settings.",
            "Give the original model's folder or Hub name instead of the GGUF file.",
        )
    return scaling


def _plain(value: Any) -> Any:
    """A float32 setting as the shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float | np.floating) else value
