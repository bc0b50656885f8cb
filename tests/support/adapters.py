"""Adapters with something in them, for tests: random factors instead of a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dpo.config import Dtype, LoraConfig, ModelConfig
from mlx_dpo.data.tokenize import TokenizedRow
from mlx_dpo.models import lora
from mlx_dpo.models.load import load
from support.tiny_models import tiny_model_folder

PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"Say {word}."}],
        "chosen": [{"role": "assistant", "content": word}],
        "rejected": [{"role": "assistant", "content": f"I would say {word}, with many more words."}],
    }
    for word in ("hello", "short", "clear", "question", "answer", "thank you")
]


def write_pairs(file: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """Writes rows as JSON lines; six short chat pairs without any."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows or PAIRS))
    return file


def write_adapter(model: Path, folder: Path, *, kind: str = "lora", size: float = 0.05, **settings: Any) -> Path:
    """Writes a random adapter for `model` into `folder`, in mlx-lm's form: rank 4, scale 2, the top two blocks.

    `settings` are `keys`, `num_layers`, `rank`, `scale`; `kind` is lora or dora, whose magnitudes become 0.9 to 1.1 of
    the rows' lengths. `size` is the standard deviation of both factors.
    """
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    base, _ = load_model(model, lazy=True)
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.down_proj"], **settings}
    layers = parameters.pop("num_layers", 2)
    mx.random.seed(1)
    linear_to_lora_layers(base, layers, parameters, use_dora=kind == "dora")
    weights = {}
    for name, value in tree_flatten(base.parameters()):
        if name.endswith((".lora_a", ".lora_b")):
            weights[name] = mx.random.normal(value.shape) * size
        elif name.endswith(".m"):
            weights[name] = value.astype(mx.float32) * mx.random.uniform(0.9, 1.1, value.shape)
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": kind, "model": str(model), "num_layers": layers, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def random_rows(vocabulary: int, seed: int = 0, answers: int = 2) -> list[TokenizedRow]:
    """Rows of unequal prompts and answers, one answer a single token long; past a sliding window of 8."""
    random = np.random.default_rng(seed)

    def ids(count: int) -> list[int]:
        return [int(token) for token in random.integers(3, vocabulary, count)]

    return [
        TokenizedRow(
            f"row {prompt}",
            ids(prompt),
            tuple(ids(3 + 4 * k + prompt % 5 if prompt != 9 or k else 1) for k in range(answers)),
            (0,) * answers,
            tuple(float(k + 1) for k in range(answers)),
        )
        for prompt in (17, 9, 1, 23)
    ]


def adapted_model(
    folder: Path, arch: str, num_layers: int = 2, compute_dtype: Dtype = "float32", quantize_bits: int | None = None
) -> tuple[nn.Module, int]:
    path = tiny_model_folder(folder / arch, arch, quantize_bits=quantize_bits)
    loaded = load(ModelConfig(path=str(path), compute_dtype=compute_dtype))
    lora.attach(loaded.model, LoraConfig(num_layers=num_layers, rank=4), seed=0)
    keys = iter(mx.random.split(mx.random.key(1), 200))
    weights = [
        (name, mx.random.normal(value.shape, scale=0.05, key=next(keys)))
        for name, value in lora.parameters(loaded.model).items()
        if name.endswith("lora_b")
    ]
    loaded.model.load_weights(weights, strict=False)
    return loaded.model, len(loaded.tokenizer)
