"""What MLX would compute, described instead of computed: operations, and the shapes of what goes between them.

MLX is lazy: a training step is a graph of arrays of known shape before anything is evaluated. `mx.export_function`
hands that graph to a callback, gradient and all, so whatever a model, an adapter, a loss or an optimization does is
in it, and no formula has to follow them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    mx.export_function(records.append, function, *arrays)
    by_type = {record["type"]: record for record in records}
    numbers: dict[str, int] = {}
    described: list[Array] = []

    def number(of: tuple[str, tuple[int, ...], mx.Dtype]) -> int:
        name, shape, dtype = of
        if name not in numbers:
            numbers[name] = len(described)
            size = dtype.size
            for batch_shape in shape:
                size *= batch_shape
            described.append(Array(tuple(shape), size))
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
    return _each_its_own(Graph(ops, described, inputs, results))


def _each_its_own(graph: Graph) -> Graph:
    """Zeros and ranges made for each reader: the export merges equal ones, which an evaluation does not."""
    made = {op.outputs[0]: op for op in graph.ops if op.name in ("Full", "Arange")}
    arrays, ops, taken = list(graph.arrays), [], set(graph.results)
    for op in graph.ops:
        inputs = list(op.inputs)
        for place, array in enumerate(inputs):
            if array in made and array in taken:
                inputs[place] = len(arrays)
                arrays.append(arrays[array])
                ops.append(made[array]._replace(outputs=(inputs[place],)))
            taken.add(array)
        ops.append(op._replace(inputs=tuple(inputs)))
    return Graph(ops, arrays, graph.inputs, graph.results)


def traceable_checkpoint(marks: Iterator[mx.array]) -> CheckpointFn:
    """In place of `mx.checkpoint`, which MLX cannot describe: the function once for its value and, between two `marks`,
    once more for its gradient; `as_checkpointed` makes of such a graph the one that `mx.checkpoint` would have given.
    """

    def checkpoint_fn(function: Callable[..., Any]) -> Callable[..., Any]:
        def both(parameters: Any, *arrays: mx.array) -> Any:
            enter, leave = next(marks), next(marks)
            kept = function(tree_map(mx.stop_gradient, parameters), *map(mx.stop_gradient, arrays))
            again = function(parameters, *mx.depends(list(arrays), [enter]))
            if isinstance(kept, mx.array):
                return mx.depends([again * leave.astype(again.dtype)], [kept])[0]
            return tuple(mx.depends([array * leave.astype(array.dtype) for array in again], list(kept)))

        return both

    return checkpoint_fn


def as_checkpointed(graph: Graph, marks: Sequence[int]) -> Graph:
    """The graph of `traceable_checkpoint` with its `marks` (numbers of inputs: enter and leave in turns) made good.

    Whoever reads a function's value reads that of the first time; the second time begins only when the gradient by the
    value is there.
    """
    maker = {array: i for i, op in enumerate(graph.ops) for array in op.outputs}
    turn = {array: i for i, array in enumerate(marks)}

    def mark_of(array: int) -> int | None:
        """The mark that an array is a cast or a broadcast of."""
        while array not in turn and array in maker and graph.ops[maker[array]].name in ("AsType", "Broadcast"):
            array = graph.ops[maker[array]].inputs[0]
        return turn.get(array)

    leaving: dict[int, tuple[int, int]] = {}  # op: the mark it leaves by, and the array that it only marks
    for i, op in enumerate(graph.ops):
        if op.name == "Multiply":
            for array, other in (op.inputs, op.inputs[::-1]):
                if (mark := mark_of(array)) is not None:
                    leaving[i] = (mark, other)
    same = {graph.ops[i].outputs[0]: other for i, (_, other) in leaving.items()}
    forward: set[int] = set()
    for op in graph.ops:
        count = len(op.outputs)
        if op.name == "Depends" and maker.get(op.inputs[0]) in leaving:
            forward.update(maker[array] for array in op.inputs[:count])
            same.update(zip(op.outputs, op.inputs[count:], strict=True))
    gradients: dict[int, list[int]] = {}
    for i, (mark, other) in leaving.items():
        if i not in forward:
            gradients.setdefault(mark, []).append(other)

    def origin(array: int) -> int:
        while array in same:
            array = same[array]
        return array

    ops = []
    for op in graph.ops:
        inputs = op.inputs
        if op.name == "Depends" and inputs[-1] in turn:
            inputs = (*inputs[:-1], *gradients.get(turn[inputs[-1]] + 1, ()))
        ops.append(op._replace(inputs=tuple(map(origin, inputs))))
    return Graph(ops, graph.arrays, graph.inputs, [origin(array) for array in graph.results])
