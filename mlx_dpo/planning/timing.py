"""How long a run will take on this machine: its arithmetic, counted in its graphs, at speeds measured in a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import ceil, prod

import mlx.core as mx

from mlx_dpo.losses import needs_reference
from mlx_dpo.planning.batch_shape import Widths, batch_shape, part_of
from mlx_dpo.planning.graph import Graph, Op
from mlx_dpo.planning.peak_memory import RESHAPES, VIEWS
from mlx_dpo.planning.traced_run import Description, RunSpec

PRODUCTS = ("Matmul", "AddMM", "QuantizedMatmul", "GatherMM", "GatherQMM")
"""Operations that multiply matrices."""

_EXPONENTIALS = "Cos Erf Exp Expm1 Log Log1p LogAddExp LogSumExp Power Sigmoid Sin Softmax Tanh"

EXPONENTIALS = frozenset(_EXPONENTIALS.split())
"""Operations that take about as long as an exponential; all others are taken to be as fast as memory."""

PARTS = {"head": "head", "attention scores": "attention", "queries, keys, values": "attention", "activations": "layers"}
"""A product's part by what its arrays are for."""

WIDEST = 16384
"""Columns of a product that are timed, at most."""

Factors = tuple[tuple[int, ...], tuple[int, ...], int]
"""The shapes of a product's two factors, and the size of their numbers in bytes."""


@dataclass
class Work:
    """What a graph computes: `flops` in products by part, numbers through `exponentials`, bytes through all other
    operations, and the largest product of each part.
    """

    flops: dict[str, float] = field(default_factory=dict)
    exponentials: float = 0.0
    nbytes: float = 0.0
    products: dict[str, Factors] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """Seconds of a run by `phases`, and of its mean micro-batch by `parts`.

    `speeds` are what was measured, a second: operations in each part's products, `exponentials`, `memory` in bytes.
    """

    phases: dict[str, float]
    parts: dict[str, float]
    speeds: dict[str, float]


def count(graph: Graph, widths: Widths, vocabulary: int) -> Work:
    """The arithmetic of a graph."""
    work = Work()
    largest: dict[str, float] = {}
    spread = {op.outputs[0] for op in graph.ops if op.name == "Broadcast"}  # as large in memory as what they came from
    for op in graph.ops:
        arrays = [graph.arrays[array] for array in (*op.inputs, *op.outputs)]
        if op.name in PRODUCTS:
            used_for = {part_of(array.shape, widths, vocabulary) for array in arrays}
            part = next(PARTS[name] for name in PARTS if name in used_for)
            factors = _factors(graph, op)
            flops = 2.0 * prod(graph.arrays[op.outputs[0]].shape) * factors[0][-1]
            work.flops[part] = work.flops.get(part, 0.0) + flops
            if flops > largest.get(part, 0.0):
                largest[part], work.products[part] = flops, factors
        elif op.name in EXPONENTIALS:
            work.exponentials += prod(arrays[0].shape)
        elif op.name not in VIEWS and op.name not in RESHAPES:
            work.nbytes += sum(graph.arrays[i].nbytes for i in (*op.inputs, *op.outputs) if i not in spread)
    return work


