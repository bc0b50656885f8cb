"""An adapter folder as a GGUF file is made of it: which of the base's matrices change, by what B A."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_dpo.errors import ModelError
from mlx_dpo.gguf.base import Base
from mlx_dpo.models import lora


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


LOW_RANK = ("lora_a", "lora_b")


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
