"""log π(y|x), token by token: the number that every loss of this package is made of.

Two ways to the same numbers. `plain_logps` is the definition: the whole model over whole sequences, a logit for every
token of the vocabulary at every position, a log-softmax in float32. `Scorer` leaves out what does not change the
result; the files beside this one are its parts, and `check.py` holds it against `plain_logps` before a run trusts it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dpo.config import RunConfig, SpeedConfig
from mlx_dpo.data.batching import Batch
from mlx_dpo.logprobs.activation_cache import ActivationCache, first_adapted
from mlx_dpo.logprobs.buckets import (
    BUCKET_OVERHEAD,
    ONE_BUCKET,
    Bucket,
    Layout,
    prefill_steps,
    split_prompts,
    whole_sequences,
)
from mlx_dpo.logprobs.head import head_logps, token_logps
from mlx_dpo.logprobs.kv_cache import PromptCache, continuation, pads_states, prefix_caches
from mlx_dpo.logprobs.layers import CaptureInput, CheckpointedLayer, CheckpointFn, InjectInput, Layer, SkipLayer
from mlx_dpo.logprobs.precision import by_gradient_kernels
from mlx_dpo.logprobs.split_model import SplitModel, split_model
from mlx_dpo.models.trees import flat
from mlx_dpo.types import TokenLogps

STATS = ("entropy", "mean_logit", "correct", "log_sum_p2")
"""What can be measured of a token's distribution beside its log-prob: the optional fields of `TokenLogps`."""


def wanted_stats(config: RunConfig) -> tuple[str, ...]:
    """Those of `STATS` that a step of this run asks for."""
    weigh = ("log_sum_p2",) if config.loss.use_weighting else ()
    return STATS if config.train.token_metrics else weigh


OPTIMIZATIONS: dict[str, Any] = {
    "activation_cache": False,
    "prefill_step_size": 0,
    "shared_prompt": False,
    "length_buckets": False,
    "chunked_logits": False,
}
"""The fields of `SpeedConfig` that leave work out, switched off: `SpeedConfig(**OPTIMIZATIONS)` is the plain path. In
the order in which `check.py` gives them up where a model does not allow them."""

CPU_STEP, METAL_STEP = 128, 512
"""Tokens of a sequence that are read at a time. On a CPU sizes of 64 to 256 differ by a few percent. A GPU wants larger
products; its size was not measured. CUDA's attention leaves out what is masked by itself."""

UNCHECKED = SpeedConfig(activation_cache=False, shared_prompt=False)
"""What can be relied on in a model that was not held against its plain path, such as a reference given by name."""


class Scored(NamedTuple):
    """Which predictions of a batch count, as flat arrays over its N scored tokens.

    `position [N]` in the hidden states that were computed, laid end to end, `target [N]` the token to predict there,
    `slot [R, K, C]` where each completion token's result stands: n + 1 for the n-th scored token, 0 for padding.
    """

    position: mx.array
    target: mx.array
    slot: mx.array


def optimizations_on(speed: SpeedConfig) -> list[str]:
    """Those of `OPTIMIZATIONS` that are not switched off; chunked prefill counts only with shared prompts."""
    on = [name for name, off in OPTIMIZATIONS.items() if getattr(speed, name) != off]
    return [name for name in on if name != "prefill_step_size" or speed.shared_prompt]


def scored_tokens(batch: Batch, position: np.ndarray) -> Scored:
    """The scored tokens, of which `position [R, K, C]` says where each is predicted."""
    r, k, c = np.nonzero(batch.mask)
    slot = np.zeros(batch.mask.shape, np.int32)
    slot[r, k, c] = np.arange(1, len(r) + 1)
    return Scored(mx.array(position[r, k, c]), mx.array(batch.completion[r, k, c]), mx.array(slot))


def plain_positions(batch: Batch) -> np.ndarray:
    """`[R, K, C]`: where the whole sequences `tokens [R·K, T]`, flattened, predict each completion token."""
    rows, answers, width = batch.mask.shape
    context = batch.tokens_length - batch.completion_length.reshape(-1)
    first = np.arange(rows * answers) * batch.tokens.shape[1] + context - 1  # a token is predicted one place before it
    return (first[:, None] + np.arange(width)).reshape(rows, answers, width)


