"""The parts of a run that may need the most memory, each traced to a graph by the run's own code on its own rows.

So every architecture, adapter, loss and optimization is in the graphs as it is. Nothing is computed and no weight is
read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx.utils import tree_unflatten

from mlx_dpo.config import RunConfig, SpeedConfig
from mlx_dpo.data.batching import Batch, by_length, make_batch, visited_batches
from mlx_dpo.data.tokenize import TokenizedRow
from mlx_dpo.logprobs.activation_cache import ActivationCache, cached_tokens, first_adapted
from mlx_dpo.logprobs.buckets import Bucket
from mlx_dpo.logprobs.check import fallbacks, holds_16_bits, plain_score, two_short
from mlx_dpo.logprobs.precision import in_float32
from mlx_dpo.logprobs.scorer import UNCHECKED, Scorer, wanted_stats
from mlx_dpo.losses.mix import needs_reference
from mlx_dpo.losses.objective import batch_loss
from mlx_dpo.models.gated_delta import trainable_gated_delta
from mlx_dpo.models.trees import flat
from mlx_dpo.planning.batch_shape import BatchShape, batch_shape
from mlx_dpo.planning.graph import Graph, as_checkpointed, trace, traceable_checkpoint
from mlx_dpo.types import Kind

UPDATE = 1.3
"""The update's working memory beside a second optimizer state, in copies of the adapter: new values where the gradients
were, and a little. What the step began with stays until the step is finished. (0.2 to 1.3 measured;
tests/planning/test_traced_run.py holds it.)"""


@dataclass(frozen=True)
class RunSpec:
    """A run before anything of it is computed: the model with its adapter, as lazy arrays, and the tokenized rows.

    The first `train_rows` of `rows` are trained on, the others are for evaluation. `make_optimizer` makes the run's
    optimizer, of which planning wants to know how large its state is. `samples` are the rows whose prompts are answered
    at evaluations, with those prompts' own words.
    """

    config: RunConfig
    model: nn.Module
    rows: list[TokenizedRow]
    train_rows: int
    kind: Kind
    make_optimizer: Callable[[], Optimizer]
    samples: Mapping[int, str] = field(default_factory=dict)

    @cached_property
    def batches(self) -> list[list[int]]:
        """The micro-batches that the run comes to."""
        return visited_batches(self.rows[: self.train_rows], self.config.train)

    @property
    def visited(self) -> list[int]:
        """The indices of the rows that the run comes to: all of them, unless it ends within the first epoch."""
        trained = {i for batch in self.batches for i in batch}
        return [*sorted(trained), *range(self.train_rows, len(self.rows))]


class CachedActivations(NamedTuple):
    """The frozen blocks' output for all rows, in bytes, and `where` it goes: "memory", "disk" or "nowhere".

    If every row's is cached, the weights of the frozen blocks are not needed any more: `unloaded` bytes.
    """

    nbytes: int
    where: str
    unloaded: int = 0

    @property
    def used(self) -> bool:
        """Whether there are frozen blocks, and room for what they give."""
        return self.where != "nowhere"


class Phase(NamedTuple):
    """A part of a run, such as a training step, that may be the one with the highest memory.

    `parts` are the bytes that are in memory all through it, by what they are for. On top of those comes `working`
    memory: that of evaluating a graph, or bytes where a graph is not needed to tell.
    """

    parts: dict[str, int]
    working: Graph | int


class TracedRun(NamedTuple):
    """What a run does, as far as its memory goes: its phases by name, and its `largest` micro-batch (most tokens).

    `speed` are the optimizations that the model's code takes.
    """

    phases: dict[str, Phase]
    largest: BatchShape | None
    speed: SpeedConfig
    cached: CachedActivations


def persistent_memory(spec: RunSpec) -> dict[str, int]:
    """Bytes of weights, adapter and optimizer state, which lie in memory from the first step to the last."""
    optimizer = spec.make_optimizer()
    optimizer.init(spec.model.trainable_parameters())
    adapter = nbytes(spec.model.trainable_parameters())
    weights = nbytes(spec.model.parameters()) - adapter
    return {"weights": weights, "adapter": adapter, "optimizer": nbytes(optimizer.state)}


def update_memory(persistent: dict[str, int]) -> int:
    """The update's working memory in bytes, from what `persistent_memory` gives."""
    return int(UPDATE * persistent["adapter"]) + persistent["optimizer"]


