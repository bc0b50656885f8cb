"""Graphs of functions: described with every shape, gradient and checkpointing included, and never computed."""

from __future__ import annotations

from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dpo.planning.graph import Graph, Unknown, as_checkpointed, trace, traceable_checkpoint
from mlx_dpo.planning.peak_memory import InFlight, peak_memory

AT_ONCE = InFlight(most=1, view=0, work=1)


def count(graph: Graph, name: str) -> int:
    return Counter(op.name for op in graph.ops)[name]


def test_a_graph_larger_than_any_memory_is_described() -> None:
    side = 1_000_000
    before = mx.get_active_memory()
    graph = trace(lambda a, b: [mx.exp(a @ b)], [mx.zeros((side, side)), mx.zeros((side, 3))])
    assert [op.name for op in graph.ops] == ["Matmul", "Exp"]
    assert [graph.arrays[array].shape for array in graph.inputs] == [(side, side), (side, 3)]
    assert graph.arrays[graph.results[0]] == ((side, 3), 4 * 3 * side)
    assert mx.get_active_memory() - before < 1e6


def test_a_gradient_is_part_of_the_graph() -> None:
    def function(weight: mx.array, x: mx.array) -> list[mx.array]:
        return [mx.grad(lambda weight: (x @ weight).sum())(weight)]

    graph = trace(function, [mx.zeros((5, 7)), mx.zeros((3, 5))])
    assert graph.arrays[graph.results[0]].shape == (5, 7)
    assert count(graph, "Matmul") == 1, "the value is not asked for; its gradient is one product"


def test_what_mlx_cannot_describe_is_refused() -> None:
    @mx.custom_function
    def function(x: mx.array) -> mx.array:
        return x * 2

    @function.vjp
    def pull_back(primal: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        return 2 * cotangent

    with pytest.raises(Unknown):
        trace(lambda x: [function(x)], [mx.zeros((2,))])


WIDTH, LAYERS = 16, 12


def layers(checkpoint_fn: object, weights: list[mx.array], x: mx.array) -> mx.array:
    for weight in weights:
        x = checkpoint_fn(lambda parameters, x: mx.tanh(mx.tanh(x @ parameters["w"]) * 2))({"w": weight}, x)  # type: ignore[operator]
    return x.sum()


def gradient(checkpoint_fn: object, weights: list[mx.array], x: mx.array) -> list[mx.array]:
    value, gradients = mx.value_and_grad(lambda weights: layers(checkpoint_fn, weights, x))(weights)
    return [*gradients, value]


def some_weights() -> list[mx.array]:
    return [mx.random.normal((WIDTH, WIDTH), key=mx.random.key(i)) * 0.2 for i in range(LAYERS)]


def test_the_stand_in_has_the_value_and_gradient_of_a_checkpoint() -> None:
    weights, x = some_weights(), mx.random.normal((8, WIDTH), key=mx.random.key(9))
    marks = iter([mx.array(1.0)] * LAYERS)
    for found, expected in zip(
        gradient(traceable_checkpoint(marks), weights, x), gradient(mx.checkpoint, weights, x), strict=True
    ):
        np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-5)


def checkpointed_graph(rows: int) -> tuple[Graph, Graph]:
    """With checkpointing and without."""
    weights, x = some_weights(), mx.zeros((rows, WIDTH))
    marks = [mx.array(1.0) for _ in range(LAYERS)]

    def marked(*given: mx.array) -> list[mx.array]:
        *parameters, x = given[: LAYERS + 1]
        return gradient(traceable_checkpoint(iter(given[LAYERS + 1 :])), parameters, x)

    graph = trace(marked, [*weights, x, *marks])
    plain = trace(lambda *given: gradient(lambda function: function, list(given[:-1]), given[-1]), [*weights, x])
    return as_checkpointed(graph, graph.inputs[LAYERS + 1 :]), plain


def test_with_checkpointing_each_layer_is_computed_twice() -> None:
    checkpointed, plain = checkpointed_graph(8)
    assert count(plain, "Matmul") == 3 * LAYERS - 1, "forward, and two in the backward pass, but none by x"
    assert count(checkpointed, "Matmul") == count(plain, "Matmul") + LAYERS
    assert count(checkpointed, "Tanh") == 2 * count(plain, "Tanh")


def test_with_checkpointing_less_is_remembered() -> None:
    """What MLX itself takes when it waits for each result: 27 arrays of a layer's size with, 37 without."""
    rows = 1000
    checkpointed, plain = (peak_memory(graph, AT_ONCE) / (rows * WIDTH * 4) for graph in checkpointed_graph(rows))
    assert checkpointed == pytest.approx(27, abs=2)
    assert plain == pytest.approx(37, abs=2)


def test_dropout_and_quantized_layers_are_described() -> None:
    layer = nn.QuantizedLinear.from_linear(nn.Linear(64, 32, bias=False), group_size=32, bits=4)
    dropout = nn.Dropout(0.5)
    graph = trace(lambda x: [dropout(layer(x))], [mx.zeros((3, 64))])
    assert count(graph, "QuantizedMatmul") == 1
    assert graph.arrays[graph.results[0]].shape == (3, 32)