def plain_logps(model: Callable[[mx.array], mx.array], batch: Batch, stats: tuple[str, ...] = ()) -> TokenLogps:
    """The definition: logits of every position, float32 log-softmax, the completion tokens picked out."""
    logits = model(mx.array(batch.tokens))
    scored = scored_tokens(batch, plain_positions(batch))
    picked = logits.reshape(-1, logits.shape[-1])[scored.position]
    return _place(token_logps(picked, scored.target, stats), scored.slot, stats)


class Scoring(NamedTuple):
    """What a pass gives: token log-probs, and the states at the first adapted block where the cache wants them."""

    logps: TokenLogps
    states: list[mx.array] | None = None


class Scorer:
    """Log-probs of a model's completions with as little work as this model and the settings `speed` allow.

    `activation_cache` holds the frozen blocks' output for the rows of one data set; batches must carry that data set's
    row indices. A pass that finds all its rows there begins at the first adapted block; another one gives their
    `states`. With `checkpoint` adapted blocks are recomputed in the backward pass by `checkpoint_fn`. `bucket_overhead`
    is what one more bucket costs, in tokens of padding (`buckets.py`).
    """

    def __init__(
        self,
        model: nn.Module,
        speed: SpeedConfig | None = None,
        *,
        checkpoint: bool = False,
        activation_cache: ActivationCache | None = None,
        checkpoint_fn: CheckpointFn = mx.checkpoint,
        bucket_overhead: int = BUCKET_OVERHEAD,
    ) -> None:
        self.model = model
        self.speed = speed or SpeedConfig()
        self.checkpoint = checkpoint
        self.checkpoint_fn = checkpoint_fn
        self.bucket_overhead = bucket_overhead if self.speed.length_buckets else ONE_BUCKET
        self.activation_cache = activation_cache
        self.split: SplitModel | None = split_model(model)
        self.first_adapted = first_adapted(model)
        self.head_is_frozen = self.split is not None and _frozen_outside_blocks(model, self.split)

    def __call__(self, batch: Batch, stats: tuple[str, ...] = (), *, gradient: bool) -> TokenLogps:
        """Token log-probs `[R, K, C]` of `batch`, with `stats` beside them; `gradient` says whether one will be taken.

        Without a gradient, what the activation cache still lacks is computed and kept at once.
        """
        out = self.score(batch, stats, gradient=gradient)
        if not gradient and out.states is not None:
            mx.eval(out)
            self.keep(batch, out.states)
        return out.logps

    def score(self, batch: Batch, stats: tuple[str, ...] = (), *, gradient: bool) -> Scoring:
        """The same, with the states for `keep` where the activation cache lacks this batch's rows."""
        if not gradient:
            return by_gradient_kernels(lambda: self._score(batch, stats, gradient=False))
        return self._score(batch, stats, gradient=True)

    def _score(self, batch: Batch, stats: tuple[str, ...], *, gradient: bool) -> Scoring:
        if self.split is None or not optimizations_on(self.speed):
            return Scoring(plain_logps(self.model, batch, stats))
        # only a prompt that all answers share has states that do not depend on the answer, and can be kept by row
        use_cache = self.speed.activation_cache and batch.shares_prompt and self.first_adapted > 0
        cache = self.activation_cache if use_cache else None
        layout = self.layout(batch)
        inject = cache.get(batch, layout.buckets) if cache is not None and cache.knows(batch) else None
        captured: list[mx.array] | None = [] if cache is not None and cache.wants(batch) else None
        scored = scored_tokens(batch, layout.position)
        picked = self._hidden(layout, _Boundary(inject, captured))[scored.position]
        if self.speed.chunked_logits and self.head_is_frozen:
            measured = head_logps(self.split.logits, picked, scored.target, stats, gradient=gradient)
        else:
            measured = token_logps(self.split.logits(picked), scored.target, stats)
        return Scoring(_place(measured, scored.slot, stats), captured)

    def keep(self, batch: Batch, states: list[mx.array] | None) -> None:
        """Puts what `score` gave for `batch`, now evaluated, into the activation cache."""
        if self.activation_cache is not None and states is not None:
            self.activation_cache.put(batch, self.layout(batch).buckets, states)

    def layout(self, batch: Batch) -> Layout:
        """How a batch is read: its prompts apart from the answers where that is allowed, else whole sequences."""
        if self.speed.shared_prompt and batch.shares_prompt:
            return split_prompts(batch, self.bucket_overhead, pad_prompts=pads_states(self.model))
        return whole_sequences(batch, self.bucket_overhead)

    def steps(self, bucket: Bucket) -> list[tuple[int, int]]:
        """The columns of a bucket that are read at a time (chunked prefill); all of them without shared prompts."""
        if "prefill_step_size" not in optimizations_on(self.speed):
            return prefill_steps(bucket, 0)
        size = self.speed.prefill_step_size
        if size is None and mx.default_device() == mx.cpu:
            size = CPU_STEP
        return prefill_steps(bucket, (METAL_STEP if mx.metal.is_available() else 0) if size is None else size)

    def _hidden(self, layout: Layout, boundary: _Boundary) -> mx.array:
        """Hidden states of the answers' buckets, flattened and laid end to end: `[tokens, hidden]`."""
        prompts: list[list[PromptCache]] = []  # by bucket, by block
        for bucket in layout.prompts:
            prompts.append(prefix_caches(self.model, bucket.padded_lengths))
            self._pass(bucket, prompts[-1], boundary, len(prompts) - 1)  # for what it leaves in the caches alone
        prompt_of = {r: (b, i) for b, bucket in enumerate(layout.prompts) for i, r in enumerate(bucket.sequences)}
        answers = layout.position.shape[1]
        states = []
        for b, bucket in enumerate(layout.answers, len(prompts)):
            rows = [sequence // answers for sequence in bucket.sequences]
            caches = [  # none where whole sequences are read: zip of nothing is empty
                continuation(of_block, [prompt_of[r] for r in rows], layout.before[rows])
                for of_block in zip(*prompts, strict=True)
            ]
            hidden = self._pass(bucket, caches, boundary, b)
            states.append(hidden.reshape(-1, hidden.shape[-1]))
        return mx.concatenate(states)

    def _pass(self, bucket: Bucket, caches: list[PromptCache], boundary: _Boundary, which: int) -> mx.array:
        """Hidden states `[n, width, hidden]` of a bucket, read on top of its `caches`."""
        assert self.split is not None
        steps = self.steps(bucket)
        if len(steps) > 1 and not caches:
            caches = prefix_caches(self.model)
        hidden = []
        captured: list[mx.array] | None = [] if boundary.captured is not None else None
        for start, end in steps:
            for cache in caches:
                cache.step = (start, end)  # said here, since the cache of a block that is left out is never updated
            inject = boundary.inject[which][:, start:end] if boundary.inject is not None else None
            layers = self._layers(inject, captured)
            tokens = mx.array(bucket.tokens[:, start:end])
            hidden.append(self.split.hidden(tokens, cache=caches or None, layers=layers))
        if boundary.captured is not None and captured:
            boundary.captured.append(mx.concatenate(captured, axis=1))
        return mx.concatenate(hidden, axis=1)

    def _layers(self, inject: mx.array | None, captured: list[mx.array] | None) -> list[Layer]:
        """The blocks for one pass: frozen ones left out or their output noted, adapted ones checkpointed if asked."""
        layers: list[Layer] = [Layer(block) for block in self.model.layers]
        first = self.first_adapted
        if self.checkpoint and self.model.training:
            # frozen blocks keep nothing for the backward pass: recomputing them would cost and save nothing
            layers[first:] = [CheckpointedLayer(block, self.checkpoint_fn) for block in self.model.layers[first:]]
        if first < len(layers) and inject is not None:
            layers[:first] = [SkipLayer(block) for block in self.model.layers[:first]]
            layers[first] = InjectInput(layers[first], inject)
        elif first < len(layers) and captured is not None:
            layers[first] = CaptureInput(layers[first], captured.append)
        return layers


class _Boundary(NamedTuple):
    """What is put in at the first adapted block, or where what comes there is noted; one array for each bucket."""

    inject: list[mx.array] | None
    captured: list[mx.array] | None


def _place(measured: mx.array, slot: mx.array, stats: tuple[str, ...]) -> TokenLogps:
    """Flat results `[N, columns]` to `[R, K, C]`, with 0 where nothing is scored."""
    padded = mx.concatenate([mx.zeros((1, measured.shape[1]), measured.dtype), measured])
    placed = padded[slot]
    return TokenLogps(placed[..., 0], **{name: placed[..., 1 + i] for i, name in enumerate(stats)})


def _frozen_outside_blocks(model: nn.Module, split: SplitModel) -> bool:
    """Whether head and embedding are frozen: `head_logps` gives them no gradient."""
    prefix = f"{split.path}.layers."
    return all(name.startswith(prefix) for name in flat(model.trainable_parameters()))
