"""The folders that an export is made of, without loading the model: the base's settings, and tensors one at a time;
which of its matrices an adapter changes, by what B A."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_dpo.errors import ModelError
from mlx_dpo.gguf.architectures import ARCHITECTURES, Architecture
from mlx_dpo.models import lora
from mlx_dpo.models.merge import unpacked
from mlx_dpo.models.trees import flat, read_json, read_weights

ANOTHER_WAY = (
    "Fuse the adapter into a plain folder with `mlx-dpo fuse`, then try llama.cpp's converter on it: "
    "python convert_hf_to_gguf.py FUSED_FOLDER --outfile model.gguf"
)
TEXT_MODELS = {"gemma3": "gemma3_text", "gemma4": "gemma4_text", "gemma4_unified": "gemma4_text"}
"""What the text model inside a multimodal one is called, where its config.json need not say so."""

WITHOUT_ADAPTERS = ("embed_tokens", "embed_tokens_per_layer", "per_layer_model_projection", "conv1d", "conv.conv")
"""Modules that llama.cpp computes without asking for adapters: it would load the file and leave them out."""

LOW_RANK = ("lora_a", "lora_b")


class Quantization(NamedTuple):
    """How one matrix is quantized: `mode` is one of MLX's, affine or a micro-scaling one."""

    group_size: int
    bits: int
    mode: str


