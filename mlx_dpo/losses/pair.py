"""Losses of preference pairs against a reference: TRL's, under TRL's names, and two that it lacks.

Each takes `Pairs` and the settings and gives one loss a row, [R]. Notation: lr = log π(y|x) - log π_ref(y|x), the
log-ratio of an answer; Δ = lr_w - lr_l, or the difference of the scores under another f-divergence; r = β lr, the
implicit reward.
"""

from __future__ import annotations

import math

import mlx.core as mx

from mlx_dpo.config import LossConfig
from mlx_dpo.losses.numerics import log_sigmoid, smoothed_nll
from mlx_dpo.losses.views import Pairs


def sigmoid(pairs: Pairs, config: LossConfig) -> mx.array:
    """DPO: the chosen answer's implicit reward should exceed the rejected one's.

    -log σ(βΔ). Its gradient by Δ is -β σ(-βΔ): the wrongly ranked pairs count most. Without a reference
    (`reference: none`) Δ = log π(y_w|x) - log π(y_l|x), reference-free DPO.
    Rafailov et al. 2023 (arXiv 2305.18290), eq. 7.
    Example: Δ = 5, β = 0.1: -log σ(0.5) = 0.4741.
    """
    return -log_sigmoid(config.beta * pairs.margin)


def hinge(pairs: Pairs, config: LossConfig) -> mx.array:
    """SLiC: as DPO, but content once the reward margin is 1.

    max(0, 1 - βΔ).
    Zhao et al. 2023 (arXiv 2305.10425), section 2; on log-ratios in Liu et al. 2023 (RSO, arXiv 2309.06657).
    Example: Δ = 5, β = 0.1: 0.5.
    """
    return mx.maximum(1 - config.beta * pairs.margin, 0.0)


def ipo(pairs: Pairs, config: LossConfig) -> mx.array:
    """IPO: draw the margin to a target instead of to infinity, so that the reference is not forgotten.

    (Δ' - 1/(2β))², with Δ' the difference of the scores per token; as in TRL, the answers' lengths divide.
    Azar et al. 2023 (arXiv 2310.12036), eq. 17, where β is called τ.
    Example: lr_w = 12 over 4 tokens, lr_l = 6 over 3, β = 1: (3 - 2 - 0.5)² = 0.25.
    """
    return (pairs.margin_per_token - 1 / (2 * config.beta)) ** 2


def exo_pair(pairs: Pairs, config: LossConfig) -> mx.array:
    """EXO: the KL from the policy's preference distribution to the labels', in the mode-seeking direction of RLHF.

    KL(q‖p) with q = (σ(βΔ), σ(-βΔ)) and p = (1 - ε, ε), ε = `label_smoothing` > 0.
    Ji et al. 2024 (arXiv 2402.00856), eq. 16.
    Example: βΔ = 0, ε = 0.1: ½ log(½ / 0.9) + ½ log(½ / 0.1) = 0.5108.
    """
    logits = config.beta * pairs.margin
    log_chosen, log_rejected = log_sigmoid(logits), log_sigmoid(-logits)
    return mx.exp(log_chosen) * (log_chosen - math.log1p(-config.label_smoothing)) + mx.exp(log_rejected) * (
        log_rejected - math.log(config.label_smoothing)
    )


def nca_pair(pairs: Pairs, config: LossConfig) -> mx.array:
    """NCA: judge each answer by its own reward, so that the chosen one's likelihood does not fall.

    -log σ(r_w) - ½ log σ(-r_w) - ½ log σ(-r_l).
    Chen et al. 2024 (arXiv 2402.05369), section 4.
    Example: r_w = 1, r_l = -1: 0.3133 + ½ 1.3133 + ½ 0.3133 = 1.1265.
    """
    chosen, rejected = config.beta * pairs.chosen.ratio, config.beta * pairs.rejected.ratio
    return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


def robust(pairs: Pairs, config: LossConfig) -> mx.array:
    """Robust DPO: unbiased when a share ε of the labels is flipped.

    (-(1 - ε) log σ(βΔ) + ε log σ(-βΔ)) / (1 - 2ε), ε = `label_smoothing` < ½.
    Chowdhury et al. 2024 (arXiv 2403.00409), section 3.1.
    Example: βΔ = 0.5, ε = 0.1: (0.9 · 0.4741 - 0.1 · 0.9741) / 0.8 = 0.4116.
    """
    logits, flipped = config.beta * pairs.margin, config.label_smoothing
    return (flipped * log_sigmoid(-logits) - (1 - flipped) * log_sigmoid(logits)) / (1 - 2 * flipped)


def cdpo(pairs: Pairs, config: LossConfig) -> mx.array:
    """Conservative DPO: a label is right with probability 1 - ε only, so the margin has a best size.

    -(1 - ε) log σ(βΔ) - ε log σ(-βΔ), ε = `label_smoothing` in (0, ½); least where σ(βΔ) = 1 - ε. It has a name of its
    own because `sigmoid`, as in TRL 1.16, reads no smoothing.
    Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO".
    Example: βΔ = 0.5, ε = 0.1: 0.9 · 0.4741 + 0.1 · 0.9741 = 0.5241.
    """
    return smoothed_nll(config.beta * pairs.margin, config.label_smoothing)


def bco_pair(pairs: Pairs, config: LossConfig) -> mx.array:
    """BCO: a classifier of good and bad answers whose logit is the implicit reward.

    -log σ(r_w) - log σ(-r_l). As in TRL 1.16 without the paper's reward shift δ, so nothing is carried between batches.
    Jung et al. 2024 (arXiv 2404.04656), section 4.
    Example: r_w = 1, r_l = -1: 2 · 0.3133 = 0.6265.
    """
    return -log_sigmoid(config.beta * pairs.chosen.ratio) - log_sigmoid(-config.beta * pairs.rejected.ratio)


