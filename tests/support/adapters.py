"""Adapters with something in them, for tests: random factors instead of a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx

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
