"""Optimizers and schedules by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
from mlx.utils import tree_map

from mlx_dpo.config import OptimConfig

OPTIMIZERS: dict[str, Callable[[OptimConfig], optimizers.Optimizer]] = {
    "adamw": lambda c: optimizers.AdamW(
        c.learning_rate, [c.adam_beta1, c.adam_beta2], c.adam_epsilon, c.weight_decay, bias_correction=True
    ),
    "adam": lambda c: optimizers.Adam(
        c.learning_rate, [c.adam_beta1, c.adam_beta2], c.adam_epsilon, bias_correction=True
    ),
    "sgd": lambda c: optimizers.SGD(c.learning_rate, c.momentum or 0.0, c.weight_decay),
    "lion": lambda c: optimizers.Lion(c.learning_rate, [c.adam_beta1, c.adam_beta2], c.weight_decay),
    "adafactor": lambda c: optimizers.Adafactor(
        c.learning_rate, scale_parameter=False, relative_step=False, weight_decay=c.weight_decay
    ),
    "muon": lambda c: optimizers.Muon(c.learning_rate, 0.95 if c.momentum is None else c.momentum, c.weight_decay),
}
"""Adam's variants correct their bias, as PyTorch's do and MLX's by default do not."""

SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
"""The learning rate's share of its peak, by progress from 0 to 1 after the warm-up."""


def make_optimizer(config: OptimConfig) -> optimizers.Optimizer:
    """The optimizer that `config` names; the loop sets its learning rate before every step."""
    return OPTIMIZERS[config.name](config)


def make_update(optimizer: optimizers.Optimizer, max_grad_norm: float) -> Callable[..., tuple[Any, Any, mx.array]]:
    """Clipping and the optimizer's rule as one function of trees of arrays: (parameters, gradients, optimizer state) to
    (new parameters, new state, gradient norm before clipping).

    Compiled, since it is the same thousands of small operations in every step: on a GPU each would be a kernel. All
    that changes from step to step is in its arguments, the learning rate in the optimizer state.
    """

    def update(parameters: Any, gradients: Any, state: Any) -> tuple[Any, Any, mx.array]:
        gradients, norm = optimizers.clip_grad_norm(gradients, max_grad_norm or math.inf)
        optimizer.state = tree_map(lambda value: value, state)  # its own dictionaries, which it writes into
        return optimizer.apply_gradients(gradients, parameters), optimizer.state, norm

    return mx.compile(update)


def warmup_steps(config: OptimConfig, total: int) -> int:
    """How many of `total` optimizer steps belong to the warm-up."""
    return config.warmup_steps if config.warmup_steps is not None else math.ceil(config.warmup_ratio * total)


def learning_rate(config: OptimConfig, step: int, total: int) -> float:
    """The rate of optimizer step `step` (from 0) of `total`: linear from 0 over the warm-up, then the named shape.

    The formulas are transformers', step for step, so that curves can be laid over TRL's.
    """
    warmup = warmup_steps(config, total)
    if step < warmup:
        return config.learning_rate * step / warmup
    return config.learning_rate * SHAPES[config.lr_scheduler_type](min((step - warmup) / max(1, total - warmup), 1.0))
