"""Where a step's time goes: its parts one after the other, each waited for, and the whole step beside them."""

from __future__ import annotations

import io
import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers

from benchmarks.workers.ours import run_config
from benchmarks.workers.probe import Probe, read_spec, write_result
from mlx_dpo.data.batching import Batch, make_batch
from mlx_dpo.losses.compute import compute_loss
from mlx_dpo.models.trees import flat
from mlx_dpo.reference.store import batch_ref_logps
from mlx_dpo.training.checkpoint import TrainerState
from mlx_dpo.training.optim import make_optimizer
from mlx_dpo.training.setup import PreparedRun, prepare
from mlx_dpo.training.step import Steps

T = TypeVar("T")


class Clock:
    """Seconds by name, one entry a batch."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def time(self, name: str, call: Callable[[], T]) -> T:
        """Calls, waits for the arrays that come back, and notes how long both took."""
        began = time.perf_counter()
        found = call()
        mx.eval(found)
        self.note(name, time.perf_counter() - began)
        return found

    def note(self, name: str, seconds: float) -> None:
        """Notes seconds measured elsewhere."""
        self.seconds.setdefault(name, []).append(seconds)

    def medians(self, skipped: int) -> dict[str, float]:
        """The median of each name, without the first `skipped` batches."""
        return {name: statistics.median(seconds[skipped:]) for name, seconds in self.seconds.items()}


def run(spec: dict[str, Any]) -> None:
    """Measures every batch's step as a whole and by part, and writes the medians.

    What the frozen blocks give is known before the first step, so these are steps as they are from the second epoch on.
    """
    prepared = prepare(run_config(spec), ExitStack())
    optimizer = make_optimizer(prepared.config.optim)
    optimizer.init(prepared.loaded.model.trainable_parameters())
    step, state = Steps(prepared, optimizer), TrainerState(fingerprint={})
    size = spec["batch"]
    batches = [list(range(i, i + size)) for i in range(0, len(prepared.rows), size)]
    probe, clock = Probe(), Clock()
    probe.start()
    for row_indices in batches:
        metrics = step([row_indices], prepared.config.optim.learning_rate, state)
        probe.step(loss=metrics["loss"])
    operations: Counter[str] = Counter()
    for row_indices in batches:
        operations = _by_part(prepared, optimizer, row_indices, clock)
    whole = statistics.median(taken["wall"] for taken in probe.steps[spec["warmup"] :])
    parts = clock.medians(spec["warmup"])
    described = parts.pop("graph, described in Python")  # part of the others already
    write_result(
        probe,
        whole=whole,
        parts=parts | {"the rest of the step": whole - sum(parts.values())},
        described=described,
        operations=dict(operations.most_common()),
        peak_bytes=mx.get_peak_memory(),
    )


def _by_part(
    prepared: PreparedRun, optimizer: optimizers.Optimizer, row_indices: list[int], clock: Clock
) -> Counter[str]:
    """Notes the seconds of one batch's parts; the operations of its gradient, counted."""
    model, known = prepared.loaded.model, prepared.ref_logps
    assert known is not None
    model.train()
    began = time.perf_counter()
    batch = make_batch([prepared.rows[i] for i in row_indices], row_indices)
    ref_logps = batch_ref_logps(known, batch)
    clock.note("batch and reference, on the host", time.perf_counter() - began)
    forward, fetched = _forward(prepared, batch, clock)
    mask, rank = mx.array(batch.mask), mx.array(batch.rank)

    def objective(model: nn.Module) -> mx.array:
        policy = prepared.scorer.score(batch, gradient=True).logps
        return compute_loss(policy, ref_logps, mask, rank, None, prepared.config.loss).loss

    began = time.perf_counter()
    loss, gradient = nn.value_and_grad(model, objective)(model)
    clock.note("graph, described in Python", time.perf_counter() - began - fetched)
    graph = io.StringIO()
    mx.export_to_dot(graph, loss, *flat(gradient).values())
    operations = Counter(re.findall(r'label ="(\w+)", shape=rectangle', graph.getvalue()))
    began, ahead = time.perf_counter(), clock.seconds["graph, described in Python"][-1]
    mx.eval(loss, gradient)
    clock.note("backward", time.perf_counter() - began + ahead - (forward - fetched))

    def update() -> Any:
        clipped, norm = optimizers.clip_grad_norm(gradient, prepared.config.optim.max_grad_norm or math.inf)
        optimizer.update(model, clipped)
        return model.trainable_parameters(), optimizer.state, norm

    clock.time("optimizer", update)
    return operations


def _forward(prepared: PreparedRun, batch: Batch, clock: Clock) -> tuple[float, float]:
    """Notes the parts of the forward pass; its seconds together, and those in which the activation cache was read."""
    scorer = prepared.scorer
    passes: list[float] = []
    fetched: list[float] = []

    def listened(call: Callable[..., T], into: list[float]) -> Callable[..., T]:
        def timed(*args: Any, **kwargs: Any) -> T:
            began = time.perf_counter()
            found = call(*args, **kwargs)
            mx.eval(found)
            into.append(time.perf_counter() - began)
            return found

        return timed

    replaced = [(scorer.split, "hidden", passes), (scorer.activation_cache, "get", fetched)]
    for owner, name, into in replaced:
        if owner is not None:
            setattr(owner, name, listened(getattr(owner, name), into))
    try:
        began = time.perf_counter()
        mx.eval(scorer.score(batch, gradient=True).logps)
        whole = time.perf_counter() - began
    finally:
        for owner, name, _ in replaced:
            if owner is not None:
                delattr(owner, name)
    prompts = sum(len(scorer.steps(group)) for group in scorer.layout(batch).prompts)
    if prompts:
        clock.note("prompts, forward", sum(passes[:prompts]))
    clock.note("answers, forward" if prompts else "whole sequences, forward", sum(passes[prompts:]))
    if fetched:
        clock.note("activations, fetched", sum(fetched))
    clock.note("head, with its gradient", whole - sum(passes) - sum(fetched))
    return whole, sum(fetched)


if __name__ == "__main__":
    run(read_spec())
