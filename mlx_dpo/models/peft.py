"""PEFT's adapter folders, read into mlx-lm's form."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_dpo.errors import ModelError
from mlx_dpo.models.trees import read_weights

NAME = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+)\.(?P<part>lora_[AB]|lora_magnitude_vector)(?:\.default)?(?:\.weight)?$"
)

OTHER_FUNCTION = {
    "alora_invocation_tokens": "activated LoRA, which adapts only the tokens after an invocation",
    "arrow_config": "a mixture of adapters (Arrow)",
    "kasa_config": "KaSA, which changes the base's weights",
    "layer_replication": "replicated layers",
    "lora_bias": "a bias on B",
    "modules_to_save": "whole modules beside LoRA",
    "monteclora_config": "sampled adapters (Monteclora)",
    "target_parameters": "adapted parameters that are no layer",
    "trainable_token_indices": "trained tokens",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
}
"""Settings of a PEFT LoRA configuration under which it computes something else than W x + s B A x, in words."""

CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to initialize after which PEFT's base model is no longer the base model."""


def read_peft(
    folder: Path, settings: dict[str, Any], paths: Collection[str], blocks: int
) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """A PEFT LoRA or DoRA folder as mlx-lm's settings and arrays, of one rank and scale: lora_a = Aᵀ, lora_b = Bᵀ.

    `paths` are the names of the model's modules, `blocks` how many blocks it has.

    PEFT scales each module by alpha / r (alpha / √r with rsLoRA), with ranks and alphas that may differ by module.
    mlx-lm knows one rank and one scale: smaller ranks are padded with zeros, and what a module's scale differs from
    the common one is multiplied into its B. The function is the same.

    Raises:
        ModelError: another kind of adapter, or one that adapts what mlx-lm's layers cannot; all that is wrong with it.
    """
    _check_settings(folder, settings)
    modules = _read_modules(folder)
    ranks = {name: parts["lora_A"].shape[0] for name, parts in modules.items()}
    rank = max(ranks.values())
    scales = {name: _scale(name, ranks[name], settings) for name in modules}
    scale = scales[max(ranks, key=lambda name: ranks[name])]
    weights: dict[str, mx.array] = {}
    for name, parts in modules.items():
        place, missing = _place(name, paths, folder), rank - ranks[name]
        weights[f"{place}.lora_a"] = mx.pad(parts["lora_A"].T, [(0, 0), (0, missing)])
        weights[f"{place}.lora_b"] = mx.pad(parts["lora_B"].T * (scales[name] / scale), [(0, missing), (0, 0)])
        if "lora_magnitude_vector" in parts:
            weights[f"{place}.m"] = parts["lora_magnitude_vector"].reshape(-1)
    depths = [int(found.group(1)) for name in weights if (found := re.search(r"\.layers\.(\d+)\.", name))]
    return {
        "fine_tune_type": "dora" if settings.get("use_dora") else "lora",
        "num_layers": blocks - min(depths, default=blocks - 1),
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": settings.get("lora_dropout") or 0},
    }, weights


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    kind, start, bias = settings.get("peft_type"), settings.get("init_lora_weights"), settings.get("bias", "none")
    if kind != "LORA":
        raise ModelError(
            f"the PEFT adapter in {folder} is of type {kind}; LoRA and DoRA are read", "merge it with PEFT first"
        )
    wrong = [words for name, words in OTHER_FUNCTION.items() if settings.get(name)]
    wrong += [f"trained biases (bias: {bias})"] if bias != "none" else []
    if isinstance(start, str) and start.startswith(CHANGES_BASE):
        wrong.append(f"a start that changes the base's weights (init_lora_weights: {start})")
    if wrong:
        raise ModelError(
            f"the PEFT adapter in {folder} has {', '.join(wrong)}: mlx-lm's LoRA cannot be that",
            "merge it into the model with PEFT, and start from the merged model",
        )


def _read_modules(folder: Path) -> dict[str, dict[str, mx.array]]:
    """By PEFT's name of a module, `lora_A` [r, in], `lora_B` [out, r] and, of DoRA, `lora_magnitude_vector` [out]."""
    tensors = read_weights(folder / "adapter_model.safetensors", "save the PEFT adapter again, as safetensors")
    modules: dict[str, dict[str, mx.array]] = {}
    foreign = []
    for name, value in tensors.items():
        if found := NAME.match(name):
            modules.setdefault(found["module"], {})[found["part"]] = value.astype(mx.float32)
        elif not name.endswith(".base_layer.weight"):  # PEFT puts a copy of an adapted head's own weight into the file
            foreign.append(name)
    foreign += [
        f"{name} (half of a pair)" for name, parts in modules.items() if not {"lora_A", "lora_B"} <= parts.keys()
    ]
    if foreign or not modules:
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        raise ModelError(
            f"the PEFT adapter in {folder} holds what is not LoRA of a linear layer: "
            f"{', '.join(foreign[:5]) or 'nothing'}{more}",
            "merge it into the model with PEFT, and start from the merged model",
        )
    return modules


def _place(name: str, paths: Collection[str], folder: Path) -> str:
    """The model's own path of a module; mlx-lm holds some text models inside `language_model`."""
    for candidate in (name, f"language_model.{name}", name.replace("model.language_model.", "language_model.model.")):
        if candidate in paths:
            return candidate
    hint = "it ties its head to its embedding, so there is no head to adapt" if name == "lm_head" else ""
    raise ModelError(f"the adapter in {folder} is for another model: it adapts {name}, which this one lacks", hint)


def _scale(name: str, rank: int, settings: dict[str, Any]) -> float:
    """PEFT's scale of one module; a key of `alpha_pattern` is a regular expression on the end of its name."""
    patterns = settings.get("alpha_pattern") or {}
    key = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)
    alpha = float(settings.get("lora_alpha", 8) if key is None else patterns[key])
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)
