"""The heaviest moments of a run as graphs, described by the run's own code on the run's own rows.

So every architecture, adapter, loss and optimization is in them as it is. Nothing is computed and no weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_unflatten

from mlx_dpo.config import RunConfig, SpeedConfig
from mlx_dpo.data.batching import Batch, length, make_batch, order_batches
from mlx_dpo.data.tokenize import TokenizedRow
from mlx_dpo.logprobs.activation_cache import ActivationCache, cached_tokens
from mlx_dpo.logprobs.buckets import Bucket
from mlx_dpo.logprobs.check import fallbacks, two_short
from mlx_dpo.logprobs.scorer import UNCHECKED, Scorer, plain_logps, wanted_stats
from mlx_dpo.losses import compute_loss, needs_reference
from mlx_dpo.models.trees import flat
from mlx_dpo.planning.batch_shape import Widths, attention_widths, batch_shape
from mlx_dpo.planning.graph import Graph, as_checkpointed, trace, traceable_checkpoint
from mlx_dpo.training.optim import make_optimizer
from mlx_dpo.types import Kind

EPOCHS = 8
"""Epochs whose batches are looked at; later ones are cut from the same rows."""


@dataclass(frozen=True)
class RunSpec:
    """A run of which nothing is computed: its model, adapter attached, as lazy arrays, and its rows as tokens.

    `rows` are `train_rows` to train on and behind them those held out.
    """

    config: RunConfig
    model: nn.Module
    rows: list[TokenizedRow]
    train_rows: int
    kind: Kind


class Phase(NamedTuple):
    """A moment of a run: `held` bytes that are there all the time, the graph that is evaluated beside them, and those
    of its inputs that are given up meanwhile, which `held` does not count; nor does it count the weights `unloaded`.
    """

    held: int
    graph: Graph
    given_up: Sequence[int] = ()
    unloaded: int = 0


class Kept(NamedTuple):
    """What is to be kept of the frozen blocks' output, bytes, and where: memory, disk, or nowhere.

    `unloaded` bytes of weights are then given back, if all rows have their part in it.
    """

    nbytes: int
    where: str
    unloaded: int = 0

    @property
    def is_kept(self) -> bool:
        """Whether there is any, and room for it."""
        return self.where != "nowhere"


@dataclass(frozen=True)
class Description:
    """A run as graphs.

    `batches` are its micro-batches, `largest` the one of most tokens, `longest` the indices of the rows that take
    longest to score, `speed` the optimizations that the model's code takes, `vocabulary` the width of the logits,
    `widths` those of attention.
    """

    phases: dict[str, Phase]
    batches: list[list[int]]
    largest: Batch
    longest: list[int]
    speed: SpeedConfig
    activation_cache: Kept
    vocabulary: int
    widths: Widths


class Held(NamedTuple):
    """What lies in memory from the first step on, bytes."""

    weights: int
    adapter: int
    optimizer: int


def held_bytes(spec: RunSpec) -> Held:
    """What a run holds all the time."""
    optimizer = make_optimizer(spec.config.optim)
    optimizer.init(spec.model.trainable_parameters())
    adapter = nbytes(spec.model.trainable_parameters())
    return Held(nbytes(spec.model.parameters()) - adapter, adapter, nbytes(optimizer.state))


def describe(spec: RunSpec) -> Description:
    """The heaviest moments of a run.

    Raises:
        ValueError, RuntimeError: MLX cannot describe what the model does.
    """
    config, model, rows = spec.config, spec.model, spec.rows
    weights, adapter, state = held_bytes(spec)
    held = weights + adapter + state
    batches = visited_batches(config, rows[: spec.train_rows])
    heaviest = [make_batch([rows[i] for i in row_indices], row_indices) for row_indices in _heaviest(rows, batches)]
    row_indices = sorted({i for batch in batches for i in batch} | set(range(spec.train_rows, len(rows))))
    longest = sorted(row_indices, key=lambda i: (len(rows[i].completions), length(rows[i])))[-config.train.batch_size :]

    def step(speed: SpeedConfig, activation_cache: Kept, batch: Batch) -> Phase:
        states = _states(model, speed, batch) if activation_cache.is_kept else []
        sums = adapter if config.train.grad_accumulation_steps > 1 else 0  # of the micro-batches before
        graph = _gradient(spec, speed, batch, states)
        return Phase(
            held + sums + nbytes(states) - activation_cache.unloaded, graph, unloaded=activation_cache.unloaded
        )

    tries = fallbacks(config.speed)
    for speed in tries:
        activation_cache = _kept(model, speed, [rows[i] for i in row_indices])
        try:
            phases = {"a step": step(speed, activation_cache, heaviest[0])}
            break
        except Exception:  # of any kind, as in speed.py: the model's code does not take this optimization
            if speed is tries[-1]:
                raise
    for batch in heaviest[1:]:
        phases["a step with more attention"] = step(speed, activation_cache, batch)
    unloaded = activation_cache.unloaded
    phases["the update"] = _update(spec, weights - unloaded)._replace(unloaded=unloaded)
    scored = make_batch([rows[i] for i in longest], longest)
    if activation_cache.is_kept:
        graph = _frozen_pass(model, speed, scored)
        phases["frozen blocks"] = Phase(weights + adapter, graph)
    states = _states(model, speed, scored) if activation_cache.is_kept else []
    graph = _scoring(model, speed, scored, states)
    phases["log-probs"] = Phase(held + nbytes(states) - unloaded, graph, unloaded=unloaded)
    if config.loss.reference not in ("base", "start", "none"):  # another model, as large as this one, say
        graph = _scoring(model, UNCHECKED, scored, [])
        phases["the reference"] = Phase(held + weights - unloaded, graph, unloaded=unloaded)
    phases["check of the optimizations"] = Phase(
        weights + adapter, _plain_gradient(model, make_batch(two_short(rows), [0, 1]))
    )
    vocabulary = model(mx.zeros((1, 1), mx.int32)).shape[-1]
    widths = attention_widths(Scorer(model, speed), [*heaviest, scored])
    return Description(phases, batches, heaviest[0], longest, speed, activation_cache, vocabulary, widths)


def visited_batches(config: RunConfig, rows: Sequence[TokenizedRow]) -> list[list[int]]:
    """The micro-batches that a run comes to, as far as its first epochs have them."""
    train = config.train
    found: list[list[int]] = []
    for epoch in range(EPOCHS):
        cut = order_batches(rows, train.batch_size, seed=train.seed, epoch=epoch, shuffle=train.shuffle)
        wanted = train.iters * train.grad_accumulation_steps if train.iters else ceil(train.epochs * len(cut))
        found += cut[: wanted - len(found)]
        if len(found) >= wanted:
            break
    return found


def _heaviest(rows: Sequence[TokenizedRow], batches: Sequence[list[int]]) -> list[list[int]]:
    """The micro-batch of most tokens and, where it is another one, that of most attention."""
    sizes = [batch_shape([rows[i] for i in batch]) for batch in batches]
    first = max(range(len(batches)), key=lambda i: sizes[i].tokens)
    second = max(range(len(batches)), key=lambda i: sizes[i].scores)
    return [batches[i] for i in dict.fromkeys((first, second))]


def nbytes(tree: Any) -> int:
    """The bytes of the arrays in a tree."""
    return sum(value.nbytes for value in flat(tree).values())


class _OfOneBatch(ActivationCache):
    """A store that has `states` for whoever asks or, without them, wants what anybody has."""

    def __init__(self, states: list[mx.array]) -> None:
        super().__init__([], 0, 0)
        self._given = states

    def knows(self, batch: Batch) -> bool:
        return bool(self._given)

    def wants(self, batch: Batch) -> bool:
        return not self._given

    def get(self, batch: Batch, buckets: Sequence[Bucket]) -> list[mx.array]:
        return self._given


@contextmanager
def _undone(model: nn.Module) -> Iterator[None]:
    """Puts the model's arrays and its mode back."""
    parameters, training = model.parameters(), model.training
    try:
        yield
    finally:
        model.update(parameters)
        model.train(training)


