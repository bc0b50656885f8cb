"""One optimizer step: gradients by micro-batches, clipped and applied, with the next step described meanwhile.

MLX computes while Python goes on. A step's thousands of operations take Python some 50 ms to describe, as long as a GPU
takes for a short step; so they are described while the step before is computed. Nothing of the next step is computed,
or allocated, before this one's metrics are known.
"""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_map

from mlx_dpo.data.batching import Batch, make_batch
from mlx_dpo.errors import RunError
from mlx_dpo.evaluation.rows import within_noise
from mlx_dpo.logprobs.scorer import wanted_stats
from mlx_dpo.losses.metrics import Sums, averages
from mlx_dpo.losses.objective import batch_loss, batch_weight
from mlx_dpo.reference import store
from mlx_dpo.training.checkpoint import TrainerState, random_key, set_random_key
from mlx_dpo.training.optim import make_update
from mlx_dpo.training.setup import PreparedRun


class Finished(NamedTuple):
    """The arrays that a step leaves, all of them computed: trainable parameters, optimizer state, random state."""

    parameters: dict[str, Any]
    optimizer: dict[str, Any]
    random: mx.array


class Described(NamedTuple):
    """A step of which nothing is computed yet. `first` is taken out of the list when it is: gradients and sums of the
    first micro-batch. `shares` are the micro-batches' weights in the step's mean."""

    micro_batches: list[list[int]]
    batches: list[Batch]
    shares: list[float]
    first: list[tuple[dict[str, Any], Sums]]


class Steps:
    """Takes a run's optimizer steps, one a call; `go_back` undoes what is not finished."""

    def __init__(self, prepared: PreparedRun, optimizer: optimizers.Optimizer) -> None:
        self._prepared, self._optimizer = prepared, optimizer
        self._model = prepared.loaded.model
        stats = wanted_stats(prepared.config)

        def objective(
            model: nn.Module, batch: Batch, ref_logps: mx.array | None, share: float
        ) -> tuple[mx.array, Sums]:
            policy = prepared.scorer(batch, stats, gradient=True)
            loss, sums = batch_loss(policy, ref_logps, batch, prepared.config.loss, prepared.kind)
            sums |= within_noise(policy.logps, ref_logps, batch, prepared.checked.noise)
            return loss * share, sums

        self._gradient_of = nn.value_and_grad(self._model, objective)
        self._update = make_update(optimizer, prepared.config.optim.max_grad_norm)
        self._described: Described | None = None
        self._finished = Finished(self._model.trainable_parameters(), optimizer.state, random_key())
        mx.eval(self._finished)

    def __call__(
        self, micro_batches: list[list[int]], rate: float, state: TrainerState, ahead: list[list[int]] | None = None
    ) -> dict[str, float]:
        """Takes the step of these micro-batches (row indices) with learning rate `rate`; gives its metrics.

        `ahead` are the next step's micro-batches, to be described meanwhile; None where something else comes first.
        `state` moves on by the step once all of it is computed.

        Raises:
            RunError: the loss or the gradient is no number.
            RuntimeError: MLX or its device failed; after `go_back` the run stands where it stood before the call.
        """
        began = time.perf_counter()
        step = self._described
        if step is None or step.micro_batches != micro_batches:
            step = self._describe(micro_batches)
        self._described = None
        fresh, parts, norm = self._begin(step, rate)
        if ahead is not None and self._prepared.moving_reference is None:  # scoring that one would not wait its turn
            self._described = self._describe(ahead)
        mx.eval(fresh, parts, norm)
        metrics = averages(parts) | {"grad_norm": float(norm), "learning_rate": rate}
        if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["grad_norm"]):
            raise RunError(
                f"step {state.step + 1}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; not saved",
                "lower --learning-rate, or look at the rows with `mlx-dpo check`; --resume goes on from a checkpoint",
            )
        self._model.update(fresh.parameters)  # the arrays themselves, where describing left copies of them
        moving, every = self._prepared.moving_reference, self._prepared.config.loss.ref_model_sync_steps
        if moving is not None and (state.step + 1) % (every or 1) == 0:
            moving.follow()
        self._finished = fresh
        state.step += 1
        state.tokens += sum(int(batch.tokens_length.sum()) for batch in step.batches)
        state.seconds += time.perf_counter() - began
        return metrics

    def go_back(self) -> None:
        """Puts back what the last finished step left: parameters, optimizer and random numbers."""
        self._described = None
        self._model.update(self._finished.parameters)
        self._optimizer.state = self._finished.optimizer
        set_random_key(self._finished.random)

    def _describe(self, micro_batches: list[list[int]]) -> Described:
        rows, loss = self._prepared.rows, self._prepared.config.loss
        batches = [make_batch([rows[i] for i in indices], indices) for indices in micro_batches]
        weights = [batch_weight(batch, loss) for batch in batches]
        shares = [weight / sum(weights) for weight in weights]
        self._model.train()
        return Described(micro_batches, batches, shares, [self._gradient(batches[0], shares[0])])

    def _gradient(self, batch: Batch, share: float) -> tuple[dict[str, Any], Sums]:
        known = self._prepared.ref_logps
        ref_logps = None if known is None else store.batch_ref_logps(known, batch)
        (_, sums), gradients = self._gradient_of(self._model, batch, ref_logps, share)
        return gradients, sums

    def _begin(self, step: Described, rate: float) -> tuple[Finished, list[Sums], mx.array]:
        """Has all of a step computed and waits for none of it but micro-batches that others follow."""
        gradients, sums = step.first.pop()
        parts = [sums]
        mx.async_eval(gradients, sums)
        for batch, share in zip(step.batches[1:], step.shares[1:], strict=True):
            if self._prepared.moving_reference is not None:  # which computes something itself
                mx.eval(gradients, sums)
            fresh, sums = self._gradient(batch, share)
            mx.eval(gradients, parts)  # here: one micro-batch's activations are gone before the next one's
            gradients = tree_map(mx.add, gradients, fresh)
            del fresh  # else it would keep the unclipped gradients beside the clipped ones
            parts.append(sums)
            mx.async_eval(gradients, sums)
        self._optimizer.learning_rate = rate
        # what the last step left stays as it is until this one is finished
        parameters, optimizer, norm = self._update(self._finished.parameters, gradients, self._optimizer.state)
        self._model.update(parameters)
        self._optimizer.state = optimizer
        fresh_state = Finished(parameters, optimizer, random_key())
        mx.async_eval(fresh_state, norm)
        return fresh_state, parts, norm