class Weights:
    """A folder's tensors under mlx-lm's names and in its shapes; each is read when it is taken, and not kept.

    mlx-lm's own model puts in order what Hugging Face stores otherwise (experts one by one, norms less 1, parts in one
    matrix) and leaves out what is not of the text model; all of it lazily.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._folder, self._config = folder, config
        self._left = self._read()
        self.stored = {name: (array.shape, array.dtype) for name, array in self._left.items()}

    def take(self, name: str) -> mx.array:
        """One tensor, loaded now."""
        if name not in self._left:  # it has been taken before, and was not kept
            self._left = self._read()
        return self._left.pop(name)

    def _read(self) -> dict[str, mx.array]:
        found: dict[str, mx.array] = {}
        for file in sorted(self._folder.glob("model*.safetensors")):
            found |= read_weights(file)
        if not found:
            raise ModelError(f"{self._folder} holds no model*.safetensors.", "Give the folder of a model.")
        model, _, prefix, _ = text_model(self._config)  # a new one: some of them can put in order but once
        if hasattr(model, "sanitize"):
            try:
                found = model.sanitize(found)
            except (KeyError, ValueError, IndexError) as error:
                raise ModelError(
                    f"{self._folder}: mlx-lm does not find what it looks for among the tensors: {error!r}.",
                    "Give a complete folder that mlx-lm loads.",
                ) from error
        return {name.removeprefix(prefix): array for name, array in found.items() if "inv_freq" not in name}


@dataclass(frozen=True)
class Base:
    """An opened model folder. Tensor names are those of the text model in mlx-lm, whatever the folder's prefix."""

    folder: Path
    architecture: Architecture
    model_type: str
    config: Mapping[str, Any]  # of the text model
    args: Any  # mlx-lm's ModelArgs: the config with mlx-lm's defaults
    shapes: Mapping[str, tuple[int, ...]]  # of the model's parameters, not quantized
    weights: Weights
    prefix: str  # what names of adapter modules begin with beside the text model's names

    def setting(self, key: str) -> Any:
        """A setting as mlx-lm's model has it, else as config.json says; None when neither knows it."""
        value = getattr(self.args, key, None)
        return self.config.get(key) if value is None else value

    @property
    def stored(self) -> Mapping[str, tuple[tuple[int, ...], mx.Dtype]]:
        """Shape and dtype of each tensor as the folder has it, packed where it is quantized."""
        return self.weights.stored

    def quantization(self, name: str) -> Quantization | None:
        """How the weight `name` is quantized; None when it is not."""
        module = name.removesuffix(".weight")
        if not name.endswith(".weight") or f"{module}.scales" not in self.stored:
            return None
        columns = self.shapes[name][-1]
        groups, packed = (self.stored[part][0][-1] for part in (f"{module}.scales", name))
        mode = "affine"
        if f"{module}.biases" not in self.stored:  # which only affine quantization has
            said = self.config.get("quantization") or {}
            own = said.get(self.prefix + module)
            mode = (own if isinstance(own, dict) else said)["mode"]
        return Quantization(columns // groups, packed * 32 // columns, mode)

    def dense(self, name: str) -> np.ndarray:
        """One tensor in float32, dequantized in float32."""
        weight, how = self.weights.take(name), self.quantization(name)
        if how is not None:
            module = name.removesuffix(".weight")
            biases = self.weights.take(f"{module}.biases") if how.mode == "affine" else None
            weight = unpacked(weight, self.weights.take(f"{module}.scales"), biases, *how)
        return np.array(weight.astype(mx.float32))


def open_base(folder: str | Path) -> Base:
    """Open a folder that mlx-lm loads, of an architecture in the table.

    Raises ModelError, with another way, for other architectures, for quantization that is not MLX's, and for tensors
    that are missing or have no place.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json", "Give the folder of a model that mlx-lm loads.")
    quantized = config.get("quantization")
    elsewhere = config.get("quantization_config") if quantized is None else None
    if elsewhere and elsewhere.get("quant_method") == "mxfp4":  # which MLX reads as it is
        quantized, elsewhere = {"group_size": 32, "bits": 4, "mode": "mxfp4"}, None
    text_type = (config.get("text_config") or {}).get("model_type", "")
    outer_type = config.get("model_type", "")
    names = (outer_type, TEXT_MODELS.get(outer_type, text_type))
    model_type = next((name for name in names if name in ARCHITECTURES), None)
    if model_type is None:
        raise ModelError(
            f"{folder}: models of type {outer_type!r} are not written as GGUF here; those that are: "
            f"{', '.join(ARCHITECTURES)}.",
            ANOTHER_WAY,
        )
    if elsewhere:
        raise ModelError(
            f"{folder} is quantized in the format {elsewhere.get('quant_method')!r}, which is not MLX's.",
            "Turn it into an MLX folder first: mlx_lm.convert --hf-path FOLDER --mlx-path NEW_FOLDER",
        )
    _, args, prefix, shapes = text_model(config)
    weights = Weights(folder, config)
    _check_names(folder, shapes, weights.stored)
    config = {**config, **(config.get("text_config") or {}), "quantization": quantized}
    return Base(folder, ARCHITECTURES[model_type], model_type, config, args, shapes, weights, prefix)


def text_model(config: Mapping[str, Any]) -> tuple[Any, Any, str, dict[str, tuple[int, ...]]]:
    """mlx-lm's model for a config.json, its text model's ModelArgs, what names of the text model's parameters begin
    with in it, and their shapes, not quantized, by name without that. Raises ModelError where mlx-lm has no such model.
    """
    from mlx_lm.utils import MODEL_REMAPPING

    kind = config["model_type"]
    try:
        module = importlib.import_module("mlx_lm.models." + MODEL_REMAPPING.get(kind, kind))
    except ImportError as error:
        raise ModelError(f"mlx-lm has no model of type {kind!r}.", "Give a folder that mlx-lm loads.") from error
    # it writes into what it is given
    model = module.Model(module.ModelArgs.from_dict(copy.deepcopy(dict(config))))
    prefix = "language_model." if hasattr(model, "language_model") else ""
    args = getattr(model, "language_model", model).args
    # Arrays of a model just made are lazy: this takes their shapes and no memory.
    shapes = {name.removeprefix(prefix): array.shape for name, array in flat(model.parameters()).items()}
    return model, args, prefix, shapes


def _check_names(folder: Path, shapes: Mapping[str, tuple[int, ...]], stored: Collection[str]) -> None:
    missing = [name for name in shapes if name not in stored and name != "lm_head.weight"]
    strange = [name for name in stored if name not in shapes and not name.endswith((".scales", ".biases"))]
    strange = [name for name in strange if name != "lm_head.weight"]  # a tied model's copy of its embedding
    wrong = [f"lacks {', '.join(missing[:5])}"] * bool(missing) + [f"has {', '.join(strange[:5])}"] * bool(strange)
    if wrong:
        raise ModelError(
            f"{folder} {' and '.join(wrong)} against what its config.json describes ({len(missing)} tensors missing, "
            f"{len(strange)} without a place).",
            "Give a complete folder that mlx-lm loads.",
        )


@dataclass(frozen=True)
class LoraFolder:
    """A LoRA adapter: y = W x + scale · B A x."""

    rank: int
    scale: float
    modules: tuple[str, ...]  # names of the text model, in the order of the base's tensors
    weights: Mapping[str, mx.array]  # by mlx-lm's names
    prefix: str  # what those names begin with beside the text model's

    def matrices(self, module: str) -> tuple[np.ndarray, np.ndarray]:
        """A `[rank, in]` and B `[out, rank]` in float32; for experts both with a first axis over them."""
        a, b = (np.array(self.weights[f"{self.prefix}{module}.{half}"].astype(mx.float32)) for half in LOW_RANK)
        return (a, b) if a.ndim == 3 else (np.ascontiguousarray(a.T), np.ascontiguousarray(b.T))

    def delta(self, module: str) -> np.ndarray:
        """scale · B A, float32 `[out, in]` or `[experts, out, in]`."""
        a, b = self.matrices(module)
        return np.matmul(b * np.float32(self.scale), a)


def read_lora(folder: str | Path, base: Base) -> LoraFolder:
    """Read an mlx-lm or PEFT adapter folder for `base`; no model is loaded.

    Raises ModelError that names all that llama.cpp cannot take: DoRA, LoRA on embeddings, convolutions or a tied
    head, modules that the base does not have; and for a folder that is no adapter.
    """
    folder = Path(folder).expanduser()
    paths = {base.prefix + name.rsplit(".", 1)[0] for name in base.shapes}
    adapter, weights = lora.read(folder, paths, base.setting("num_hidden_layers"))
    modules = {name.removeprefix(base.prefix).rsplit(".", 1)[0] for name in weights}
    problems = []
    if adapter.fine_tune_type == "dora" or any(name.endswith(".m") for name in weights):
        problems.append("it is a 'dora' fine-tune, whose magnitudes (DoRA) llama.cpp's adapters do not know")
    if plain := sorted(module for module in modules if module.endswith(WITHOUT_ADAPTERS)):
        problems.append(f"it adapts {', '.join(plain)}, which llama.cpp uses without adapters")
    if "lm_head" in modules and "lm_head.weight" not in base.stored:
        problems.append("it adapts the output head of a model whose head is its embedding")
    unknown = sorted(
        module
        for module in modules - {*plain, "lm_head"}
        if f"{module}.weight" not in base.shapes
        or any(f"{base.prefix}{module}.{half}" not in weights for half in LOW_RANK)
    )
    if unknown:
        problems.append(f"the base has no place for, or half is missing of, {', '.join(unknown[:5])}")
    if problems:
        raise ModelError(
            f"{folder} cannot be written as GGUF: {'; '.join(problems)}.",
            "Fuse it instead: `mlx-dpo fuse`, then export the fused folder.",
        )
    named = (name.removesuffix(".weight") for name in base.shapes)
    return LoraFolder(adapter.rank, adapter.scale, tuple(m for m in named if m in modules), weights, base.prefix)