def _trace_model(
    model: nn.Module, function: Callable[..., list[mx.array]], beside: Sequence[mx.array] = ()
) -> tuple[Graph, list[int]]:
    """The graph of `function(*beside)` as a function of the model's arrays too, and the numbers of `beside` in it."""
    names, values = zip(*flat(model.parameters()).items(), strict=True)

    def with_model(*given: mx.array) -> list[mx.array]:
        model.update(tree_unflatten(list(zip(names, given[: len(names)], strict=True))))
        return function(*given[len(names) :])

    with _undone(model):
        graph = trace(with_model, [*values, *beside])
    return graph, graph.inputs[len(names) :]


def _gradient(spec: RunSpec, speed: SpeedConfig, batch: Batch, states: list[mx.array]) -> Graph:
    """A micro-batch's gradient as training takes it, from the cached `states` where there are any."""
    config, model = spec.config, spec.model
    checkpoint = config.train.grad_checkpoint
    scorer = Scorer(model, speed)
    passes = sum(len(scorer.steps(bucket)) for bucket in scorer.layout(batch).buckets)
    marks = [mx.array(1.0) for _ in range(2 * passes * len(model.layers))] if checkpoint else []  # two for each call

    def step(*given: mx.array) -> list[mx.array]:
        activation_cache = _OfOneBatch(list(given[: len(states)])) if states else None
        checkpoint_fn = traceable_checkpoint(iter(given[len(states) :]))
        scorer = Scorer(
            model, speed, checkpoint=checkpoint, activation_cache=activation_cache, checkpoint_fn=checkpoint_fn
        )
        model.train()

        def objective(model: nn.Module) -> mx.array:
            policy = scorer(batch, wanted_stats(config), gradient=True)
            base = mx.zeros(batch.mask.shape) if needs_reference(config.loss) else None
            label = mx.array(batch.label).astype(mx.float32) if spec.kind == "unpaired" else None
            return compute_loss(policy, base, mx.array(batch.mask), mx.array(batch.rank), label, config.loss).loss

        loss, gradients = nn.value_and_grad(model, objective)(model)
        return [*flat(gradients).values(), loss]

    graph, numbers = _trace_model(model, step, [*states, *marks])
    return as_checkpointed(graph, numbers[len(states) :]) if checkpoint else graph


