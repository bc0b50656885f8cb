"""log π(y|x), token by token: the heart.

Two ways to the same numbers. `plain_logps` is the definition: the whole model over whole sequences, a logit for every
token of the vocabulary at every position, a log-softmax in float32. `Scorer` leaves out what does not matter: the head
runs on the positions that predict a completion token and on no other, in chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dpo.config import RunConfig, SpeedConfig
from mlx_dpo.data.batching import Batch
from mlx_dpo.logprobs.activation_cache import TrunkStore, first_adapted
from mlx_dpo.logprobs.buckets import NEVER, SPARE, Group, Layout, prefill_steps, split, whole
from mlx_dpo.logprobs.kv_cache import AnswerCache, PromptCache
from mlx_dpo.logprobs.layers import Block, Checkpointed, Fed, Heard, Skipped, Twice
from mlx_dpo.logprobs.split_model import Parts, take_apart
from mlx_dpo.models.trees import flat
from mlx_dpo.types import TokenLogps

CHUNK_LOGITS = 2**22
"""Logits that the head makes at a time (16 MiB in float32; more is no faster). MLX runs ahead by some ten operations,
so that a dozen such arrays live at once (measured on its CPU backend)."""

STATS = ("entropy", "mean_logit", "correct", "log_sum_p2")


def wanted_stats(config: RunConfig) -> tuple[str, ...]:
    """Those of `STATS` that a step of this run asks for."""
    weigh = ("log_sum_p2",) if config.loss.use_weighting else ()
    return STATS if config.train.token_metrics else weigh


LEVERS: dict[str, Any] = {
    "trunk": False,
    "prefill_step_size": 0,
    "shared_prompt": False,
    "groups": False,
    "completion_head": False,
}
"""The fields of `SpeedConfig` that leave work out here, switched off: `SpeedConfig(**LEVERS)` is the plain path."""

CPU_STEP, METAL_STEP = 128, 512
"""Tokens of a sequence that are read at a time. On a CPU sizes of 64 to 256 differ by a few percent. A GPU wants larger
products; its size was not measured. CUDA's attention leaves out what is masked by itself."""

OTHER_MODEL = SpeedConfig(trunk=False, shared_prompt=False)
"""What can be relied on in a model that is not held against its plain path: a reference by name."""

Head = Callable[[mx.array], mx.array]


class Scored(NamedTuple):
    """Which predictions of a batch count, as flat arrays over its N scored tokens.

    `position [N]` in the states that are read, laid end to end, `target [N]` the token to predict there, `slot
    [R, K, C]` where each completion token's result stands: n + 1 for the n-th scored token, 0 for padding.
    """

    position: mx.array
    target: mx.array
    slot: mx.array


def levers_on(speed: SpeedConfig) -> list[str]:
    """Those of `LEVERS` that are not switched off; what reads in steps shares prompts, or could."""
    on = [name for name, off in LEVERS.items() if getattr(speed, name) != off]
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
    first = np.arange(rows * answers) * batch.tokens.shape[1] + context - 1
    return (first[:, None] + np.arange(width)).reshape(rows, answers, width)


def plain_logps(model: nn.Module, batch: Batch, stats: tuple[str, ...] = ()) -> TokenLogps:
    """The definition: logits of every position, float32 log-softmax, the completion tokens picked out."""
    logits = model(mx.array(batch.tokens))
    scored = scored_tokens(batch, plain_positions(batch))
    picked = logits.reshape(-1, logits.shape[-1])[scored.position]
    return _place(_measure(picked, scored.target, stats), scored.slot, stats)


class Scoring(NamedTuple):
    """What a pass gives: token log-probs, and the states at the first adapted block where they were wanted."""

    logps: TokenLogps
    states: list[mx.array] | None = None


