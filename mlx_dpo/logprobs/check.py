"""The optimizations held against the plain path on two short rows of the data, before a run trusts them.

A new architecture may do anything with a cache or a block that it did not make. What does not give the plain path's
log-probs and gradients is left out for that model, with a warning; the run is then slower, and right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.config import SpeedConfig
from mlx_dpo.data.batching import Batch, length, make_batch
from mlx_dpo.data.tokenize import TokenizedRow
from mlx_dpo.events import OnEvent, Warned, ignore
from mlx_dpo.logprobs.activation_cache import ActivationCache
from mlx_dpo.logprobs.buckets import ONE_BUCKET
from mlx_dpo.logprobs.scorer import OPTIMIZATIONS, Scorer, optimizations_on, plain_logps
from mlx_dpo.models.trees import flat

CUT = (24, 12)
"""Tokens of the prompt and of each answer that the comparison reads at most: the plain path makes all their logits."""

SHORT_STEP = 3
"""Tokens that it reads at a time where a run reads in steps: several of them make a prompt, and an answer."""

TOLERANCE = {mx.float32: 1e-3, mx.bfloat16: 0.15, mx.float16: 0.03}
"""Largest difference of a token's log-prob that rounding explains, by the dtype a model computes in, nats."""


def check_optimizations(
    model: nn.Module,
    rows: Sequence[TokenizedRow],
    speed: SpeedConfig,
    *,
    checkpoint: bool = False,
    on_event: OnEvent = ignore,
) -> tuple[SpeedConfig, float]:
    """The optimizations of `speed` that hold for `model`, and the largest difference of a token's log-prob, in nats.

    All of them are tried together first; then less and less (`fallbacks`), and at last none. What is left out is named
    in a warning with what was wrong with it.
    """
    two = two_short(rows)
    batch = make_batch(two, [0, 1])
    expected, expected_gradient = _logps_and_gradient(model, batch, None)
    tolerance = TOLERANCE.get(_dtype(model), 1e-3)
    *tries, plain = fallbacks(speed)
    complaint = ""
    for candidate in tries:
        difference = relative = 0.0
        try:
            # both extremes of bucketing: every kind of mask and offset occurs in one of them
            for bucket_overhead in (ONE_BUCKET, 0):
                cache = ActivationCache(two, 1e12, 0)
                short = replace(candidate, prefill_step_size=SHORT_STEP * (candidate.prefill_step_size != 0))
                scorer = Scorer(
                    model, short, checkpoint=checkpoint, activation_cache=cache, bucket_overhead=bucket_overhead
                )
                scorer(batch, gradient=False)  # fills the cache
                found, gradient = _logps_and_gradient(model, batch, scorer)
                difference = max(difference, float(mx.abs(found - expected).max()))
                relative = max(relative, _relative(gradient, expected_gradient))
        except Exception as error:  # of any kind, from the model's own code: then this is left out
            complaint = complaint or f"{type(error).__name__}: {error}"
            continue
        if difference <= tolerance and relative <= 10 * tolerance:
            off = [name for name in optimizations_on(speed) if name not in optimizations_on(candidate)]
            if off:
                on_event(Warned(f"speed.{', speed.'.join(off)} left out for this model ({complaint})"))
            return candidate, difference
        complaint = complaint or f"log-probs differ by {difference:.2g}, gradients by {relative:.2g} of their norm"
    on_event(Warned(f"the plain path is taken, without any optimization, for this model ({complaint})"))
    return plain, 0.0


def fallbacks(speed: SpeedConfig) -> list[SpeedConfig]:
    """What to try in turn: all, each one left out, both that need causal blocks left out, and the plain path."""
    fewer = [replace(speed, **{name: OPTIMIZATIONS[name]}) for name in optimizations_on(speed)]
    causal = replace(speed, activation_cache=False, shared_prompt=False)
    return [speed, *fewer, causal, replace(speed, **OPTIMIZATIONS)]


def two_short(rows: Sequence[TokenizedRow]) -> list[TokenizedRow]:
    """Two of the shortest rows, of unequal prompts where there are any, cut to `CUT` tokens."""
    short = sorted(rows, key=length)[:8]
    other = next((row for row in short if len(row.prompt) != len(short[0].prompt)), short[-1])
    return [_cut(short[0], *CUT), _cut(other, CUT[0] - 8, CUT[1])]


def _cut(row: TokenizedRow, prompt: int, completion: int) -> TokenizedRow:
    cut = row._replace(completions=tuple(ids[:completion] for ids in row.completions))
    return cut._replace(prompt=row.prompt[-prompt:]) if row.shares_prompt else cut


def _logps_and_gradient(model: nn.Module, batch: Batch, scorer: Scorer | None) -> tuple[mx.array, dict[str, mx.array]]:
    """Token log-probs, by `scorer` or by the plain path, and a gradient; none where nothing is trained.

    The gradient is that of the first answer's log-prob less half of the others', so that answers do not cancel.
    """
    model.eval()
    if not flat(model.trainable_parameters()):
        logps = (plain_logps(model, batch) if scorer is None else scorer(batch, gradient=False)).logps
        mx.eval(logps)
        return logps, {}
    weight = mx.array([1.0] + [-0.5] * (batch.mask.shape[1] - 1))

    def objective(model: nn.Module) -> tuple[mx.array, mx.array]:
        out = plain_logps(model, batch) if scorer is None else scorer(batch, gradient=True)
        return (out.logps.sum(-1) * weight).sum(), out.logps

    (_, logps), gradient = nn.value_and_grad(model, objective)(model)
    mx.eval(logps, gradient)
    return logps, flat(gradient)


def _relative(found: dict[str, mx.array], expected: dict[str, mx.array]) -> float:
    """‖found − expected‖ / ‖expected‖ over all parameters."""
    difference = sum(
        float(mx.square((found[name] - value).astype(mx.float32)).sum()) for name, value in expected.items()
    )
    norm = sum(float(mx.square(value.astype(mx.float32)).sum()) for value in expected.values())
    return math.sqrt(difference / norm) if norm else 0.0


def _dtype(model: nn.Module) -> mx.Dtype:
    """The dtype a model computes in: that of its norms, since weights may be packed."""
    return next(
        (value.dtype for name, value in flat(model.parameters()).items() if name.endswith("norm.weight")), mx.float32
    )
