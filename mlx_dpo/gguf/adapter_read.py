"""An adapter folder as an export reads it: which modules, with what matrices and what scale."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_dpo.errors import ModelError
from mlx_dpo.gguf.base import Base, load_tensors

FUSE = "Fuse it instead: `mlx-dpo fuse`, then export the fused folder."


@dataclass(frozen=True)
class LoraFolder:
    """A LoRA adapter in mlx-lm's layout: y = W x + scale · B A x."""

    file: Path
    rank: int
    scale: float
    modules: tuple[str, ...]  # names of the text model, in the order of the base's tensors
    prefix: str

    def matrices(self, module: str) -> tuple[np.ndarray, np.ndarray]:
        """A `[rank, in]` and B `[out, rank]` in float32; for experts both with a first axis over them."""
        weights = load_tensors(self.file)
        a = np.array(weights[f"{self.prefix}{module}.lora_a"].astype(mx.float32))
        b = np.array(weights[f"{self.prefix}{module}.lora_b"].astype(mx.float32))
        return (a, b) if a.ndim == 3 else (np.ascontiguousarray(a.T), np.ascontiguousarray(b.T))

    def delta(self, module: str) -> np.ndarray:
        """scale · B A, float32 `[out, in]` or `[experts, out, in]`."""
        a, b = self.matrices(module)
        return np.matmul(b * np.float32(self.scale), a)


def read_lora(folder: str | Path, base: Base) -> LoraFolder:
    """Read the settings and names of mlx-lm's adapter folder.

    Raises ModelError that names all that llama.cpp cannot take: full fine-tunes, DoRA, LoRA on the embedding or on a
    tied head, modules that the base does not have; and for a folder that is no adapter.
    """
    folder = Path(folder)
    file, settings_file = folder / "adapters.safetensors", folder / "adapter_config.json"
    try:
        settings = json.loads(settings_file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ModelError(f"{settings_file} cannot be read: {error}", "Give the folder of an adapter.") from error
    if not file.is_file():
        raise ModelError(f"{folder} holds no adapters.safetensors.", "Give the folder of an mlx-lm adapter.")
    kind = settings.get("fine_tune_type", "lora")
    if kind != "lora":
        raise ModelError(f"{folder} holds a {kind!r} fine-tune; llama.cpp's adapters are plain LoRA.", FUSE)
    names = set(load_tensors(file))
    modules = {name.removeprefix(base.prefix).rsplit(".", 1)[0] for name in names}
    problems = []
    if any(name.endswith(".m") for name in names):
        problems.append("it has DoRA's magnitudes, which llama.cpp's adapters do not know")
    if "model.embed_tokens" in modules:
        problems.append("it adapts the embedding, for which llama.cpp has no place")
    if "lm_head" in modules and "lm_head.weight" not in base.files:
        problems.append("it adapts the output head of a model whose head is its embedding")
    unknown = sorted(
        module
        for module in modules - {"model.embed_tokens", "lm_head"}
        if f"{module}.weight" not in base.shapes
        or any(f"{base.prefix}{module}.{part}" not in names for part in ("lora_a", "lora_b"))
    )
    if unknown:
        problems.append(f"the base has no place for, or half is missing of, {', '.join(unknown[:5])}")
    if problems:
        raise ModelError(f"{folder} cannot be written as GGUF: {'; '.join(problems)}.", FUSE)
    parameters = settings["lora_parameters"]
    return LoraFolder(
        file=file,
        rank=int(parameters["rank"]),
        scale=float(parameters["scale"]),
        modules=tuple(m for m in (n.removesuffix(".weight") for n in base.shapes) if m in modules),
        prefix=base.prefix,
    )
