"""The heaviest moments of a run as graphs, described by the run's own code on the run's own rows.

So every architecture, adapter, loss and speed lever is in them as it is. Nothing is computed and no weight is read.
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
from mlx_dpo.logprobs.activation_cache import TrunkStore, row_tokens
from mlx_dpo.logprobs.buckets import Group
from mlx_dpo.logprobs.check import fallbacks, two_short
from mlx_dpo.logprobs.scorer import OTHER_MODEL, Scorer, plain_logps, wanted_stats
from mlx_dpo.losses import compute_loss, needs_reference
from mlx_dpo.models.trees import flat
from mlx_dpo.planning.batch_shape import Widths, attention_widths, extent
from mlx_dpo.planning.graph import Graph, as_checkpointed, marked_twice, trace
from mlx_dpo.training.optim import make_optimizer
from mlx_dpo.types import Kind

EPOCHS = 8
"""Epochs whose batches are looked at; later ones are cut from the same rows."""


@dataclass(frozen=True)
class Draft:
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
    of its inputs that are given up meanwhile, which `held` does not count; nor does it count the weights `at_rest`.
    """

    held: int
    graph: Graph
    given_up: Sequence[int] = ()
    at_rest: int = 0


class Kept(NamedTuple):
    """What is to be kept of the frozen blocks' output, bytes, and where: memory, disk, or nowhere.

    `at_rest` bytes of weights are then given back, if all rows have their part in it.
    """

    nbytes: int
    where: str
    at_rest: int = 0

    @property
    def is_kept(self) -> bool:
        """Whether there is any, and room for it."""
        return self.where != "nowhere"


@dataclass(frozen=True)
class Description:
    """A run as graphs.

    `batches` are its micro-batches, `largest` the one of most tokens, `longest` the places of the rows that are longest
    to score, `speed` the levers that the model's code takes, `vocabulary` the width of the logits, `widths` those of
    attention.
    """

    phases: dict[str, Phase]
    batches: list[list[int]]
    largest: Batch
    longest: list[int]
    speed: SpeedConfig
    trunk: Kept
    vocabulary: int
    widths: Widths


class Held(NamedTuple):
    """What lies in memory from the first step on, bytes."""

    weights: int
    adapter: int
    optimizer: int


def held_bytes(draft: Draft) -> Held:
    """What a run holds all the time."""
    optimizer = make_optimizer(draft.config.optim)
    optimizer.init(draft.model.trainable_parameters())
    adapter = nbytes(draft.model.trainable_parameters())
    return Held(nbytes(draft.model.parameters()) - adapter, adapter, nbytes(optimizer.state))


def describe(draft: Draft) -> Description:
    """The heaviest moments of a run.

    Raises:
        ValueError, RuntimeError: MLX cannot describe what the model does.
    """
    config, model, rows = draft.config, draft.model, draft.rows
    weights, adapter, state = held_bytes(draft)
    held = weights + adapter + state
    batches = visited_batches(config, rows[: draft.train_rows])
    heaviest = [make_batch([rows[i] for i in places], places) for places in _heaviest(rows, batches)]
    places = sorted({i for batch in batches for i in batch} | set(range(draft.train_rows, len(rows))))
    longest = sorted(places, key=lambda i: (len(rows[i].completions), length(rows[i])))[-config.train.batch_size :]

    def step(speed: SpeedConfig, trunk: Kept, batch: Batch) -> Phase:
        states = _states(model, speed, batch) if trunk.is_kept else []
        sums = adapter if config.train.grad_accumulation_steps > 1 else 0  # of the micro-batches before
        graph = _gradient(draft, speed, batch, states)
        return Phase(held + sums + nbytes(states) - trunk.at_rest, graph, at_rest=trunk.at_rest)

    tries = fallbacks(config.speed)
    for speed in tries:
        trunk = _kept(model, speed, [rows[i] for i in places])
        try:
            phases = {"a step": step(speed, trunk, heaviest[0])}
            break
        except Exception:  # of any kind, as in speed.py: the model's code does not take this lever
            if speed is tries[-1]:
                raise
    for batch in heaviest[1:]:
        phases["a step with more attention"] = step(speed, trunk, batch)
    at_rest = trunk.at_rest
    phases["the update"] = _update(draft, weights - at_rest)._replace(at_rest=at_rest)
    scored = make_batch([rows[i] for i in longest], longest)
    if trunk.is_kept:
        graph = _trunk_pass(model, speed, scored)
        phases["frozen blocks"] = Phase(weights + adapter, graph)
    states = _states(model, speed, scored) if trunk.is_kept else []
    graph = _scoring(model, speed, scored, states)
    phases["log-probs"] = Phase(held + nbytes(states) - at_rest, graph, at_rest=at_rest)
    if config.loss.reference not in ("base", "start", "none"):  # another model, as large as this one, say
        graph = _scoring(model, OTHER_MODEL, scored, [])
        phases["the reference"] = Phase(held + weights - at_rest, graph, at_rest=at_rest)
    phases["check of the levers"] = Phase(
        weights + adapter, _plain_gradient(model, make_batch(two_short(rows), [0, 1]))
    )
    vocabulary = model(mx.zeros((1, 1), mx.int32)).shape[-1]
    widths = attention_widths(Scorer(model, speed), [*heaviest, scored])
    return Description(phases, batches, heaviest[0], longest, speed, trunk, vocabulary, widths)


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
    sizes = [extent([rows[i] for i in batch]) for batch in batches]
    first = max(range(len(batches)), key=lambda i: sizes[i].tokens)
    second = max(range(len(batches)), key=lambda i: sizes[i].scores)
    return [batches[i] for i in dict.fromkeys((first, second))]


