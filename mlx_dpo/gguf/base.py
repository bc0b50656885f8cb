"""The folders that an export is made of, without loading the model: the base's settings, and tensors one at a time;
which of its matrices an adapter changes, by what B A."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
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
NOT_OF_THE_TEXT_MODEL = ("vision_tower.", "multi_modal_projector.")
LOW_RANK = ("lora_a", "lora_b")
EXPERT = re.compile(r"(.*\.mlp)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


class Quantization(NamedTuple):
    """How one matrix is quantized: `mode` is one of MLX's, affine or a micro-scaling one."""

    group_size: int
    bits: int
    mode: str


@dataclass(frozen=True)
class Base:
    """An opened model folder. Tensor names are those of the text model in mlx-lm, whatever the folder's prefix."""

    folder: Path
    architecture: Architecture
    model_type: str
    config: Mapping[str, Any]  # of the text model
    args: Any  # mlx-lm's ModelArgs: the config with mlx-lm's defaults
    shapes: Mapping[str, tuple[int, ...]]  # of the model's parameters, not quantized
    files: Mapping[str, list[tuple[Path, str]]]  # where each tensor lies; several: to be stacked
    prefix: str  # what names of adapter modules begin with beside the text model's names

    def setting(self, key: str) -> Any:
        """A setting as mlx-lm's model has it, else as config.json says; None when neither knows it."""
        value = getattr(self.args, key, None)
        return self.config.get(key) if value is None else value

    def array(self, name: str) -> mx.array:
        """One tensor, loaded now and not kept."""
        parts = [read_weights(file)[key] for file, key in self.files[name]]
        return parts[0] if len(parts) == 1 else mx.stack(parts)

    def quantization(self, name: str) -> Quantization | None:
        """How the weight `name` is quantized; None when it is not."""
        module = name.removesuffix(".weight")
        if not name.endswith(".weight") or f"{module}.scales" not in self.files:
            return None
        columns = self.shapes[name][-1]
        scales = self.array(f"{module}.scales")
        said = self.config.get("quantization") or {}
        mode = {**said, **(said.get(self.prefix + module) or {})}.get("mode", "affine")
        return Quantization(columns // scales.shape[-1], self.array(name).shape[-1] * 32 // columns, mode)

    def dense(self, name: str) -> np.ndarray:
        """One tensor in float32, dequantized in float32."""
        weight, how = self.array(name), self.quantization(name)
        if how is not None:
            module = name.removesuffix(".weight")
            biases = self.array(f"{module}.biases") if how.mode == "affine" else None
            weight = unpacked(weight, self.array(f"{module}.scales"), biases, *how)
        return np.array(weight.astype(mx.float32))


def open_base(folder: str | Path) -> Base:
    """Open a folder that mlx-lm loads, of an architecture in the table.

    Raises ModelError, with another way, for other architectures, for quantization that is not MLX's, and for tensors
    that are missing or have no place.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json", "Give the folder of a model that mlx-lm loads.")
    quantized_elsewhere = "quantization" not in config and config.get("quantization_config")
    quantization = config.get("quantization")
    prefix = ""
    if "text_config" in config:
        prefix = "language_model."
        vocab_size = {"vocab_size": config["vocab_size"]} if "vocab_size" in config else {}
        config = {**config["text_config"], **vocab_size, "quantization": quantization}
    model_type = config.get("model_type", "")
    if model_type not in ARCHITECTURES:
        raise ModelError(
            f"{folder}: models of type {model_type!r} are not written as GGUF here; those that are: "
            f"{', '.join(ARCHITECTURES)}.",
            ANOTHER_WAY,
        )
    if quantized_elsewhere:
        raise ModelError(
            f"{folder} is quantized in the format {quantized_elsewhere.get('quant_method')!r}, which is not MLX's.",
            "Turn it into an MLX folder first: mlx_lm.convert --hf-path FOLDER --mlx-path NEW_FOLDER",
        )
    args, shapes = text_model(model_type, config)
    files = _find_tensors(folder, prefix)
    _check_names(folder, shapes, files)
    return Base(folder, ARCHITECTURES[model_type], model_type, config, args, shapes, files, prefix)


def text_model(model_type: str, config: Mapping[str, Any]) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """mlx-lm's ModelArgs for a model of this kind, and the shapes of its parameters, not quantized, by name."""
    from mlx_lm.utils import MODEL_REMAPPING

    module = importlib.import_module("mlx_lm.models." + MODEL_REMAPPING.get(model_type, model_type))
    args = module.ModelArgs.from_dict(config)
    # Arrays of a model just made are lazy: this takes their shapes and no memory.
    return args, {name: array.shape for name, array in flat(module.Model(args).parameters()).items()}


def _find_tensors(folder: Path, prefix: str) -> dict[str, list[tuple[Path, str]]]:
    found: dict[str, list[tuple[Path, str]]] = {}
    experts: dict[str, dict[int, tuple[Path, str]]] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        for key in read_weights(file):
            name = key.removeprefix(prefix)
            if key.startswith(NOT_OF_THE_TEXT_MODEL) or "rotary_emb.inv_freq" in key:
                continue
            if match := EXPERT.fullmatch(name):  # Hugging Face has a tensor an expert, mlx-lm and ggml one for all
                stacked = f"{match[1]}.switch_mlp.{match[3]}.weight"
                experts.setdefault(stacked, {})[int(match[2])] = (file, key)
            else:
                found[name] = [(file, key)]
    return found | {name: [parts[i] for i in sorted(parts)] for name, parts in experts.items()}


def _check_names(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], files: Mapping[str, list[tuple[Path, str]]]
) -> None:
    if not files:
        raise ModelError(f"{folder} holds no model*.safetensors.", "Give the folder of a model.")
    missing = [name for name in shapes if name not in files and name != "lm_head.weight"]
    strange = [name for name in files if name not in shapes and not name.endswith((".scales", ".biases"))]
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

    Raises ModelError that names all that llama.cpp cannot take: DoRA, LoRA on the embedding or on a tied head, modules
    that the base does not have; and for a folder that is no adapter.
    """
    folder = Path(folder).expanduser()
    paths = {base.prefix + name.rsplit(".", 1)[0] for name in base.shapes}
    adapter, weights = lora.read(folder, paths, base.setting("num_hidden_layers"))
    modules = {name.removeprefix(base.prefix).rsplit(".", 1)[0] for name in weights}
    problems = []
    if adapter.fine_tune_type == "dora" or any(name.endswith(".m") for name in weights):
        problems.append("it is a 'dora' fine-tune, whose magnitudes (DoRA) llama.cpp's adapters do not know")
    if "model.embed_tokens" in modules:
        problems.append("it adapts the embedding, for which llama.cpp has no place")
    if "lm_head" in modules and "lm_head.weight" not in base.files:
        problems.append("it adapts the output head of a model whose head is its embedding")
    unknown = sorted(
        module
        for module in modules - {"model.embed_tokens", "lm_head"}
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