def trace_run(spec: RunSpec) -> TracedRun:
    """The phases of a run that may need the most memory, each with the graph of what it computes.

    Raises:
        ValueError, RuntimeError: MLX cannot describe what the model does.
    """
    config, model, rows = spec.config, spec.model, spec.rows
    persistent = persistent_memory(spec)
    weights, adapter = persistent["weights"], persistent["adapter"]
    heaviest = [
        make_batch([rows[i] for i in row_indices], row_indices) for row_indices in _heaviest(rows, spec.batches)
    ]
    row_indices = spec.visited
    longest = by_length(rows, row_indices)[-config.train.batch_size :]
    scored = make_batch([rows[i] for i in longest], longest)

    def step(speed: SpeedConfig, cached: CachedActivations, batch: Batch) -> Phase:
        states = _states(model, speed, cached, batch)
        sums = adapter if config.train.grad_accumulation_steps > 1 else 0  # of the micro-batches before
        # those of the next micro-batch are fetched while this one is computed
        more = {"cached activations": 2 * nbytes(states), "gradients so far": sums}
        parts = persistent | {"weights": weights - cached.unloaded} | more
        return Phase(parts, _gradient(spec, speed, batch, states))

    # the same fallbacks as in logprobs/check.py: a model's code may not take every optimization
    *others, plain = fallbacks(config.speed)
    for speed in [*others, plain]:
        cached = _cached_activations(model, speed, [rows[i] for i in row_indices])
        try:
            steps = [step(speed, cached, batch) for batch in heaviest]
            break
        except Exception:  # of any kind, since it comes from the model's own code
            if speed is plain:
                raise
    phases = dict(zip(("a step", "a step with more attention"), steps, strict=False))
    parts = persistent | {"weights": weights - cached.unloaded}
    phases["the update"] = Phase(parts, update_memory(persistent))
    # with nothing cached: a little more than with it, and enough for the pass through the frozen blocks too
    scoring = _scoring(model, speed, scored)
    phases["log-probs"] = Phase(parts, scoring)
    if config.train.eval_samples:  # one prompt at a time, with the blocks that were unloaded read again
        longest_prompt = max(row_indices, key=lambda i: len(rows[i].prompt))
        asked = make_batch([rows[longest_prompt]], [longest_prompt])
        phases["sampled answers"] = Phase(persistent, _scoring(model, speed, asked))
    if config.loss.reference not in ("base", "start", "none"):  # another model, taken to be as large as this one
        plain_scoring = _scoring(model, UNCHECKED, scored)
        phases["the reference"] = Phase(parts | {"reference model": weights}, plain_scoring)
    early = {"weights": weights, "adapter": adapter}  # before the first step: no optimizer yet, and all weights
    if cached.used:
        phases["frozen blocks"] = Phase(early, scoring)
    two = make_batch(two_short(rows), [0, 1])
    phases["check of the optimizations"] = Phase(early, _plain_gradient(model, two))
    return TracedRun(phases, batch_shape([rows[i] for i in heaviest[0].index]), speed, cached)


def _heaviest(rows: Sequence[TokenizedRow], batches: Sequence[list[int]]) -> list[list[int]]:
    """The micro-batch of most tokens and, where it is another one, that of most attention."""
    sizes = [batch_shape([rows[i] for i in batch]) for batch in batches]
    first = max(range(len(batches)), key=lambda i: sizes[i].tokens)
    second = max(range(len(batches)), key=lambda i: sizes[i].scores)
    return [batches[i] for i in dict.fromkeys((first, second))]


def nbytes(tree: Any) -> int:
    """The bytes of the arrays in a tree."""
    return sum(value.nbytes for value in flat(tree).values())


class _OneBatchCache(ActivationCache):
    """An activation cache for tracing, which has the `given` states of whatever batch it is asked for."""

    def __init__(self, given: list[mx.array]) -> None:
        super().__init__([], 0, 0)
        self._given = given
        self.no_room = True  # it wants no others

    def knows(self, batch: Batch) -> bool:
        return True

    def get(self, batch: Batch, buckets: Sequence[Bucket]) -> list[mx.array]:
        return self._given


def _trace_model(
    model: nn.Module, function: Callable[..., list[mx.array]], beside: Sequence[mx.array] = ()
) -> tuple[Graph, list[int]]:
    """The graph of `function(*beside)`, and the numbers of `beside` in it.

    The model's arrays are made inputs of the graph too: as constants they would have to be read from disk. They and the
    model's mode are put back afterwards, since tracing leaves placeholders.
    """
    parameters, training = model.parameters(), model.training
    names, values = zip(*flat(parameters).items(), strict=True)

    def with_model(*given: mx.array) -> list[mx.array]:
        model.update(tree_unflatten(list(zip(names, given[: len(names)], strict=True))))
        return function(*given[len(names) :])

    try:
        # hybrids are read in chunks, as a run does it; MLX cannot describe the checkpoints in there, and a graph
        # without them holds more: the forecast for these models is an upper bound
        with trainable_gated_delta(model, checkpoint_fn=lambda function: function):
            graph = trace(with_model, [*values, *beside])
    finally:
        model.update(parameters)
        model.train(training)
    return graph, graph.inputs[len(names) :]


