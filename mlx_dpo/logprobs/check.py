"""The optimizations held against the plain path on two short rows of the data, before a run trusts them.

A new architecture may do anything with a cache or a block that it did not make. What does not give the plain path's
log-probs and gradients is left out for that model, with a warning; the run is then slower, and right.

Both are computed in float32. In 16 bits a GPU rounds by the shape of what it multiplies, and a token's log-prob may be
half a nat off where nothing is wrong: a tolerance for that would let real errors pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.config import SpeedConfig
from mlx_dpo.data.batching import Batch, length, make_batch
from mlx_dpo.data.tokenize import TokenizedRow
from mlx_dpo.errors import device_error
from mlx_dpo.events import OnEvent, Warned, ignore
from mlx_dpo.logprobs.activation_cache import ActivationCache, first_adapted
from mlx_dpo.logprobs.buckets import ONE_BUCKET
from mlx_dpo.logprobs.layers import CheckpointedLayer, CheckpointFn, Layer
from mlx_dpo.logprobs.precision import cut, in_float32, rounding_noise, without_dropout
from mlx_dpo.logprobs.scorer import OPTIMIZATIONS, Scorer, optimizations_on, plain_logps
from mlx_dpo.logprobs.split_model import split_model
from mlx_dpo.models.trees import flat

CUT = (24, 12)
"""Tokens of the prompt and of each answer that the comparison reads at most: the plain path makes all their logits."""

SHORT_STEP = 3
"""Tokens that it reads at a time where a run reads in steps: several of them make a prompt, and an answer."""

TOLERANCE, GRADIENT_TOLERANCE = 1e-3, 1e-2
"""What rounding explains in float32: of a token's log-prob, in nats, and of a gradient, as a share of its norm."""

NEVER = 0.25
"""Share of a gradient's norm that rounding never explains: without any gradient it is 1, with a wrong sign 2."""


class Checked(NamedTuple):
    """The optimizations that hold for a model, and how exactly it is computed.

    `difference` is the largest one of a token's log-prob, in nats, between them and the plain path in float32; `noise`
    what rounding does to a token's log-prob in the model's own dtype (`rounding_noise`), 0 where that is float32.
    """

    speed: SpeedConfig
    difference: float
    noise: float = 0.0


def check_optimizations(
    model: nn.Module,
    rows: Sequence[TokenizedRow],
    speed: SpeedConfig,
    *,
    checkpoint: bool = False,
    on_event: OnEvent = ignore,
) -> Checked:
    """The optimizations of `speed` that hold for `model`.

    All of them are tried together first; then less and less (`fallbacks`), and at last none. What is left out is named
    in a warning with what was wrong with it.
    """
    with without_dropout(model):
        with in_float32(model):
            checked = _check(model, two_short(rows), speed, checkpoint, on_event)
        if _dtype(model) == mx.float32 and mx.default_device() == mx.cpu:  # a GPU's float32 may be TF32
            return checked
        own = Scorer(model, checked.speed)
        return checked._replace(noise=rounding_noise(lambda batch, grad: own(batch, gradient=grad).logps, rows))


def _check(
    model: nn.Module, two: list[TokenizedRow], speed: SpeedConfig, checkpoint: bool, on_event: OnEvent
) -> Checked:
    batch = make_batch(two, [0, 1])
    copies = holds_16_bits(model)
    plain = plain_score(model, mx.checkpoint if copies else None)
    expected = measure(model, batch, lambda batch, gradient: plain(batch))
    tolerance, relative_tolerance = TOLERANCE, GRADIENT_TOLERANCE
    if _dtype(model) != mx.float32:  # a block that narrows what it reads: then its own rounding is the measure
        noise = rounding_noise(lambda batch, gradient: plain(batch), two)
        tolerance, relative_tolerance = max(TOLERANCE, 10 * noise), NEVER
    *tries, off = fallbacks(speed)
    complaint = ""
    for candidate in tries:
        difference = relative = 0.0
        try:
            # both extremes of bucketing: every kind of mask and offset occurs in one of them
            for bucket_overhead in (ONE_BUCKET, 0):
                cache = ActivationCache(two, 1e12, 0)
                short = replace(candidate, prefill_step_size=SHORT_STEP * (candidate.prefill_step_size != 0))
                scorer = Scorer(
                    model, short, checkpoint=checkpoint or copies, activation_cache=cache,
                    bucket_overhead=bucket_overhead,
                )  # fmt: skip
                found = measure(model, batch, lambda batch, gradient: scorer(batch, gradient=gradient).logps)  # noqa: B023
                difference = max(difference, *_differences(found, expected))
                relative = max(relative, relative_difference(found.gradient, expected.gradient))
        except Exception as error:  # of any kind, from the model's own code: then this is left out
            if device_error(error):
                raise
            complaint = complaint or f"{type(error).__name__}: {error}"
            continue
        if difference <= tolerance and relative <= relative_tolerance:
            left_out = [name for name in optimizations_on(speed) if name not in optimizations_on(candidate)]
            if left_out:
                on_event(Warned(f"speed.{', speed.'.join(left_out)} left out for this model ({complaint})"))
            return Checked(candidate, difference)
        complaint = complaint or f"log-probs differ by {difference:.2g}, gradients by {relative:.2g} of their norm"
    on_event(Warned(f"the plain path is taken, without any optimization, for this model ({complaint})"))
    return Checked(off, 0.0)


