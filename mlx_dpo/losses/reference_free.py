"""Losses of preference pairs that need no reference.

Each takes `Pairs` and the settings; what is a mean over the micro-batch's tokens rather than over its rows says so.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_dpo.config import LossConfig
from mlx_dpo.losses.demonstration import token_mean_nll
from mlx_dpo.losses.numerics import log_one_minus_exp, log_sigmoid, smoothed_nll
from mlx_dpo.losses.views import Pairs


def cpo(pairs: Pairs, config: LossConfig) -> mx.array:
    """CPO: DPO with a uniform reference, held in place by the chosen answer's likelihood.

    -(1 - ε) log σ(βΔ) - ε log σ(-βΔ) + α NLL, with Δ = log π(y_w|x) - log π(y_l|x), ε = `label_smoothing`,
    α = `cpo_alpha`, and the NLL of y_w as in `sft`, a mean over the micro-batch's tokens.
    Xu et al. 2024 (arXiv 2401.08417), eq. 3; the loss of TRL's CPOTrainer.
    Example: Δ = 5, β = 0.1, ε = 0, NLL = 2: 0.4741 + 2 = 2.4741.
    """
    preference = smoothed_nll(config.beta * _sum_margin(pairs, config), config.label_smoothing)
    return preference + _chosen_nll(pairs, config)


def cpo_hinge(pairs: Pairs, config: LossConfig) -> mx.array:
    """CPO with SLiC's hinge in place of the log-sigmoid.

    max(0, 1 - βΔ) + α NLL; TRL's CPOTrainer with loss_type hinge.
    Example: Δ = 5, β = 0.1, NLL = 2: 2.5.
    """
    return mx.maximum(1 - config.beta * _sum_margin(pairs, config), 0.0) + _chosen_nll(pairs, config)


def cpo_ipo(pairs: Pairs, config: LossConfig) -> mx.array:
    """CPO with IPO's square in place of the log-sigmoid, on log-probs per token.

    (Δ' - 1/(2β))² + α NLL, Δ' = log π(y_w|x) / |y_w| - log π(y_l|x) / |y_l|; TRL's CPOTrainer with loss_type ipo.
    Example: -1 and -3 nats per token, β = 0.5, NLL = 1: (2 - 1)² + 1 = 2.
    """
    return (_mean_margin(pairs, config) - 1 / (2 * config.beta)) ** 2 + _chosen_nll(pairs, config)


def simpo(pairs: Pairs, config: LossConfig) -> mx.array:
    """SimPO: the mean log-prob per token as the reward, with a margin to be won by.

    -(1 - ε) log σ(βΔ' - γ) - ε log σ(γ - βΔ'), Δ' the difference of the log-probs per token, γ = `simpo_gamma`,
    ε = `label_smoothing`, 0 in the paper. β wants to be 2 or more: a log-prob per token is small. With `alphapo_alpha`
    it is AlphaPO (see `alphapo`); the mix `simpo:1,sft:1` is CPO-SimPO.
    Meng et al. 2024 (arXiv 2405.14734), eq. 6.
    Example: Δ' = 2, β = 0.5, γ = 0.5, ε = 0: -log σ(0.5) = 0.4741.
    """
    return smoothed_nll(config.beta * _mean_margin(pairs, config) - config.simpo_gamma, config.label_smoothing)


def orpo(pairs: Pairs, config: LossConfig) -> mx.array:
    """ORPO: imitate the chosen answer, and prefer it in odds; one stage instead of SFT and DPO.

    NLL - β log σ(log odds(y_w) - log odds(y_l)), odds = p / (1 - p) with log p the mean log-prob per token, β the
    paper's λ, and the NLL of y_w as in `sft`, a mean over the micro-batch's completion tokens. TRL's ORPOTrainer counts
    the prompt's tokens into the NLL too; the prompt is no answer, and here it is left out.
    Hong et al. 2024 (arXiv 2403.07691), eq. 6 and 7.
    Example: p_w = 0.8 and p_l = 0.5: odds 4 and 1, -log σ(log 4) = log 1.25; β = 0.1, NLL = 0.2231: 0.2455.
    """
    chosen, rejected = _per_token(pairs)
    log_odds = (chosen - rejected) - (log_one_minus_exp(chosen) - log_one_minus_exp(rejected))
    return token_mean_nll(pairs.chosen.policy, pairs.chosen.length) - config.beta * log_sigmoid(log_odds)


def unlikelihood(pairs: Pairs, config: LossConfig) -> mx.array:
    """Unlikelihood: imitate the chosen answer, and make each token of the rejected one less likely.

    -mean_t log π(y_w,t) - α mean_t log(1 - π(y_l,t)), α = `unlikelihood_alpha`, each mean over a row's own tokens.
    A baseline of Rafailov et al. 2023 (arXiv 2305.18290), section 6; the second term is that of Welleck et al. 2019
    (arXiv 1908.04319) with the rejected answer's tokens as the negatives.
    Example: chosen tokens at e^-1, rejected ones at ½, α = 0.5: 1 + 0.5 log 2 = 1.3466.
    """
    # The padding's log-prob is 0, a certain token; -1 keeps the gradient finite before the mask takes it out.
    tokens = mx.where(pairs.rejected.mask > 0, pairs.rejected.tokens, -1.0)
    unlikely = (log_one_minus_exp(tokens) * pairs.rejected.mask).sum(axis=-1) / pairs.rejected.length
    return -pairs.chosen.policy / pairs.chosen.length - config.unlikelihood_alpha * unlikely


def alphapo(logps: mx.array, alpha: float) -> mx.array:
    """AlphaPO's reward of a log-prob, (1 - p^-α) / α, whose limit at α = 0 is log p; any shape.

    Gupta et al. 2025 (arXiv 2501.03884). Example: p = 1/16, α = 0.25: (1 - 2) / 0.25 = -4.
    """
    return logps if alpha == 0 else -mx.expm1(-alpha * logps) / alpha


def sum_reward(logps: mx.array, reference: mx.array, length: mx.array, config: LossConfig) -> mx.array:
    """β log π(y|x), shaped by AlphaPO where asked for: the reward that TRL's CPOTrainer logs. All [R, K]."""
    return config.beta * alphapo(logps, config.alphapo_alpha)


def mean_reward(logps: mx.array, reference: mx.array, length: mx.array, config: LossConfig) -> mx.array:
    """β log π(y|x) / |y|, shaped by AlphaPO where asked for: what TRL logs for SimPO and ORPO. All [R, K]."""
    return config.beta * alphapo(logps / length, config.alphapo_alpha)


def _per_token(pairs: Pairs) -> tuple[mx.array, mx.array]:
    return pairs.chosen.policy / pairs.chosen.length, pairs.rejected.policy / pairs.rejected.length


def _sum_margin(pairs: Pairs, config: LossConfig) -> mx.array:
    alpha = config.alphapo_alpha
    return alphapo(pairs.chosen.policy, alpha) - alphapo(pairs.rejected.policy, alpha)


def _mean_margin(pairs: Pairs, config: LossConfig) -> mx.array:
    chosen, rejected = _per_token(pairs)
    return alphapo(chosen, config.alphapo_alpha) - alphapo(rejected, config.alphapo_alpha)


def _chosen_nll(pairs: Pairs, config: LossConfig) -> mx.array:
    return config.cpo_alpha * token_mean_nll(pairs.chosen.policy, pairs.chosen.length)
