"""What the workers of other MLX trainers share: an adapter by mlx-lm's own function, a data set that is one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from benchmarks.workers.probe import module_names


class Batches:
    """A data set that holds the batch of the step at hand.

    Trainers that order rows themselves then see, whatever their order, the same batch at the same step as everyone.
    """

    def __init__(self, batches: Sequence[Sequence[Any]]) -> None:
        self._batches = batches
        self._at = 0

    def __len__(self) -> int:
        return len(self._batches[0])

    def __getitem__(self, row: int) -> Any:
        return self._batches[min(self._at, len(self._batches) - 1)][row]

    def itemlen(self, row: int) -> int:
        """The length of a row whose first element is its tokens."""
        return len(self[row][0])

    def advance(self) -> None:
        """The step is done: the next batch."""
        self._at += 1


def adapt(model: nn.Module, spec: dict[str, Any]) -> None:
    """Freezes `model` and puts the spec's adapter on it."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model.freeze()
    settings = {"rank": spec["rank"], "scale": spec["scale"], "dropout": 0.0, "keys": module_names(spec)}
    linear_to_lora_layers(model, spec["top_layers"], settings)
    mx.eval(model.parameters())


def stand_in_device_info() -> None:
    """Some trainers ask for the working-set size, which only Metal knows: off Metal they get one and may limit it."""
    if mx.metal.is_available():
        return
    known = mx.device_info
    mx.device_info = lambda *args: (
        {"max_recommended_working_set_size": 16 << 30, "memory_size": 24 << 30} | dict(known(*args))
    )
    mx.set_wired_limit = lambda limit: 0