class Scorer:
    """Log-probs of a model's completions by the shortest way that this model and `speed` allow.

    `trunk` is a store of the frozen blocks' output for the rows of one data set; batches must carry that data set's
    places. A pass that finds all its rows there begins at the first adapted block; another one gives their `states`.
    `twice` is what `checkpoint` makes of a block's function; `spare` as in `mlx_dpo.logprobs.buckets`.
    """

    def __init__(
        self,
        model: nn.Module,
        speed: SpeedConfig | None = None,
        *,
        checkpoint: bool = False,
        trunk: TrunkStore | None = None,
        twice: Twice = mx.checkpoint,
        spare: int = SPARE,
    ) -> None:
        self.model = model
        self.speed = speed or SpeedConfig()
        self.checkpoint = checkpoint
        self.twice = twice
        self.spare = spare if self.speed.groups else NEVER
        self.trunk = trunk
        self.parts = take_apart(model)
        self.first_adapted = first_adapted(model)
        self.head_is_frozen = self.parts is not None and _frozen_outside_blocks(model, self.parts)

    def __call__(self, batch: Batch, stats: tuple[str, ...] = (), *, gradient: bool) -> TokenLogps:
        """Token log-probs `[R, K, C]` of `batch`, with `stats` beside them; `gradient` says whether one will be taken.

        Without a gradient what the trunk's store wants is computed and kept at once.
        """
        out = self.score(batch, stats, gradient=gradient)
        if not gradient and out.states is not None:
            mx.eval(out)
            self.keep(batch, out.states)
        return out.logps

    def score(self, batch: Batch, stats: tuple[str, ...] = (), *, gradient: bool) -> Scoring:
        """The same, with the trunk's states for `TrunkStore.put` where the store wants them."""
        if self.parts is None or not levers_on(self.speed):
            return Scoring(plain_logps(self.model, batch, stats))
        trunk = self.trunk if self.speed.trunk and batch.shares_prompt and self.first_adapted > 0 else None
        layout = self.layout(batch)
        fed = trunk.get(batch, layout.groups) if trunk is not None and trunk.knows(batch) else None
        heard: list[mx.array] | None = [] if trunk is not None and trunk.wants(batch) else None
        scored = scored_tokens(batch, layout.position)
        picked = self._read(layout, _Listener(fed, heard))[scored.position]
        if self.speed.completion_head and self.head_is_frozen:
            measured = head_logps(self.parts.logits, picked, scored.target, stats, gradient=gradient)
        else:
            measured = _measure(self.parts.logits(picked), scored.target, stats)
        return Scoring(_place(measured, scored.slot, stats), heard)

    def keep(self, batch: Batch, states: list[mx.array] | None) -> None:
        """Puts what `score` gave for `batch`, now evaluated, into the trunk's store."""
        if self.trunk is not None and states is not None:
            self.trunk.put(batch, self.layout(batch).groups, states)

    def layout(self, batch: Batch) -> Layout:
        """How a batch is read."""
        shares = self.speed.shared_prompt and batch.shares_prompt
        return split(batch, self.spare) if shares else whole(batch, self.spare)

    def _read(self, layout: Layout, listener: _Listener) -> mx.array:
        """Hidden states of the answers' groups, flattened and laid end to end: `[tokens, hidden]`."""
        assert self.parts is not None
        prompts: list[list[PromptCache]] = []  # by group, by block
        for group in layout.prompts:
            prompts.append([PromptCache() for _ in self.model.layers])
            self._pass(group, prompts[-1], listener, len(prompts) - 1)
        picks = {r: (g, i) for g, group in enumerate(layout.prompts) for i, r in enumerate(group.lines)}
        answers = layout.position.shape[1]
        states = []
        for g, group in enumerate(layout.answers, len(prompts)):
            rows = [line // answers for line in group.lines]
            caches: list[PromptCache] = [
                AnswerCache(of_block, [picks[r] for r in rows], layout.before[rows])
                for of_block in zip(*prompts, strict=True)
            ]
            hidden = self._pass(group, caches, listener, g)
            states.append(hidden.reshape(-1, hidden.shape[-1]))
        return mx.concatenate(states)

    def steps(self, group: Group) -> list[tuple[int, int]]:
        """The columns of a group that are read at a time; all of them where blocks share no keys and values."""
        if "prefill_step_size" not in levers_on(self.speed):
            return prefill_steps(group, 0)
        size = self.speed.prefill_step_size
        if size is None and mx.default_device() == mx.cpu:
            size = CPU_STEP
        return prefill_steps(group, (METAL_STEP if mx.metal.is_available() else 0) if size is None else size)

    def _pass(self, group: Group, caches: list[PromptCache], listener: _Listener, which: int) -> mx.array:
        """Hidden states `[n, width, hidden]` of a group, read on top of its `caches`."""
        assert self.parts is not None
        steps = self.steps(group)
        if len(steps) > 1 and not caches:
            caches = [PromptCache() for _ in self.model.layers]
        hidden = []
        heard: list[mx.array] | None = [] if listener.heard is not None else None
        for start, end in steps:
            for cache in caches:
                cache.read = start
            fed = listener.fed[which][:, start:end] if listener.fed is not None else None
            blocks = self._blocks(fed, heard)
            tokens = mx.array(group.tokens[:, start:end])
            hidden.append(self.parts.hidden(tokens, cache=caches or None, layers=blocks))
        if listener.heard is not None and heard:
            listener.heard.append(mx.concatenate(heard, axis=1))
        return mx.concatenate(hidden, axis=1)

    def _blocks(self, fed: mx.array | None, heard: list[mx.array] | None) -> list[Block]:
        """The blocks for one pass: frozen ones left out or listened to, adapted ones checkpointed if asked for."""
        blocks: list[Block] = [Block(block) for block in self.model.layers]
        first = self.first_adapted
        if self.checkpoint and self.model.training:
            blocks[first:] = [Checkpointed(block, self.twice) for block in self.model.layers[first:]]
        if first < len(blocks) and fed is not None:
            blocks[:first] = [Skipped(block) for block in self.model.layers[:first]]
            blocks[first] = Fed(blocks[first], fed)
        elif first < len(blocks) and heard is not None:
            blocks[first] = Heard(blocks[first], heard.append)
        return blocks


class _Listener(NamedTuple):
    """What is put in at the first adapted block, or where what comes there is noted; one array for each pass."""

    fed: list[mx.array] | None
    heard: list[mx.array] | None


def head_logps(
    head: Head, hidden: mx.array, target: mx.array, stats: tuple[str, ...] = (), *, gradient: bool
) -> mx.array:
    """What `_measure` gives for `head(hidden)`, `[N, 1 + stats]`, without ever holding `[N, vocab]`.

    log p of a token depends on that token's hidden state alone, so its gradient is one vector of the hidden size:
    J_n = ∂/∂h_n (logit[target] − logsumexp(logits)) = headᵀ(onehot(target) − softmax). It is computed while the chunk's
    logits are at hand and kept; the backward pass is then cotangent · J, with no logits made again: the value is
    log p + J · (h − h₀), where h₀ is h itself, held fixed. The head itself gets no gradient: it must be frozen.
    """
    chunk = max(32, CHUNK_LOGITS // head(hidden[:1]).shape[-1])  # shapes are known without computing
    if not gradient:
        return _by_chunks(lambda h, t: _measure(head(h), t, stats), hidden, target, chunk)
    width = 1 + len(stats)
    # one array a chunk: values and J are consumed together, so that the chunk's logits are no longer wanted
    fixed = mx.stop_gradient(hidden)
    out = _by_chunks(lambda h, t: _measure_with_gradient(head, h, t, stats), fixed, target, chunk)
    values, slope = mx.split(mx.stop_gradient(out), [width], axis=-1)
    moved = ((hidden - fixed).astype(mx.float32) * slope).sum(-1, keepdims=True)  # 0, and its gradient is J
    return mx.concatenate([values[:, :1] + moved, values[:, 1:]], axis=-1)


def _by_chunks(
    measure: Callable[[mx.array, mx.array], mx.array], hidden: mx.array, target: mx.array, chunk: int
) -> mx.array:
    """`measure(hidden, target)` of `chunk` tokens at a time, one after the other."""
    parts: list[mx.array] = []
    for start in range(0, hidden.shape[0], chunk):
        piece = hidden[start : start + chunk]
        if parts:
            (piece,) = mx.depends([piece], parts[-1:])  # else MLX, which goes breadth first, makes all logits at once
        parts.append(measure(piece, target[start : start + chunk]))
    return mx.concatenate(parts)


def _measure(logits: mx.array, target: mx.array, stats: tuple[str, ...]) -> mx.array:
    """`[N, 1 + stats]` float32: log p of the targets, then each of `stats` (without gradient)."""
    raw = logits.astype(mx.float32)
    normalizer = mx.logsumexp(raw, axis=-1)
    columns = [mx.take_along_axis(raw, target[:, None], axis=-1)[:, 0] - normalizer]
    if stats:
        raw, normalizer = mx.stop_gradient(raw), mx.stop_gradient(normalizer)
        log_p = raw - normalizer[:, None]
        measures: dict[str, Callable[[], mx.array]] = {
            "entropy": lambda: -(mx.exp(log_p) * log_p).sum(-1),
            "mean_logit": lambda: raw.mean(-1),
            "correct": lambda: (raw.argmax(-1) == target).astype(mx.float32),
            "log_sum_p2": lambda: mx.logsumexp(2 * log_p, axis=-1),
        }
        columns += [measures[name]() for name in stats]
    return mx.stack(columns, axis=-1)


def _measure_with_gradient(head: Head, hidden: mx.array, target: mx.array, stats: tuple[str, ...]) -> mx.array:
    """`[N, 1 + stats + hidden]` float32: `_measure`, and beside it the gradient of each log p by its hidden state.

    The exponentials are taken once: for the normalizer, for the gradient by the logits, onehot − softmax, and for
    stats.
    """

    def weighted(hidden: mx.array) -> tuple[mx.array, mx.array]:
        logits = head(hidden)
        raw = mx.stop_gradient(logits).astype(mx.float32)
        top = raw.max(axis=-1, keepdims=True)
        weights = mx.exp(raw - top)
        total = weights.sum(axis=-1, keepdims=True)
        p = weights / total
        at = target[:, None]
        log_p = mx.take_along_axis(raw, at, axis=-1) - top - mx.log(total)
        by_logits = mx.put_along_axis(-p, at, 1 - mx.take_along_axis(p, at, axis=-1), axis=-1)
        measures: dict[str, Callable[[], mx.array]] = {
            "entropy": lambda: (top + mx.log(total))[:, 0] - (p * raw).sum(-1),
            "mean_logit": lambda: raw.mean(-1),
            "correct": lambda: (raw.argmax(-1) == target).astype(mx.float32),
            "log_sum_p2": lambda: mx.log((p * p).sum(-1)),
        }
        measured = mx.stack([log_p[:, 0], *(measures[name]() for name in stats)], axis=-1)
        return (logits * by_logits.astype(logits.dtype)).sum(), measured

    cotangents = [mx.array(1.0, hidden.dtype), mx.zeros((hidden.shape[0], 1 + len(stats)))]
    (_, measured), (gradient,) = mx.vjp(weighted, [hidden], cotangents)
    return mx.concatenate([measured, gradient.astype(mx.float32)], axis=-1)


def _place(measured: mx.array, slot: mx.array, stats: tuple[str, ...]) -> TokenLogps:
    """Flat results `[N, columns]` to `[R, K, C]`, with 0 where nothing is scored."""
    padded = mx.concatenate([mx.zeros((1, measured.shape[1]), measured.dtype), measured])
    placed = padded[slot]
    return TokenLogps(placed[..., 0], **{name: placed[..., 1 + i] for i, name in enumerate(stats)})


def _frozen_outside_blocks(model: nn.Module, parts: Parts) -> bool:
    prefix = f"{parts.path}.layers."
    return all(name.startswith(prefix) for name in flat(model.trainable_parameters()))