def nbytes(tree: Any) -> int:
    """The bytes of the arrays in a tree."""
    return sum(value.nbytes for value in flat(tree).values())


class _OfOneBatch(TrunkStore):
    """A store that has `states` for whoever asks or, without them, wants what anybody has."""

    def __init__(self, states: list[mx.array]) -> None:
        super().__init__([], 0, 0)
        self._given = states

    def knows(self, batch: Batch) -> bool:
        return bool(self._given)

    def wants(self, batch: Batch) -> bool:
        return not self._given

    def get(self, batch: Batch, groups: Sequence[Group]) -> list[mx.array]:
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


def _gradient(draft: Draft, speed: SpeedConfig, batch: Batch, states: list[mx.array]) -> Graph:
    """A micro-batch's gradient as training takes it, from the trunk's `states` where there are any."""
    config, model = draft.config, draft.model
    checkpoint = config.train.grad_checkpoint
    scorer = Scorer(model, speed)
    passes = sum(len(scorer.steps(group)) for group in scorer.layout(batch).groups)
    marks = [mx.array(1.0) for _ in range(2 * passes * len(model.layers))] if checkpoint else []  # two for each call

    def step(*given: mx.array) -> list[mx.array]:
        trunk = _OfOneBatch(list(given[: len(states)])) if states else None
        twice = marked_twice(iter(given[len(states) :]))
        scorer = Scorer(model, speed, checkpoint=checkpoint, trunk=trunk, twice=twice)
        model.train()

        def objective(model: nn.Module) -> mx.array:
            policy = scorer(batch, wanted_stats(config), gradient=True)
            base = mx.zeros(batch.mask.shape) if needs_reference(config.loss) else None
            label = mx.array(batch.label).astype(mx.float32) if draft.kind == "unpaired" else None
            return compute_loss(policy, base, mx.array(batch.mask), mx.array(batch.rank), label, config.loss).loss

        loss, gradients = nn.value_and_grad(model, objective)(model)
        return [*flat(gradients).values(), loss]

    graph, numbers = _trace_model(model, step, [*states, *marks])
    return as_checkpointed(graph, numbers[len(states) :]) if checkpoint else graph


def _kept(model: nn.Module, speed: SpeedConfig, rows: Sequence[TokenizedRow]) -> Kept:
    scorer = Scorer(model, speed)
    if not speed.trunk or scorer.parts is None or scorer.first_adapted == 0:
        return Kept(0, "nowhere")
    sample = scorer.parts.hidden(mx.zeros((1, 1), mx.int32))
    size = sum(row_tokens(row) for row in rows) * sample.nbytes
    room = {"memory": speed.trunk_memory_gb * 1e9, "disk": speed.trunk_disk_gb * 1e9}
    where = next((where for where, most in room.items() if size <= most), "nowhere")
    rest = where != "nowhere" and all(row.shares_prompt for row in rows)
    return Kept(size, where, sum(nbytes(block.parameters()) for block in model.layers[: scorer.first_adapted] if rest))


def _states(model: nn.Module, speed: SpeedConfig, batch: Batch) -> list[mx.array]:
    """Arrays of the shape in which a batch's states come from the trunk; none where its rows are not kept."""
    scorer = Scorer(model, speed)
    if not batch.shares_prompt or scorer.parts is None:
        return []
    sample = scorer.parts.hidden(mx.zeros((1, 1), mx.int32))
    shapes = [group.tokens.shape for group in scorer.layout(batch).groups]
    return [mx.zeros((*shape, sample.shape[-1]), sample.dtype) for shape in shapes]


def _scoring(model: nn.Module, speed: SpeedConfig, batch: Batch, states: list[mx.array]) -> Graph:
    """Log-probs without a gradient, from the trunk's `states` where there are any."""

    def score(*given: mx.array) -> list[mx.array]:
        scorer = Scorer(model, speed, trunk=_OfOneBatch(list(given)) if given else None)
        return [scorer(batch, gradient=False).logps]

    return _trace_model(model, score, states)[0]


def _trunk_pass(model: nn.Module, speed: SpeedConfig, batch: Batch) -> Graph:
    """What the frozen blocks give for a batch."""
    scorer = Scorer(model, speed, trunk=_OfOneBatch([]))
    return _trace_model(model, lambda: scorer.score(batch, gradient=False).states or [])[0]


def _plain_gradient(model: nn.Module, batch: Batch) -> Graph:
    """The plain path's gradient, which the speed levers are held against."""

    def step() -> list[mx.array]:
        _, gradients = nn.value_and_grad(model, lambda model: plain_logps(model, batch).logps.sum())(model)
        return list(flat(gradients).values())

    return _trace_model(model, step)[0]


def _update(draft: Draft, weights: int) -> Phase:
    """The optimizer's update: adapter and state are replaced, gradients held."""
    model, optimizer = draft.model, make_optimizer(draft.config.optim)
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