def _kept(model: nn.Module, speed: SpeedConfig, rows: Sequence[TokenizedRow]) -> Kept:
    scorer = Scorer(model, speed)
    if not speed.activation_cache or scorer.split is None or scorer.first_adapted == 0:
        return Kept(0, "nowhere")
    sample = scorer.split.hidden(mx.zeros((1, 1), mx.int32))
    size = sum(cached_tokens(row) for row in rows) * sample.nbytes
    room = {"memory": speed.activation_cache_memory_gb * 1e9, "disk": speed.activation_cache_disk_gb * 1e9}
    where = next((where for where, most in room.items() if size <= most), "nowhere")
    rest = where != "nowhere" and all(row.shares_prompt for row in rows)
    return Kept(size, where, sum(nbytes(block.parameters()) for block in model.layers[: scorer.first_adapted] if rest))


def _states(model: nn.Module, speed: SpeedConfig, batch: Batch) -> list[mx.array]:
    """Arrays of the shape in which a batch's states come from the activation cache; none without it."""
    scorer = Scorer(model, speed)
    if not batch.shares_prompt or scorer.split is None:
        return []
    sample = scorer.split.hidden(mx.zeros((1, 1), mx.int32))
    shapes = [bucket.tokens.shape for bucket in scorer.layout(batch).buckets]
    return [mx.zeros((*shape, sample.shape[-1]), sample.dtype) for shape in shapes]


def _scoring(model: nn.Module, speed: SpeedConfig, batch: Batch, states: list[mx.array]) -> Graph:
    """Log-probs without a gradient, from the cached `states` where there are any."""

    def score(*given: mx.array) -> list[mx.array]:
        scorer = Scorer(model, speed, activation_cache=_OfOneBatch(list(given)) if given else None)
        return [scorer(batch, gradient=False).logps]

    return _trace_model(model, score, states)[0]


def _frozen_pass(model: nn.Module, speed: SpeedConfig, batch: Batch) -> Graph:
    """What the frozen blocks give for a batch."""
    scorer = Scorer(model, speed, activation_cache=_OfOneBatch([]))
    return _trace_model(model, lambda: scorer.score(batch, gradient=False).states or [])[0]


def _plain_gradient(model: nn.Module, batch: Batch) -> Graph:
    """The plain path's gradient, which the speed optimizations are held against."""

    def step() -> list[mx.array]:
        _, gradients = nn.value_and_grad(model, lambda model: plain_logps(model, batch).logps.sum())(model)
        return list(flat(gradients).values())

    return _trace_model(model, step)[0]


def _update(spec: RunSpec, weights: int) -> Phase:
    """The optimizer's update: adapter and state are replaced, gradients held."""
    model, optimizer = spec.model, make_optimizer(spec.config.optim)
    optimizer.init(model.trainable_parameters())
    parameters, state = flat(model.trainable_parameters()), flat(optimizer.state)
    names = [*parameters, *state]

    def update(*given: mx.array) -> list[mx.array]:
        gradients = tree_unflatten(list(zip(parameters, given[len(names) :], strict=True)))
        model.update(tree_unflatten(list(zip(parameters, given, strict=False))))
        optimizer.state = tree_unflatten(list(zip(state, given[len(parameters) : len(names)], strict=True)))
        optimizer.update(model, optimizers.clip_grad_norm(gradients, 1.0)[0])
        return [*flat(model.trainable_parameters()).values(), *flat(optimizer.state).values()]

    with _undone(model):
        graph = trace(update, [*parameters.values(), *state.values(), *parameters.values()])
    return Phase(weights + nbytes(parameters), graph, graph.inputs[: len(names)])
