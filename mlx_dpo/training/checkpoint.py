"""The whole training state, written atomically: whoever goes on from it ends where a straight run would have."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_unflatten

from mlx_dpo.errors import RunError
from mlx_dpo.files import written_whole
from mlx_dpo.models.lora import Adapter, parameters, save
from mlx_dpo.models.trees import flat, read_arrays
from mlx_dpo.reference.tr_dpo import MovingReference
from mlx_dpo.run.folder import RunFolder


@dataclass
class TrainerState:
    """Where a run stands: everything but arrays."""

    step: int = 0  # optimizer steps taken
    epoch: int = 0
    position: int = 0  # micro-batches of this epoch that are done
    tokens: int = 0  # tokens of prompts and answers read, as TRL counts num_tokens
    seconds: float = 0.0  # of training, evaluation not counted
    best: dict[str, float] | None = None  # metrics of the best evaluation
    best_step: int = 0
    warned_of_drift: bool = False
    warned_of_kl: bool = False
    evaluations: list[dict[str, float]] = field(default_factory=list)
    fingerprint: dict[str, Any] = field(default_factory=dict)  # of what decides the batches and their meaning


def save_checkpoint(
    run: RunFolder,
    model: nn.Module,
    adapter: Adapter,
    optimizer: optimizers.Optimizer,
    state: TrainerState,
    *,
    base: str,
    keep: int,
    reference: MovingReference | None = None,
) -> Path:
    """Writes `checkpoints/step-…/` beside and renames it, then drops all but the `keep` newest."""
    target = run.checkpoint(state.step)
    with written_whole(target, folder=True) as folder:
        save(model, adapter, folder, base=base)
        mx.save_safetensors(str(folder / "optimizer.safetensors"), flat(optimizer.state))
        mx.save_safetensors(str(folder / "random.safetensors"), {"key": random_key()})
        if reference is not None:
            reference.save(folder)
        (folder / "progress.json").write_text(json.dumps(asdict(state), indent=1) + "\n")
    for old in run.checkpoints()[:-keep]:
        shutil.rmtree(old)
    return target


def restore_checkpoint(
    folder: Path, model: nn.Module, optimizer: optimizers.Optimizer, fingerprint: dict[str, Any]
) -> TrainerState:
    """Puts adapter, optimizer and random state back, and says where the run stands.

    Raises:
        RunError: the checkpoint is damaged, or belongs to other data, another model or other settings; all named.
    """
    try:
        state = TrainerState(**json.loads((folder / "progress.json").read_text()))
        weights = read_arrays(folder / "adapters.safetensors")
        moments = read_arrays(folder / "optimizer.safetensors")
        key = read_arrays(folder / "random.safetensors")["key"]
        mx.eval(weights, moments, key)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise RunError(
            f"the checkpoint {folder} cannot be read: {error}", "remove it, and --resume takes the one before"
        ) from error
    changed = [
        f"{name}: was {state.fingerprint.get(name)!r}, is {value!r}"
        for name, value in fingerprint.items()
        if state.fingerprint.get(name) != value
    ]
    if changed:
        raise RunError(
            "the run cannot go on as it was, since these changed:\n  " + "\n  ".join(changed),
            "set them back, or start a new run with another --output",
        )
    if weights.keys() != parameters(model).keys():
        raise RunError(f"the checkpoint {folder} holds another adapter than this configuration makes")
    model.load_weights(list(weights.items()), strict=False)
    optimizer.state = tree_unflatten(list(moments.items()))
    set_random_key(key)
    return state


def random_key() -> mx.array:
    """The key of MLX's global random numbers, `[2]` uint32."""
    return mx.random.state[0]  # type: ignore[index]


def set_random_key(key: mx.array) -> None:
    """Makes MLX's global random numbers go on from a key that `random_key` gave."""
    high, low = np.array(key).tolist()
    mx.random.seed(high << 32 | low)  # a seed's key is its two halves, and there is no other way to set it
