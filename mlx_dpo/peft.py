"""PEFT's adapter folders, read into mlx-lm's form."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.errors import ModelError

NAME = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.(?P<part>lora_[AB])(?:\.default)?\.weight$")


def read_peft(folder: Path, settings: dict[str, Any], model: nn.Module) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """A PEFT LoRA folder as mlx-lm's settings and arrays, of one rank and scale: lora_a = Aᵀ, lora_b = Bᵀ.

    PEFT scales each module by alpha / r (alpha / √r with rsLoRA), with ranks and alphas that may differ by module.
    mlx-lm knows one rank and one scale: smaller ranks are padded with zeros, and what a module's scale differs from
    the common one is multiplied into its B. The function is the same.

    Raises:
        ModelError: another kind of adapter, or one that adapts what mlx-lm's LoRA cannot.
    """
    modules = _read_modules(folder, settings)
    paths = {name for name, _ in model.named_modules()}
    placed = {_place(name, paths, folder): pair for name, pair in modules.items()}
    ranks = {name: a.shape[0] for name, (a, _) in placed.items()}
    rank = max(ranks.values())
    scales = {name: _scale(name, ranks[name], settings) for name in placed}
    scale = scales[max(ranks, key=lambda name: ranks[name])]
    weights: dict[str, mx.array] = {}
    for name, (a, b) in placed.items():
        missing = rank - ranks[name]
        weights[f"{name}.lora_a"] = mx.pad(a.T, [(0, 0), (0, missing)])
        weights[f"{name}.lora_b"] = mx.pad(b.T * (scales[name] / scale), [(0, missing), (0, 0)])
    total = len(model.layers)
    lowest = min(int(found.group(1)) for name in placed if (found := re.search(r"\.layers\.(\d+)\.", name)))
    keys = list(dict.fromkeys(re.sub(r"^.*\.layers\.\d+\.", "", name) for name in placed))
    dropout = float(settings.get("lora_dropout") or 0)
    parameters = {"rank": rank, "scale": scale, "dropout": dropout, "keys": keys}
    return {"num_layers": total - lowest, "lora_parameters": parameters}, weights


def _read_modules(folder: Path, settings: dict[str, Any]) -> dict[str, tuple[mx.array, mx.array]]:
    if settings.get("peft_type") != "LORA" or settings.get("use_dora"):
        kind = "DoRA" if settings.get("use_dora") else settings.get("peft_type")
        raise ModelError(f"the PEFT adapter in {folder} is of type {kind}; LoRA is read", "merge it with PEFT first")
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ModelError(f"no adapter weights: {file} is missing", "save the PEFT adapter as safetensors")
    parts: dict[str, dict[str, mx.array]] = {}
    foreign = []
    for name, value in mx.load(str(file)).items():
        found = NAME.match(name)
        if found and ".layers." in found["module"]:
            parts.setdefault(found["module"], {})[found["part"]] = value.astype(mx.float32)
        else:
            foreign.append(name)
    foreign += [f"{name} (half of a pair)" for name, pair in parts.items() if len(pair) != 2]
    if foreign or not parts:
        raise ModelError(
            f"the PEFT adapter in {folder} holds what is not LoRA of a block's linear layer: "
            f"{', '.join(foreign[:5]) or 'nothing'}",
            "merge it into the model with PEFT, and start from the merged model",
        )
    return {name: (pair["lora_A"], pair["lora_B"]) for name, pair in parts.items()}


def _place(name: str, paths: set[str], folder: Path) -> str:
    """The model's own path of a module; mlx-lm holds some text models inside `language_model`."""
    for candidate in (name, f"language_model.{name}", name.replace("model.language_model.", "language_model.model.")):
        if candidate in paths:
            return candidate
    raise ModelError(f"the adapter in {folder} is for another model: it adapts {name}, which this one lacks")


def _scale(name: str, rank: int, settings: dict[str, Any]) -> float:
    """PEFT's scale of one module; pattern keys are regular expressions on the end of its name."""
    alpha = next(
        (
            value
            for pattern, value in (settings.get("alpha_pattern") or {}).items()
            if re.match(rf"(.*\.)?({pattern})$", name)
        ),
        settings["lora_alpha"],
    )
    return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)
