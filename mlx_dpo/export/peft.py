"""An adapter written as a PEFT folder, for transformers, vLLM and whatever else reads those."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.config import DataConfig, ModelConfig
from mlx_dpo.errors import ModelError
from mlx_dpo.events import OnEvent, Warned, ignore
from mlx_dpo.export.fuse import check_output, load_stored
from mlx_dpo.export.verify import Trained, Verified, verify_folder, verify_peft
from mlx_dpo.files import written_whole
from mlx_dpo.models import lora
from mlx_dpo.models.merge import adapted_layers, base_of, is_packed
from mlx_dpo.run.card import card_along

LAYER = re.compile(r"^(?P<before>.*\.layers)\.(?P<number>\d+)\.(?P<name>.+)$")


@dataclass(frozen=True)
class PeftReport:
    """What was written, and the checks that were made of it."""

    output: Path
    modules: int
    verified: tuple[Verified, ...]


def export_peft(
    model: ModelConfig,
    adapter: str | Path,
    output: Path,
    *,
    base_model: str | None = None,
    verify: bool = True,
    data: DataConfig | None = None,
    rows: int = 8,
    on_event: OnEvent = ignore,
) -> PeftReport:
    """Writes `adapter_model.safetensors` and `adapter_config.json` as PEFT has them: A = lora_aᵀ, B = lora_bᵀ,
    lora_alpha = scale · rank, names as in the Hugging Face model. DoRA's magnitudes go along.

    `base_model` is the Hub name or folder from which PEFT will load the base; `model.path` without it. With `verify`
    the folder is read back here and compared with the adapter, and where peft and transformers are installed and the
    base is in full precision, the same is done by them.

    Raises:
        UsageError: `output` holds something.
        ModelError: PEFT cannot hold this adapter, or what was written is not it.
    """
    check_output(output)
    tuned, config, folder, _ = load_stored(model, adapter)
    packed = any(is_packed(base_of(module)) for _, module in adapted_layers(tuned))
    if packed and base_model is None:
        on_event(Warned(f"transformers cannot read {model.path}, which MLX quantized; name its original as base model"))
    names = hugging_face_names(tuned, config)
    tensors: dict[str, mx.array] = {}
    for name, module in adapted_layers(tuned):
        prefix = f"base_model.model.{names[name]}"
        tensors[f"{prefix}.lora_A.weight"] = mx.contiguous(module.lora_a.astype(mx.float32).T)
        tensors[f"{prefix}.lora_B.weight"] = mx.contiguous(module.lora_b.astype(mx.float32).T)
        if "m" in module:
            tensors[f"{prefix}.lora_magnitude_vector"] = module.m.astype(mx.float32)
    settings = peft_settings(tuned, list(names.values()), base_model or model.path)
    found: list[Verified | None] = []
    with written_whole(output, folder=True) as beside:
        mx.save_safetensors(str(beside / "adapter_model.safetensors"), tensors, metadata={"format": "pt"})
        (beside / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        card_along(adapter, beside, fused=False, on_event=on_event)
        if verify:
            trained = Trained(replace(model, adapter=str(adapter)), data, rows, on_event)
            found.append(verify_folder(trained, folder, adapter=beside, exact=True))
            # transformers cannot load what MLX packed, so there is no base there to put the adapter on
            has_peft = all(find_spec(name) for name in ("peft", "transformers", "torch"))
            if has_peft and not packed and model.quantize_bits is None:
                found.append(verify_peft(trained, folder, beside))
    return PeftReport(output, len(names), tuple(v for v in found if v))


def import_peft(model: ModelConfig, adapter: str | Path, output: Path) -> lora.Adapter:
    """Writes a PEFT adapter for `model` as an adapter folder of mlx-lm's form.

    Raises:
        UsageError: `output` holds something.
        ModelError: the folder holds no adapter, or one that mlx-lm's layers cannot be.
    """
    check_output(output)
    tuned, _, _, settings = load_stored(model, adapter)
    with written_whole(output, folder=True) as beside:
        lora.save(tuned, settings, beside, base=model.path)
    return settings


def hugging_face_names(model: nn.Module, config: dict[str, Any]) -> dict[str, str]:
    """Of each adapted layer, its name in mlx-lm's model and in transformers'.

    They are the same, but for text models that mlx-lm holds inside `language_model`, which transformers has inside
    `model.language_model` of a multimodal model and not at all in a text model.

    Raises:
        ModelError: an adapted layer has no counterpart that PEFT could adapt; all of them are named.
    """
    mixture = lora.mixture_modules(model.layers)
    multimodal = any("ForConditionalGeneration" in name for name in config.get("architectures") or ())
    names, wrong = {}, []
    for name, module in adapted_layers(model):
        kind = type(module).__name__
        in_block = found["name"] if (found := LAYER.match(name)) else ""
        if kind not in ("LoRALinear", "DoRALinear") or in_block in mixture:
            wrong.append(f"{name} ({mixture.get(in_block, kind)})")
        inner = name.removeprefix("language_model.")
        if multimodal and inner != name and inner.startswith("model."):
            inner = f"model.language_model.{inner.removeprefix('model.')}"
        names[name] = inner
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ModelError(
            f"PEFT has no such LoRA: {', '.join(wrong[:4])}{more}. Experts and routers are no linear layers in "
            "transformers 5, and what PEFT (target_parameters) writes for experts is read otherwise by others; a tied "
            "embedding's adapter would not reach the head",
            "fuse the adapter into the model (mlx-dpo fuse), or train without these modules (--keys)",
        )
    return names


def peft_settings(model: nn.Module, names: list[str], base_model: str) -> dict[str, Any]:
    """`adapter_config.json`: the adapted modules by their name in a block and the blocks' numbers; by their whole names
    where not every one of those blocks has every one of those modules."""
    _, first = adapted_layers(model)[0]
    rank = first.lora_a.shape[-1]
    found = [LAYER.match(name) for name in names]
    blocks = sorted({int(match["number"]) for match in found if match})
    modules = sorted({match["name"] for match in found if match})
    regular = None not in found and len(names) == len(blocks) * len(modules)
    alpha = first.scale * rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": "m" in first,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": modules if regular else names,
        "layers_to_transform": blocks if regular else None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