def sppo_hard(pairs: Pairs, config: LossConfig) -> mx.array:
    """SPPO: move each log-ratio to its share of a game's equilibrium, with the winner's probability taken as 1.

    (lr_w - 1/(2β))² + (lr_l + 1/(2β))².
    Wu et al. 2024 (arXiv 2405.00675), eq. 4.7 with P = 1 and 0.
    Example: lr_w = 4, lr_l = -3, β = 0.1: (4 - 5)² + (-3 + 5)² = 5.
    """
    target = 1 / (2 * config.beta)
    return (pairs.chosen.ratio - target) ** 2 + (pairs.rejected.ratio + target) ** 2


def aot(pairs: Pairs, config: LossConfig) -> mx.array:
    """AOT: the policy's margins as a distribution should dominate the reference's, whichever pair they come from.

    δ = sort(log π(y_w|x) - log π(y_l|x)) - sort(the same under π_ref), each over the micro-batch, then
    -(1 - ε) log σ(βδ) - ε log σ(-βδ), ε = `label_smoothing`. The sort makes it a loss of the whole micro-batch: eight
    rows are not the mean of four and four.
    Melnyk et al. 2024 (arXiv 2406.05882), section 3, paired.
    Example: policy differences 3, 1 and reference differences 0, 2, β = 1: δ = 1, 1 although the rows' own are 3, -1.
    """
    policy = mx.sort(pairs.chosen.policy - pairs.rejected.policy)
    reference = mx.sort(pairs.chosen.reference - pairs.rejected.reference)
    return smoothed_nll(config.beta * (policy - reference), config.label_smoothing)


def aot_unpaired(pairs: Pairs, config: LossConfig) -> mx.array:
    """AOT, unpaired: the chosen answers' rewards as a distribution should dominate the rejected answers'.

    δ = sort(lr_w) - sort(lr_l), each over the micro-batch, then as `aot`, with the same consequence for accumulation.
    Melnyk et al. 2024 (arXiv 2406.05882), section 3, unpaired.
    Example: lr_w = 3, 1 and lr_l = 0, 2, β = 1: δ = 1, 1.
    """
    delta = mx.sort(pairs.chosen.ratio) - mx.sort(pairs.rejected.ratio)
    return smoothed_nll(config.beta * delta, config.label_smoothing)


def apo_zero(pairs: Pairs, config: LossConfig) -> mx.array:
    """APO-zero: raise the chosen and lower the rejected answer; for data better than the model.

    1 - σ(r_w) + σ(r_l).
    D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7.
    Example: r_w = 1, r_l = -1: 0.2689 + 0.2689 = 0.5379.
    """
    return mx.sigmoid(-config.beta * pairs.chosen.ratio) + mx.sigmoid(config.beta * pairs.rejected.ratio)


def apo_down(pairs: Pairs, config: LossConfig) -> mx.array:
    """APO-down: lower the chosen answer, and the rejected one more; for data worse than the model.

    σ(r_w) + 1 - σ(r_w - r_l).
    D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 8.
    Example: r_w = 1, r_l = -1: 0.7311 + 0.1192 = 0.8503.
    """
    chosen, rejected = config.beta * pairs.chosen.ratio, config.beta * pairs.rejected.ratio
    return mx.sigmoid(chosen) + mx.sigmoid(rejected - chosen)


def discopop(pairs: Pairs, config: LossConfig) -> mx.array:
    """DiscoPOP: a blend of the logistic and the exponential loss that a language model found.

    (1 - m) · -log σ(l) + m e^-l, with l = βΔ and m = σ(l / τ), τ = `discopop_tau`. The second product is taken in the
    exponent, e^(log m - l), since for l below -88 its factors are 0 and infinity.
    Lu et al. 2024 (arXiv 2406.08414), eq. 5.
    Example: l = 0: ½ log 2 + ½ = 0.8466.
    """
    logits = config.beta * pairs.margin
    modulation = logits / config.discopop_tau
    return mx.sigmoid(-modulation) * -log_sigmoid(logits) + mx.exp(log_sigmoid(modulation) - logits)


def sigmoid_norm(pairs: Pairs, config: LossConfig) -> mx.array:
    """DPO with log-ratios per token, so that long answers earn nothing by their length.

    -log σ(βΔ'), with Δ' the difference of the scores per token.
    Lambert et al. 2024 (Tülu 3, arXiv 2411.15124), length-normalized DPO.
    Example: lr_w = 12 over 4 tokens, lr_l = 6 over 3, β = 0.5: -log σ(0.5) = 0.4741.
    """
    return -log_sigmoid(config.beta * pairs.margin_per_token)


def dpop(pairs: Pairs, config: LossConfig) -> mx.array:
    """DPO-Positive: as DPO, but a chosen answer that falls below its reference is punished at once.

    -log σ(β (Δ - λ max(0, -lr_w))), λ = `dpop_lambda`: the penalty stands inside the log-sigmoid.
    Pal et al. 2024 (Smaug, arXiv 2402.13228), eq. 3.
    Example: lr_w = -1, lr_l = -6, λ = 2, β = 0.1: -log σ(0.1 (5 - 2)) = 0.5544.
    """
    penalty = mx.maximum(-pairs.chosen.ratio, 0.0)
    return -log_sigmoid(config.beta * (pairs.chosen.ratio - pairs.rejected.ratio - config.dpop_lambda * penalty))
