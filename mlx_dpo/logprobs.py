"""log π(y|x), token by token: the heart.

Two ways to the same numbers. `plain_logps` is the definition: the whole model over whole sequences, a logit for every
token of the vocabulary at every position, a log-softmax in float32. `Scorer` leaves out what does not matter: the head
runs on the positions that predict a completion token and on no other, in chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dpo.arrays import TokenLogps, flat
from mlx_dpo.batching import Batch
from mlx_dpo.blocks import Block, Checkpointed, Fed, Heard, Skipped, Twice
from mlx_dpo.config import RunConfig, SpeedConfig
from mlx_dpo.parts import Parts, take_apart
from mlx_dpo.prefix import AnswerCache, PromptCache
from mlx_dpo.trunk import Pieces, TrunkStore, first_adapted, split_layout, whole_layout

CHUNK_LOGITS = 2**22
"""Logits that the head makes at a time (16 MiB in float32; more is no faster). MLX runs ahead by some ten operations,
so that a dozen such arrays live at once (measured on its CPU backend)."""

STATS = ("entropy", "mean_logit", "correct", "log_sum_p2")


def wanted_stats(config: RunConfig) -> tuple[str, ...]:
    """Those of `STATS` that a step of this run asks for."""
    weigh = ("log_sum_p2",) if config.loss.use_weighting else ()
    return STATS if config.train.token_metrics else weigh


LEVERS = ("trunk", "shared_prompt", "completion_head")
"""The fields of `SpeedConfig` that leave work out here; with none of them the plain path is taken."""

Head = Callable[[mx.array], mx.array]


class Scored(NamedTuple):
    """Which predictions of a batch count, as flat arrays over its N scored tokens.

    `position [N]` in the flattened sequences `[R·K·T]`, `target [N]` the token to predict there, `slot [R, K, C]` where
    each completion token's result stands: n + 1 for the n-th scored token, 0 for padding.
    """

    position: mx.array
    target: mx.array
    slot: mx.array


def scored_positions(batch: Batch) -> Scored:
    """The scored tokens of whole sequences, as the plain pass reads them."""
    rows, answers, width = batch.mask.shape
    context = batch.tokens_length.reshape(rows, answers) - batch.completion_length
    r, k, c = np.nonzero(batch.mask)
    sequence = r * answers + k
    position = sequence * batch.tokens.shape[1] + context[r, k] + c - 1
    slot = np.zeros((rows, answers, width), np.int32)
    slot[r, k, c] = np.arange(1, len(r) + 1)
    return Scored(mx.array(position), mx.array(batch.completion[r, k, c]), mx.array(slot))


def split_positions(batch: Batch) -> Scored:
    """The scored tokens where prompts `[R, P]` and answers `[R·K, W]` are read apart and laid end to end.

    An answer's first token is predicted by its prompt's last one, every other by the token before it.
    """
    rows, answers, width = batch.mask.shape
    r, k, c = np.nonzero(batch.mask)
    columns = batch.prompt.shape[1]
    last = r * columns + batch.prompt_length[r] - 1
    before = rows * columns + (r * answers + k) * max(width - 1, 1) + c - 1
    slot = np.zeros((rows, answers, width), np.int32)
    slot[r, k, c] = np.arange(1, len(r) + 1)
    return Scored(mx.array(np.where(c == 0, last, before)), mx.array(batch.completion[r, k, c]), mx.array(slot))


def plain_logps(model: nn.Module, batch: Batch, stats: tuple[str, ...] = ()) -> TokenLogps:
    """The definition: logits of every position, float32 log-softmax, the completion tokens picked out."""
    logits = model(mx.array(batch.tokens))
    scored = scored_positions(batch)
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
    `twice` is what `checkpoint` makes of a block's function.
    """

    def __init__(
        self,
        model: nn.Module,
        speed: SpeedConfig | None = None,
        *,
        checkpoint: bool = False,
        trunk: TrunkStore | None = None,
        twice: Twice = mx.checkpoint,
    ) -> None:
        self.model = model
        self.speed = speed or SpeedConfig()
        self.checkpoint = checkpoint
        self.twice = twice
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
        if self.parts is None or not any(getattr(self.speed, name) for name in LEVERS):
            return Scoring(plain_logps(self.model, batch, stats))
        trunk = self.trunk if self.speed.trunk and batch.shares_prompt and self.first_adapted > 0 else None
        fed = trunk.get(batch, self.layout(batch)) if trunk is not None and trunk.knows(batch) else None
        heard: list[mx.array] | None = [] if trunk is not None and trunk.wants(batch) else None
        hidden, scored = (self._split if self._shares(batch) else self._whole)(batch, _Listener(fed, heard))
        picked = hidden[scored.position]
        if self.speed.completion_head and self.head_is_frozen:
            measured = head_logps(self.parts.logits, picked, scored.target, stats, gradient=gradient)
        else:
            measured = _measure(self.parts.logits(picked), scored.target, stats)
        return Scoring(_place(measured, scored.slot, stats), heard)

    def keep(self, batch: Batch, states: list[mx.array] | None) -> None:
        """Puts what `score` gave for `batch`, now evaluated, into the trunk's store."""
        if self.trunk is not None and states is not None:
            self.trunk.put(batch, self.layout(batch), states)

    def layout(self, batch: Batch) -> list[Pieces]:
        """How the arrays of a batch's states lie in the trunk's store."""
        return split_layout(batch) if self._shares(batch) else whole_layout(batch)

    def _shares(self, batch: Batch) -> bool:
        return self.speed.shared_prompt and batch.shares_prompt

    def _whole(self, batch: Batch, listener: _Listener) -> tuple[mx.array, Scored]:
        """Hidden states of whole sequences, `[R·K·T, hidden]`."""
        assert self.parts is not None
        hidden = self.parts.hidden(mx.array(batch.tokens), layers=self._blocks(listener, 0))
        return hidden.reshape(-1, hidden.shape[-1]), scored_positions(batch)

    def _split(self, batch: Batch, listener: _Listener) -> tuple[mx.array, Scored]:
        """Hidden states of prompts, then of answers on top of them, flat: `[R·P + R·K·W, hidden]`."""
        assert self.parts is not None
        rows, answers, width = batch.completion.shape
        prompts = [PromptCache() for _ in self.model.layers]
        before = self.parts.hidden(mx.array(batch.prompt), cache=prompts, layers=self._blocks(listener, 0))
        lengths = np.repeat(batch.prompt_length, answers)
        caches = [AnswerCache(prompt, answers, batch.prompt.shape[1], lengths) for prompt in prompts]
        tokens = batch.completion.reshape(rows * answers, width)[:, : max(width - 1, 1)]
        behind = self.parts.hidden(mx.array(tokens), cache=caches, layers=self._blocks(listener, 1))
        size = before.shape[-1]
        return mx.concatenate([before.reshape(-1, size), behind.reshape(-1, size)]), split_positions(batch)

    def _blocks(self, listener: _Listener, which: int) -> list[Block]:
        """The blocks for one pass: frozen ones left out or listened to, adapted ones checkpointed if asked for."""
        blocks: list[Block] = [Block(block) for block in self.model.layers]
        first = self.first_adapted
        if self.checkpoint and self.model.training:
            blocks[first:] = [Checkpointed(block, self.twice) for block in self.model.layers[first:]]
        if first < len(blocks) and listener.fed is not None:
            blocks[:first] = [Skipped(block) for block in self.model.layers[:first]]
            blocks[first] = Fed(blocks[first], listener.fed[which])
        elif first < len(blocks) and listener.heard is not None:
            blocks[first] = Heard(blocks[first], listener.heard.append)
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