def _gradient(spec: RunSpec, speed: SpeedConfig, batch: Batch, states: list[mx.array]) -> Graph:
    """A micro-batch's gradient as training takes it, from the cached `states` where there are any.

    `train` is switched on inside the trace, since blocks are checkpointed, and some compute otherwise, only then.
    """
    config, model = spec.config, spec.model
    checkpoint = config.train.grad_checkpoint
    scorer = Scorer(model, speed)
    passes = sum(len(scorer.steps(bucket)) for bucket in scorer.layout(batch).buckets)
    marks = [mx.array(1.0) for _ in range(passes * len(model.layers))] if checkpoint else []  # one for each call

    def step(*given: mx.array) -> list[mx.array]:
        activation_cache = _OneBatchCache(list(given[: len(states)])) if states else None
        checkpoint_fn = traceable_checkpoint(iter(given[len(states) :]))
        scorer = Scorer(
            model, speed, checkpoint=checkpoint, activation_cache=activation_cache, checkpoint_fn=checkpoint_fn
        )
        model.train()

        def objective(model: nn.Module) -> mx.array:
            policy = scorer(batch, wanted_stats(config), gradient=True)
            ref_logps = mx.zeros(batch.mask.shape) if needs_reference(config.loss) else None
            return batch_loss(policy, ref_logps, batch, config.loss, spec.kind)[0]

        loss, gradients = nn.value_and_grad(model, objective)(model)
        return [*flat(gradients).values(), loss]

    graph, numbers = _trace_model(model, step, [*states, *marks])
    return as_checkpointed(graph, numbers[len(states) :]) if checkpoint else graph


def _cached_activations(model: nn.Module, speed: SpeedConfig, rows: Sequence[TokenizedRow]) -> CachedActivations:
    """How large the activation cache of `rows` is, and where there is room for it."""
    scorer = Scorer(model, speed)
    if not speed.activation_cache or scorer.split is None or scorer.first_adapted == 0:
        return CachedActivations(0, "nowhere")
    sample = scorer.split.hidden(mx.zeros((1, 1), mx.int32))
    size = sum(cached_tokens(row) for row in rows) * sample.nbytes
    room = {"memory": speed.activation_cache_memory_gb * 1e9, "disk": speed.activation_cache_disk_gb * 1e9}
    where = next((where for where, most in room.items() if size <= most), "nowhere")
    complete = where != "nowhere" and all(row.shares_prompt for row in rows)
    frozen = model.layers[: scorer.first_adapted] if complete else []
    return CachedActivations(size, where, sum(nbytes(block.parameters()) for block in frozen))


def _states(model: nn.Module, speed: SpeedConfig, cached: CachedActivations, batch: Batch) -> list[mx.array]:
    """Arrays of the shape in which a batch's states come from the activation cache; none without it."""
    scorer = Scorer(model, speed)
    if not cached.used or not batch.shares_prompt or scorer.split is None:
        return []
    sample = scorer.split.hidden(mx.zeros((1, 1), mx.int32))
    shapes = [bucket.tokens.shape for bucket in scorer.layout(batch).buckets]
    return [mx.zeros((*shape, sample.shape[-1]), sample.dtype) for shape in shapes]


def _scoring(model: nn.Module, speed: SpeedConfig, batch: Batch) -> Graph:
    """Log-probs without a gradient."""
    return _trace_model(model, lambda: [Scorer(model, speed)(batch, gradient=False).logps])[0]


def _plain_gradient(model: nn.Module, batch: Batch) -> Graph:
    """The plain path's gradient, in float32, with which the optimizations are compared before the first step."""
    copies = holds_16_bits(model)
    marks = [mx.array(1.0) for _ in model.layers[first_adapted(model) :]] if copies else []

    def gradient(*given: mx.array) -> list[mx.array]:
        score = plain_score(model, traceable_checkpoint(iter(given)) if copies else None)
        return list(flat(nn.value_and_grad(model, lambda model: score(batch).sum())(model)[1]).values())

    with in_float32(model):
        graph, numbers = _trace_model(model, gradient, marks)
    return as_checkpointed(graph, numbers) if copies else graph