def estimate(spec: RunSpec, found: Description) -> Timing:
    """The seconds that the run of `spec` will take here. It measures for about a second."""
    config, rows = spec.config, spec.rows
    largest = batch_shape([rows[i] for i in found.largest.index])
    work = count(found.phases["a step"].graph, found.widths, found.vocabulary)
    speeds = measure(work.products)
    sizes = [batch_shape([rows[i] for i in batch]) for batch in found.batches]
    scored = [sum(len(ids) for i in batch for ids in rows[i].completions) for batch in found.batches]
    share = {
        "layers": sum(size.tokens for size in sizes) / len(sizes) / largest.tokens,
        "attention": sum(size.scores for size in sizes) / len(sizes) / largest.scores,
        "head": sum(scored) / len(scored) / max(float(found.largest.mask.sum()), 1.0),
    }
    parts = {part: flops * share[part] / speeds[part] for part, flops in work.flops.items()}
    parts["exponentials"] = work.exponentials * share["layers"] / speeds["exponentials"]
    parts["memory"] = work.nbytes * share["layers"] / speeds["memory"]

    train = config.train
    micro = len(found.batches)
    if not train.iters:
        micro = max(micro, ceil(train.epochs * ceil(spec.train_rows / train.batch_size)))
    longest = [rows[i] for i in found.longest]
    seconds = {
        name: _a_token(phase.graph, found, speeds, batch_shape(longest).tokens)
        for name, phase in found.phases.items()
        if name in ("log-probs", "frozen blocks", "the reference")
    }
    scoring = seconds.pop("log-probs")
    if needs_reference(config.loss):
        seconds.setdefault("the reference", scoring)
    held_out = sum(batch_shape([row]).tokens for row in rows[spec.train_rows :])
    trained = sum(batch_shape([rows[i]]).tokens for i in {i for batch in found.batches for i in batch})
    steps = micro / train.grad_accumulation_steps
    evaluations = 1 + ceil(steps / train.steps_per_eval) if train.steps_per_eval else 2
    phases = {
        "reference and frozen blocks, once": sum(seconds.values()) * (trained + held_out),
        "training": sum(parts.values()) * micro,
        "evaluation": scoring * held_out * evaluations,
    }
    return Timing(phases, parts, speeds)


def _a_token(graph: Graph, found: Description, speeds: dict[str, float], tokens: int) -> float:
    """Seconds a token of a graph that reads so many."""
    work = count(graph, found.widths, found.vocabulary)
    seconds = sum(flops / speeds.get(part, speeds["layers"]) for part, flops in work.flops.items())
    seconds += work.exponentials / speeds["exponentials"] + work.nbytes / speeds["memory"]
    return seconds / tokens


def measure(products: dict[str, Factors]) -> dict[str, float]:
    """Operations a second of products of these shapes, of exponentials, and bytes a second of what is neither."""
    speeds = {}
    for part, (left, right, size) in products.items():
        dtype = mx.float32 if size == 4 else mx.bfloat16
        a = mx.random.normal(left, dtype, key=mx.random.key(0))
        b = mx.random.normal((*right[:-1], min(right[-1], WIDEST)), dtype, key=mx.random.key(1))
        mx.eval(a, b)
        speeds[part] = 2.0 * prod((a @ b).shape) * left[-1] / _fastest(partial(mx.matmul, a, b))
    x = mx.random.normal((4096, 1024), key=mx.random.key(2))
    mx.eval(x)
    speeds["exponentials"] = x.size / _fastest(lambda: mx.exp(x))
    speeds["memory"] = 4 * x.nbytes / (_fastest(lambda: x * x[::-1]) + _fastest(lambda: x.sum(-1)))
    return speeds


def _fastest(compute: Callable[[], mx.array]) -> float:
    """The shortest of four times, seconds; the first also pays for memory that is touched for the first time."""
    times = []
    for _ in range(4):
        began = time.perf_counter()
        mx.eval(compute())
        times.append(time.perf_counter() - began)
    return min(times)


def _factors(graph: Graph, op: Op) -> Factors:
    """A product's factors; those of a quantized or a gathered one as if it were a plain one."""
    left = graph.arrays[op.inputs[1 if op.name == "AddMM" else 0]]
    right = graph.arrays[op.inputs[2 if op.name == "AddMM" else 1]]
    size = left.nbytes // max(prod(left.shape), 1)
    if op.name in ("Matmul", "AddMM"):
        return left.shape, right.shape, size
    out = graph.arrays[op.outputs[0]].shape
    return (prod(out[:-1]), left.shape[-1]), (left.shape[-1], out[-1]), size