def fallbacks(speed: SpeedConfig) -> list[SpeedConfig]:
    """What to try in turn: all, each one left out, both that need causal blocks left out, and the plain path."""
    fewer = [replace(speed, **{name: OPTIMIZATIONS[name]}) for name in optimizations_on(speed)]
    causal = replace(speed, activation_cache=False, shared_prompt=False)
    return [speed, *fewer, causal, replace(speed, **OPTIMIZATIONS)]


def two_short(rows: Sequence[TokenizedRow]) -> list[TokenizedRow]:
    """Two short rows, cut to `CUT` tokens; the second one's prompt is the shorter, so that there is padding.

    Prompts of a token or two are passed over where there are others: nothing of the shorter would be read.
    """
    short = sorted(rows, key=lambda row: (len(row.prompt) < 3, length(row)))[:2]
    first = cut(short[0], *CUT)
    return [first, cut(short[-1], max(2, len(first.prompt) - 8), CUT[1])]


class Measured(NamedTuple):
    """Token log-probs `[R, K, C]` by a pass without and by one with a gradient, and that gradient by parameter."""

    alone: mx.array
    logps: mx.array
    gradient: dict[str, mx.array]


def measure(model: nn.Module, batch: Batch, score: Callable[[Batch, bool], mx.array]) -> Measured:
    """What `score` gives; no gradient where nothing is trained. The first pass fills an activation cache.

    The gradient is that of the first answer's log-prob less half of the others', so that answers do not cancel.
    """
    alone = score(batch, False)
    mx.eval(alone)
    if not flat(model.trainable_parameters()):
        return Measured(alone, alone, {})
    weight = mx.array([1.0] + [-0.5] * (batch.mask.shape[1] - 1))

    def objective(model: nn.Module) -> tuple[mx.array, mx.array]:
        logps = score(batch, True)
        return (logps.sum(-1) * weight).sum(), logps

    (_, logps), gradient = nn.value_and_grad(model, objective)(model)
    mx.eval(logps, gradient)
    return Measured(alone, logps, flat(gradient))


def _differences(found: Measured, expected: Measured) -> tuple[float, float]:
    """The largest difference of a token's log-prob without and with a gradient; not a number counts as infinite."""
    pairs = ((found.alone, expected.alone), (found.logps, expected.logps))
    without, with_ = (float(mx.nan_to_num(mx.abs(a - b), nan=math.inf).max()) for a, b in pairs)
    return without, with_


def holds_16_bits(model: nn.Module) -> bool:
    """Whether weights or scales are 16 bits wide.

    In float32 they are copied where they are used, and blocks that are computed twice do not keep the copies.
    """
    return any(value.dtype in (mx.bfloat16, mx.float16) for value in flat(model.parameters()).values())


def plain_score(model: nn.Module, checkpoint_fn: CheckpointFn | None) -> Callable[[Batch], mx.array]:
    """The plain path to token log-probs; adapted blocks by `checkpoint_fn`, where the model can be taken apart."""
    split, first = split_model(model), first_adapted(model)
    if checkpoint_fn is None or split is None:
        return lambda batch: plain_logps(model, batch).logps

    def logits(tokens: mx.array) -> mx.array:
        layers = [Layer(block) for block in model.layers]
        layers[first:] = [CheckpointedLayer(block, checkpoint_fn) for block in model.layers[first:]]
        hidden = split.hidden(tokens, layers=layers)
        return split.logits(hidden.reshape(-1, hidden.shape[-1]))

    return lambda batch: plain_logps(logits, batch).logps


def relative_difference(found: dict[str, mx.array], expected: dict[str, mx.array]) -> float:
    """‖found − expected‖ / ‖expected‖ over all parameters."""
    difference = sum(
        float(mx.square((found[name] - value).astype(mx.float32)).sum()) for name, value in expected.items()
    )
    norm = sum(float(mx.square(value.astype(mx.float32)).sum()) for value in expected.values())
    return math.sqrt(difference / norm) if norm else 0.0


def _dtype(model: nn.Module) -> mx.Dtype:
    """The dtype that a model computes in."""
    split = split_model(model)
    token = mx.zeros((1, 1), mx.int32)  # nothing is computed: a dtype is known before
    return (model(token) if split is None else split.hidden(token)).dtype
