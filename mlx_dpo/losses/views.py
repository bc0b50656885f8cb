"""From token log-probs to what a loss reads: one named view for each kind of row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from mlx_dpo.config import LossConfig
from mlx_dpo.losses.divergences import DIVERGENCES
from mlx_dpo.types import Kind


class Side(NamedTuple):
    """One answer y of each of R pairs. Arrays are [R] unless said otherwise, log-probs summed over tokens, in nats."""

    policy: mx.array  # log π(y|x)
    reference: mx.array  # log π_ref(y|x); zeros without a reference
    score: mx.array  # f'(π/π_ref): the log-ratio unless another f-divergence is asked for
    length: mx.array  # completion tokens
    tokens: mx.array  # [R, C] log π of each token
    mask: mx.array  # [R, C]

    @property
    def ratio(self) -> mx.array:
        """log π(y|x) - log π_ref(y|x)."""
        return self.policy - self.reference


class Pairs(NamedTuple):
    """R preference pairs, y_w (chosen) over y_l (rejected)."""

    chosen: Side
    rejected: Side

    @property
    def margin(self) -> mx.array:
        """How much more the policy has moved to y_w than to y_l, in scores; β times it is the reward margin."""
        return self.chosen.score - self.rejected.score

    @property
    def margin_per_token(self) -> mx.array:
        """The margin with each score divided by its completion's length."""
        return self.chosen.score / self.chosen.length - self.rejected.score / self.rejected.length


class Rankings(NamedTuple):
    """R rankings of up to K answers, [R, K] each."""

    log_ratio: mx.array  # log π(y_k|x) - log π_ref(y_k|x)
    rank: mx.array  # ascending from the best; equal is a tie, 0 an absent answer


class Unpaired(NamedTuple):
    """R judged completions, [R] each."""

    log_ratio: mx.array  # log π(y|x) - log π_ref(y|x)
    label: mx.array  # +1 good, -1 bad
    kl: mx.array | None  # [] `mismatched_kl`; None where the batch has no mismatched completions


class Demonstrations(NamedTuple):
    """R completions to imitate, [R] each."""

    policy: mx.array  # log π(y|x)
    length: mx.array  # completion tokens


class Answers(NamedTuple):
    """R rows of K answers of up to C tokens with all that a view is made of."""

    tokens: mx.array  # [R, K, C] log π of each token
    mask: mx.array  # [R, K, C] 1 on completion tokens
    logps: mx.array  # [R, K] log π(y|x), with LD-DPO's weights where the config asks for them
    reference_logps: mx.array  # [R, K] log π_ref(y|x), weighted alike; zeros without a reference
    length: mx.array  # [R, K] completion tokens, at least 1 so that an absent answer divides by no zero
    rank: mx.array  # [R, K]
    label: mx.array | None  # [R]


def sequence_logps(tokens: mx.array, mask: mx.array, config: LossConfig) -> mx.array:
    """log π(y|x) [R, K]: the sum of the tokens' log-probs [R, K, C], with LD-DPO's weights where they are asked for.

    LD-DPO: the tokens that one answer has more than the other count α times, so that length alone earns less. α = 1 is
    no weighting, α = 0 cuts both answers to the shorter one's length. Liu et al. 2024 (arXiv 2409.06411).
    """
    if config.ld_alpha is not None:
        shortest = mask.sum(axis=-1).min(axis=-1)[:, None, None]
        mask = mask * mx.where(mx.cumsum(mask, axis=-1) <= shortest, 1.0, config.ld_alpha)
    return (tokens * mask).sum(axis=-1)


def pairs(answers: Answers, config: LossConfig) -> Pairs:
    """The view of a pair batch, K = 2 with the chosen answer first."""
    if answers.mask.shape[1] != 2:
        raise ValueError(f"{config.type} compares two answers a row, and the batch has {answers.mask.shape[1]}")
    logps, reference = answers.logps, answers.reference_logps
    scores = DIVERGENCES[config.f_divergence_type](logps - reference, config.f_alpha_divergence_coef)
    of_both = Side(logps, reference, scores, answers.length, answers.tokens, answers.mask)
    return Pairs(*(Side(*(array[:, k] for array in of_both)) for k in (0, 1)))


def rankings(answers: Answers, config: LossConfig) -> Rankings:
    """The view of a batch of rankings, K ≥ 2."""
    return Rankings(log_ratio=answers.logps - answers.reference_logps, rank=answers.rank)


def unpaired(answers: Answers, config: LossConfig) -> Unpaired:
    """The view of a batch of judged completions: answer 0 is judged; answer 1, where there is one, is another row's."""
    if answers.label is None:
        raise ValueError(f"{config.type} needs a label for every row")
    log_ratio = answers.logps - answers.reference_logps
    return Unpaired(
        log_ratio=log_ratio[:, 0],
        label=answers.label,
        kl=mismatched_kl(log_ratio[:, 1]) if answers.mask.shape[1] > 1 else None,
    )


def mismatched_kl(log_ratio: mx.array) -> mx.array:
    """KTO's z: max(0, mean of log π(y'|x) - log π_ref(y'|x)), [] in nats and without gradient, from its terms [R].

    Each y' is another row's completion; with the row's own, it would be measured from itself.
    Ethayarajh et al. 2024 (arXiv 2402.01306), section 4.1.
    """
    return mx.stop_gradient(mx.maximum(log_ratio.mean(), 0.0))


def demonstrations(answers: Answers, config: LossConfig) -> Demonstrations:
    """The view of answer 0 alone: the demonstration, the chosen or the best answer.

    Summed without LD-DPO's weights: imitation compares no lengths, so its term of a mix keeps every token.
    """
    return Demonstrations(
        policy=(answers.tokens[:, 0] * answers.mask[:, 0]).sum(axis=-1),
        length=answers.length[:, 0],
    )


VIEWS: dict[Kind, Callable[[Answers, LossConfig], Pairs | Rankings | Unpaired | Demonstrations]] = {
    "pair": pairs,
    "ranking": rankings,
    "unpaired": unpaired,
    "demonstration": demonstrations,
}

ACCEPTS: dict[Kind, frozenset[Kind]] = {
    "pair": frozenset({"pair"}),
    "ranking": frozenset({"ranking", "pair"}),
    "unpaired": frozenset({"unpaired"}),
    "demonstration": frozenset({"demonstration", "pair", "ranking"}),
}
"""The kinds of rows from which each view can be made: a pair is a ranking of two, and its chosen answer a
demonstration."""
