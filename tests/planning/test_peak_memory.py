"""The memory that evaluating a graph takes: by hand for small graphs, and against what MLX says it took."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import pytest

from mlx_dpo.planning.graph import trace
from mlx_dpo.planning.peak_memory import IN_FLIGHT, InFlight, evaluation_order, peak_memory

AT_ONCE = InFlight(most=1, view=0, work=1)
"""Each operation is done before the next one is dispatched."""

SIDE = 512
ONE = 4 * SIDE * SIDE
"""Bytes of a square of float32."""


def square(count: int = 1) -> list[mx.array]:
    return [mx.zeros((SIDE, SIDE)) for _ in range(count)]


def peak(function: Callable[..., Sequence[mx.array]], inputs: int = 1, in_flight: InFlight = AT_ONCE) -> float:
    """In squares."""
    return peak_memory(trace(function, square(inputs)), in_flight) / ONE


def test_an_operation_writes_over_an_input_that_nobody_else_wants() -> None:
    assert peak(lambda x: [mx.sin(mx.exp(x * 2))]) == 1


def test_an_input_is_not_written_over() -> None:
    assert peak(lambda x: [mx.exp(x)]) == 1, "the result, beside the input"


def test_what_two_operations_read_lives_until_the_second_has_read_it() -> None:
    # e = exp(x); sin(e) must not write over e, which cos reads; their sum goes into one of them
    def function(x: mx.array) -> list[mx.array]:
        e = mx.exp(x)
        return [mx.sin(e) + mx.cos(e)]

    assert peak(function) == 2


def test_a_product_needs_room_beside_its_factors() -> None:
    # x @ w, then that times w: two squares at once; then the third one takes the place of the first
    assert peak(lambda x, w: [((x @ w) @ w) @ w], 2) == 2


def test_a_view_takes_no_room_and_a_copy_of_it_does() -> None:
    assert peak(lambda x: [x.T[None].squeeze(0)]) == 0
    assert peak(lambda x: [x.reshape(-1)]) == 0, "it lies in one piece"
    assert peak(lambda x: [x.T.reshape(-1)]) == 1
    assert peak(lambda x: [x[:, : SIDE // 2].reshape(-1)]) == 0.5


def test_a_view_keeps_the_whole_alive() -> None:
    # exp(x) is needed for its upper half until the end
    assert peak(lambda x, w: [mx.exp(x)[: SIDE // 2] @ (w @ w)], 2) == 2.5


def test_what_is_not_asked_for_is_not_counted() -> None:
    def function(x: mx.array) -> list[mx.array]:
        mx.exp(x) @ x
        return [x + 1]

    assert peak(function) == 1


@pytest.mark.parametrize(("dispatches", "squares"), [(1, 2), (2, 3), (3, 4), (100, 6)])
def test_what_is_under_way_is_allocated(dispatches: int, squares: int) -> None:
    """Of six products in a row k are under way: their outputs are there, and the input of the first."""

    def function(x: mx.array) -> list[mx.array]:
        y = x
        for _ in range(6):
            y = y @ x
        return [y]

    assert peak(function, in_flight=InFlight(dispatches, 0, 1)) == squares


def test_the_order_computes_what_is_needed_once_and_after_what_it_reads() -> None:
    def function(x: mx.array) -> list[mx.array]:
        branches = [mx.exp(x * i) @ x for i in range(50)]
        return [sum(branches, x), branches[0].sum()]

    graph = trace(function, square())
    order = evaluation_order(graph)
    assert len(order) == len(set(order)) == len(graph.ops)
    done = set(graph.inputs)
    for place in order:
        op = graph.ops[place]
        constants = {array for array in op.inputs if not any(array in other.outputs for other in graph.ops)}
        assert set(op.inputs) <= done | constants
        done |= set(op.outputs)


def measured(function: Callable[..., Sequence[mx.array]], inputs: list[mx.array]) -> int:
    """What MLX says evaluating took, beyond what was there, when it waits as early as it can."""
    before = mx.set_memory_limit(0)
    try:
        mx.eval(inputs)
        mx.reset_peak_memory()
        base = mx.get_active_memory()
        mx.eval(function(*inputs))
        return mx.get_peak_memory() - base
    finally:
        mx.set_memory_limit(before)


def network(x: mx.array, *weights: mx.array) -> list[mx.array]:
    """The gradient of layers with everything that attention and a gated layer have."""

    def loss(weights: tuple[mx.array, ...]) -> mx.array:
        y = x
        for weight in weights:
            scores = mx.softmax((y @ weight) @ y.T, axis=-1)
            y = y + mx.sigmoid(y @ weight) * (scores @ y)
            y = mx.concatenate([y[: SIDE // 2] * 2, mx.tanh(y[SIDE // 2 :])])
        return mx.logsumexp(y.reshape(2, -1).T).sum()

    return list(mx.grad(loss)(weights))


def test_it_is_what_mlx_takes() -> None:
    inputs = [mx.random.normal((SIDE, SIDE), key=mx.random.key(i)) * 0.05 for i in range(7)]
    graph = trace(network, inputs)
    expected = peak_memory(graph, IN_FLIGHT["cpu"])
    assert measured(network, inputs) == pytest.approx(expected, abs=2.1 * ONE)
