"""What MLX would compute, described instead of computed: operations, and the shapes of what goes between them.

MLX is lazy: a training step is a graph of arrays of known shape before anything is evaluated. `mx.export_function`
hands that graph to a callback, gradient and all, so whatever a model, an adapter, a loss or an optimization does is
in it, and no formula has to follow them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_map

from mlx_dpo.logprobs.layers import CheckpointFn

Unknown = (ValueError, RuntimeError)
"""What `trace` raises of a function that MLX cannot describe: an operation without a description, an evaluation."""


class Array(NamedTuple):
    """What is known of an array that does not exist yet."""

    shape: tuple[int, ...]
    nbytes: int


class Op(NamedTuple):
    """An operation of MLX by its name; `inputs` and `outputs` are numbers of arrays."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    arguments: tuple[Any, ...]


class Graph(NamedTuple):
    """Operations in an order in which they can be computed, from `inputs` to `results`, both numbers in `arrays`."""

    ops: list[Op]
    arrays: list[Array]
    inputs: list[int]
    results: list[int]


def trace(function: Callable[..., Sequence[mx.array]], arrays: Sequence[mx.array]) -> Graph:
    """The graph of `function(*arrays)`; only the shapes of `arrays` matter, and nothing is evaluated.

    Raises:
        ValueError, RuntimeError: MLX cannot describe what the function does.
    """
    records: list[dict[str, Any]] = []
    with _copies_that_can_be_described():
        mx.export_function(records.append, function, *arrays)
    by_type = {record["type"]: record for record in records}
    numbers: dict[str, int] = {}
    described: list[Array] = []

    def number(of: tuple[str, tuple[int, ...], mx.Dtype]) -> int:
        name, shape, dtype = of
        if name not in numbers:
            numbers[name] = len(described)
            described.append(Array(tuple(shape), dtype.size * prod(shape)))
        return numbers[name]

    inputs = [number(found) for found in by_type["inputs"]["inputs"]]
    ops = [
        Op(
            record["name"],
            tuple(number(found) for found in record["inputs"]),
            tuple(number(found) for found in record["outputs"]),
            tuple(record["arguments"]),
        )
        for record in records
        if record["type"] == "primitive"
    ]
    results = [number(found) for found in by_type["outputs"]["outputs"]]
    return Graph(ops, described, inputs, results)


@contextmanager
def _copies_that_can_be_described() -> Iterator[None]:
    """MLX cannot describe `mx.contiguous`, with which mlx-lm copies states; a product by 1 is as large."""
    usual = mx.contiguous
    mx.contiguous = lambda array, *args, **kwargs: array * 1
    try:
        yield
    finally:
        mx.contiguous = usual


def traceable_checkpoint(marks: Iterator[mx.array]) -> CheckpointFn:
    """A stand-in for `mx.checkpoint` in functions to be traced: MLX cannot describe a function with its own gradient.

    The function stands in the graph twice, once for its value and once for its gradient, with what is needed to tell
    them apart: each call takes one of `marks`, scalars that the traced function has as inputs. Only after
    `as_checkpointed` is the graph the one that `mx.checkpoint` gives.
    """

    def checkpoint_fn(function: Callable[..., Any]) -> Callable[..., Any]:
        def twice(parameters: Any, *arrays: mx.array) -> Any:
            mark = next(marks)
            # cut off from the gradient, so that nothing inside has to be remembered for the backward pass
            value = function(tree_map(mx.stop_gradient, parameters), *map(mx.stop_gradient, arrays))
            again = function(parameters, *mx.depends(list(arrays), [mark]))
            values, agains = ([value], [again]) if isinstance(value, mx.array) else (list(value), list(again))
            # the gradient of this product is one too: it shows where the backward pass comes to this call
            marked = [array * mark.astype(array.dtype) for array in agains]
            out = mx.depends(marked, [*values, mark])
            return out[0] if isinstance(value, mx.array) else tuple(out)

        return twice

    return checkpoint_fn


def as_checkpointed(graph: Graph, marks: Collection[int]) -> Graph:
    """The graph that `mx.checkpoint` would have given, from one with `traceable_checkpoint` and its marks' numbers.

    Whoever reads a function's value reads that of the first time, and the second time waits for the gradient by the
    value. Without the waiting, two blocks would have their activations in memory where a checkpoint has one.
    """
    mark_of = {mark: mark for mark in marks}  # and of a mark cast or broadcast
    products: dict[int, list[int]] = {mark: [] for mark in marks}  # results of the call, and gradients, times its mark
    results: set[int] = set()  # those of them that are results
    same: dict[int, int] = {}  # array: the one to read in its place
    for op in graph.ops:
        found = [mark_of[array] for array in op.inputs if array in mark_of]
        if not found:
            continue
        if op.name in ("AsType", "Broadcast"):
            mark_of[op.outputs[0]] = found[0]
        elif op.name == "Multiply":
            (same[op.outputs[0]],) = (array for array in op.inputs if array not in mark_of)
            products[found[0]].append(op.outputs[0])
        elif len(op.inputs) > len(op.outputs) + 1:  # Depends: the end of a call; one with the mark alone begins it
            results.update(op.inputs[: len(op.outputs)])
            same.update(zip(op.outputs, op.inputs[len(op.outputs) : -1], strict=True))

    def read(array: int) -> int:
        while array in same:
            array = same[array]
        return array

    ops = []
    for op in graph.ops:
        inputs = op.inputs
        if op.name == "Depends" and inputs[-1] in products:
            inputs = (*inputs[:-1], *(array for array in products[inputs[-1]] if array not in results))
        ops.append(op._replace(inputs=tuple(map(read, inputs))))
    return Graph(ops, graph.arrays, graph.inputs, list(map(read, graph.results)))
