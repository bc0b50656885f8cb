"""The objective of a micro-batch: the terms of the mix, each on the view that it takes."""

from __future__ import annotations

import mlx.core as mx

from mlx_dpo.config import LossConfig
from mlx_dpo.losses.mix import parse_mix
from mlx_dpo.losses.views import VIEWS, Answers, Unpaired, sequence_logps
from mlx_dpo.types import LossOutput, TokenLogps


def compute_loss(
    policy: TokenLogps,
    reference: mx.array | None,
    mask: mx.array,
    rank: mx.array,
    label: mx.array | None,
    config: LossConfig,
) -> LossOutput:
    """The loss of R rows with K answers of up to C tokens, and what the metrics need.

    - `policy`: log-probs under the policy, [R, K, C]; the loss is differentiable in `policy.logps`.
    - `reference`: log-probs under π_ref, [R, K, C]; None for a loss without one, and for reference-free DPO.
    - `mask` [R, K, C]: 1 on completion tokens; `rank` [R, K]; `label` [R] of unpaired rows, else None; all float.
      `Kind` says what a row's K answers are.

    loss = Σ_i weight_i · mean over rows of loss_i, TRL's mean over a micro-batch. An option that no loss of the mix
    reads has no effect here; `check_loss_config` is what refuses it. Works inside `mx.compile` and `nn.value_and_grad`.
    Raises ValueError when the batch lacks what the loss needs: a second answer, a label, `log_sum_p2` for WPO.
    """
    terms = parse_mix(config.type)
    base = mx.zeros_like(policy.logps) if reference is None else reference
    answers = Answers(
        tokens=policy.logps,
        mask=mask,
        logps=sequence_logps(policy.logps, mask, config),
        reference_logps=sequence_logps(base, mask, config),
        length=mx.maximum(mask.sum(axis=-1), 1.0),
        rank=rank,
        label=label,
    )
    loss, kl = mx.array(0.0, dtype=policy.logps.dtype), None
    for term in terms:
        view = VIEWS[term.spec.kind](answers, config)
        rows = term.spec.fn(view, config)
        if config.use_weighting and "use_weighting" in term.spec.options:
            rows = rows * wpo_weights(policy, answers)
        loss = loss + term.weight * rows.mean()
        if isinstance(view, Unpaired):
            kl = view.kl
    logps, rewards = mx.stop_gradient(answers.logps), None
    # of the first loss that is more than imitation; imitation has rewards by a reference alone
    preferences = [term for term in terms if term.spec.kind != "demonstration"]
    if preferences or reference is not None:
        rewarding = (preferences or terms)[0].spec
        rewards = rewarding.reward(logps, answers.reference_logps, answers.length, config)
    return LossOutput(loss=loss, logps=logps, rewards=rewards, kl=kl)


def wpo_weights(policy: TokenLogps, answers: Answers) -> mx.array:
    """How likely the policy is to write both answers of a pair, [R], without gradient.

    w(x, y) = exp( mean_t( log π(y_t) - log Σ_v π(v)² ) ), multiplied over chosen and rejected: the pairs nearest to
    on-policy count most. Zhou et al. 2024, WPO (arXiv 2406.11827), eq. 2 with its alignment.
    """
    if policy.log_sum_p2 is None:
        raise ValueError("use_weighting needs the log-probs' log_sum_p2")
    aligned = ((policy.logps - policy.log_sum_p2) * answers.mask).sum(axis=-1) / answers.length
    return mx.stop_gradient(mx.exp(aligned.sum(axis=-1)))
