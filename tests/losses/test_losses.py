"""What each loss of pairs and demonstrations says, in worked arithmetic, and what holds between losses."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import pytest

from mlx_dpo.config import LossConfig
from mlx_dpo.losses import LOSSES, compute_loss
from mlx_dpo.types import TokenLogps
from support.loss_rows import PAIR_RANK, loss_of, pair, rows_of

LOG2 = math.log(2)

WORKED = [
    # loss, (lr_w, lr_l, |y_w|, |y_l|), options, loss by hand
    ("sigmoid", (4, -1), {"beta": 0.1}, 0.4741),
    ("sigmoid", (0, 0), {"beta": 0.1}, LOG2),
    ("hinge", (4, -1), {"beta": 0.1}, 0.5),
    ("hinge", (14, -1), {"beta": 0.1}, 0.0),
    ("ipo", (12, 6, 4, 3), {"beta": 1.0}, 0.25),
    ("exo_pair", (3, 3), {"label_smoothing": 0.1}, 0.5108),
    ("nca_pair", (10, -10), {"beta": 0.1}, 1.1265),
    ("robust", (4, -1), {"beta": 0.1, "label_smoothing": 0.1}, 0.4116),
    ("cdpo", (4, -1), {"beta": 0.1, "label_smoothing": 0.1}, 0.5241),
    ("bco_pair", (10, -10), {"beta": 0.1}, 0.6265),
    ("sppo_hard", (4, -3), {"beta": 0.1}, 5.0),
    ("apo_zero", (10, -10), {"beta": 0.1}, 0.5379),
    ("apo_down", (10, -10), {"beta": 0.1}, 0.8503),
    ("discopop", (2, 2), {"beta": 0.1}, 0.8466),
    ("sigmoid_norm", (12, 6, 4, 3), {"beta": 0.5}, 0.4741),
    ("dpop", (-1, -6), {"beta": 0.1, "dpop_lambda": 2.0}, 0.5544),
    ("dpop", (1, -4), {"beta": 0.1, "dpop_lambda": 2.0}, 0.4741),  # above its reference: plain DPO
    # -log σ(β Δ) with f'(t) = 1 - 1/t: Δ = (1 - 1/2) - (1 - 2) = 1.5, β = 2
    ("sigmoid", (LOG2, -LOG2), {"beta": 2.0, "f_divergence_type": "forward_kl"}, 0.0486),
    # f'(t) = log(2t / (1 + t)): Δ = log(4/3) - log(2/3) = log 2, β = 1: -log(2/3)
    ("sigmoid", (LOG2, -LOG2), {"beta": 1.0, "f_divergence_type": "js_divergence"}, 0.4055),
    # f'(t) = (t^(α-1) - 1)/(α - 1), α = 2: t - 1: Δ = 2 - 1/2, β = 2
    (
        "sigmoid",
        (LOG2, -LOG2),
        {"beta": 2.0, "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 2.0},
        0.0486,
    ),
]


@pytest.mark.parametrize(("loss", "ratios", "options", "expected"), WORKED)
def test_against_a_reference_by_hand(
    loss: str, ratios: tuple[float, ...], options: dict[str, Any], expected: float
) -> None:
    policy, reference = pair(*ratios)  # type: ignore[arg-type]
    assert loss_of(loss, policy, reference, **options) == pytest.approx(expected, abs=6e-5)


REFERENCE_FREE = [
    # loss, chosen tokens, rejected tokens, options, loss by hand
    ("cpo", [-2.0, -2.0], [-4.0, -5.0], {"beta": 0.1}, 0.4741 + 2),
    ("cpo", [-2.0, -2.0], [-4.0, -5.0], {"beta": 0.1, "label_smoothing": 0.1, "cpo_alpha": 0.5}, 0.5241 + 1),
    ("cpo_hinge", [-2.0, -2.0], [-4.0, -5.0], {"beta": 0.1}, 0.5 + 2),
    ("cpo_ipo", [-1.0, -1.0], [-3.0], {"beta": 0.5}, 1 + 1),
    ("simpo", [-1.0, -1.0], [-3.0], {"beta": 0.5, "simpo_gamma": 0.5}, 0.4741),
    # AlphaPO, α = 0.25: p = 1 gives 0, p = 1/16 gives -4; β = 0.25, γ = 0.5
    ("simpo", [0.0], [-4 * LOG2], {"beta": 0.25, "simpo_gamma": 0.5, "alphapo_alpha": 0.25}, 0.4741),
    ("orpo", [math.log(0.8)], [-LOG2, -LOG2], {"beta": 0.1}, 0.2455),
    ("unlikelihood", [-1.0, -1.0, -1.0], [-LOG2], {"unlikelihood_alpha": 0.5}, 1.3466),
    ("sigmoid", [-2.0, -2.0], [-4.0, -5.0], {"beta": 0.1}, 0.4741),
]


@pytest.mark.parametrize(("loss", "chosen", "rejected", "options", "expected"), REFERENCE_FREE)
def test_without_a_reference_by_hand(
    loss: str, chosen: list[float], rejected: list[float], options: dict[str, Any], expected: float
) -> None:
    assert loss_of(loss, [[chosen, rejected]], **options) == pytest.approx(expected, abs=6e-5)


def test_every_loss_has_a_number_by_hand() -> None:
    elsewhere = {
        "sft",
        "aot",
        "aot_unpaired",
        "plackett_luce",
        "kto",
        "apo_zero_unpaired",
    }  # in tests of their own below
    assert {case[0] for case in (*WORKED, *REFERENCE_FREE)} | elsewhere == set(LOSSES)


def test_every_loss_says_in_one_line_what_it_is_for_and_where_it_comes_from() -> None:
    for name, spec in LOSSES.items():
        intent, _, rest = (spec.fn.__doc__ or "").partition("\n\n")
        assert intent, name
        assert "\n" not in intent, name
        assert "arXiv" in rest or "TRL" in rest or "Mitchell" in rest, name
        assert "Example:" in rest, name


def test_sft_is_the_mean_over_the_batchs_tokens() -> None:
    assert loss_of("sft", [[[-1.0, -2.0, -3.0]], [[-2.0]]], rank=[[1.0], [1.0]]) == pytest.approx(8 / 4)


def test_sft_on_pairs_is_preferred_ft_and_sees_the_chosen_answer_alone() -> None:
    assert loss_of("sft", [[[-1.0, -3.0], [-9.0, -9.0, -9.0]]]) == pytest.approx(2.0)


def test_aot_pairs_the_sorted_differences() -> None:
    # differences under the policy 3, 1, under the reference 0, 2: sorted apart 1, 1; row by row 3, -1
    policy, reference = [[[-1.0], [-4.0]], [[-1.0], [-2.0]]], [[[-1.0], [-1.0]], [[-1.0], [-3.0]]]
    assert loss_of("aot", policy, reference, beta=1.0) == pytest.approx(-math.log(1 / (1 + math.exp(-1))))
    rows = -(math.log(1 / (1 + math.exp(-3))) + math.log(1 / (1 + math.exp(1)))) / 2
    assert loss_of("sigmoid", policy, reference, beta=1.0) == pytest.approx(rows)


def test_aot_unpaired_pairs_the_sorted_log_ratios() -> None:
    policy, reference = (
        [[[-1.0], [-5.0]], [[-3.0], [-3.0]]],
        [[[-4.0], [-5.0]], [[-4.0], [-5.0]]],
    )  # lr_w 3, 1; lr_l 0, 2
    smoothed = 0.9 * math.log(1 + math.exp(-1)) + 0.1 * math.log(1 + math.exp(1))
    found = loss_of("aot_unpaired", policy, reference, beta=1.0, label_smoothing=0.1)
    assert found == pytest.approx(smoothed, rel=1e-6)


def test_robust_dpo_is_unbiased_under_flipped_labels() -> None:
    # Averaged over labels of which a share ε is flipped it is the clean loss: that is what it is for.
    policy, reference = pair(4, -1)
    (chosen, rejected), (chosen_base, rejected_base) = policy[0], reference[0]
    flipped_policy, flipped_reference = [[rejected, chosen]], [[rejected_base, chosen_base]]
    options = {"beta": 0.1, "label_smoothing": 0.2}
    noisy = 0.8 * loss_of("robust", policy, reference, **options) + 0.2 * loss_of(
        "robust", flipped_policy, flipped_reference, **options
    )
    assert noisy == pytest.approx(loss_of("sigmoid", policy, reference, beta=0.1), rel=1e-6)


def test_conservative_dpo_is_least_where_the_model_is_as_sure_as_the_labels() -> None:
    # σ(βΔ) = 1 - ε = 0.9 at βΔ = log 9
    best = math.log(9) / 0.1
    losses = [loss_of("cdpo", *pair(margin, 0), beta=0.1, label_smoothing=0.1) for margin in (best - 1, best, best + 1)]
    assert losses[1] < losses[0]
    assert losses[1] < losses[2]


def test_alpha_divergence_runs_from_forward_to_reverse_kl() -> None:
    policy, reference = pair(0.7, -0.4)

    def at(alpha: float) -> float:
        options = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha}
        return loss_of("sigmoid", policy, reference, beta=1.0, **options)

    assert at(0.0) == pytest.approx(loss_of("sigmoid", policy, reference, beta=1.0, f_divergence_type="forward_kl"))
    assert at(1.0) == pytest.approx(loss_of("sigmoid", policy, reference, beta=1.0))
    assert at(1.0001) == pytest.approx(at(1.0), rel=1e-3)


def test_where_policy_and_reference_agree_dpo_starts_at_log_2() -> None:
    answers = [[[-1.5, -0.25], [-3.0]], [[-0.5], [-2.0, -2.5]]]
    assert loss_of("sigmoid", answers, answers) == pytest.approx(LOG2, rel=1e-7)


@pytest.mark.parametrize(("alpha", "chosen", "rejected"), [(1.0, -10.0, -5.0), (0.5, -7.5, -5.0), (0.0, -5.0, -5.0)])
def test_ld_dpo_discounts_the_tokens_that_only_the_longer_answer_has(
    alpha: float, chosen: float, rejected: float
) -> None:
    # chosen has 4 tokens of -2.5, rejected 2 of -2.5: two are shared, two count α times; the reference is cut alike
    policy, reference = [[[-2.5] * 4, [-2.5] * 2]], [[[-1.0] * 4, [-1.0] * 2]]
    expected = math.log(1 + math.exp(-0.1 * ((chosen - rejected) - (-2.0 - 2.0 * alpha + 2.0))))
    assert loss_of("sigmoid", policy, reference, beta=0.1, ld_alpha=alpha) == pytest.approx(expected, rel=1e-6)


def test_wpo_weighs_each_pair_by_its_policys_likelihood() -> None:
    # log p - log Σp² per token: chosen (-1 + 0.5), (-2 + 0.5), mean -1; rejected -3 + 1 = -2: weight e^-3
    logps, mask = rows_of([[[-1.0, -2.0], [-3.0]]])
    agree = mx.array([[[-0.5, -0.5], [-1.0, 0.0]]])
    rank = mx.array([PAIR_RANK])

    def loss(logps: mx.array, weighting: bool) -> mx.array:
        config = LossConfig(type="sigmoid", use_weighting=weighting)
        return compute_loss(
            TokenLogps(logps, log_sum_p2=agree), mx.zeros_like(logps) - 1, mask, rank, None, config
        ).loss

    plain, plain_gradient = mx.value_and_grad(loss)(logps, False)
    weighted, weighted_gradient = mx.value_and_grad(loss)(logps, True)
    assert weighted.item() == pytest.approx(math.exp(-3) * plain.item(), rel=1e-6)
    assert mx.allclose(
        weighted_gradient, math.exp(-3) * plain_gradient, rtol=1e-5, atol=0
    )  # the weight has no gradient


def test_a_mix_is_the_weighted_sum_of_its_losses() -> None:
    policy, reference = pair(4, -1, 3, 2)
    parts = {name: loss_of(name, policy, reference) for name in ("sigmoid", "bco_pair", "sft")}
    expected = 0.8 * parts["sigmoid"] + 0.2 * parts["bco_pair"] + parts["sft"]
    assert loss_of("sigmoid:0.8,bco_pair:0.2,sft:1.0", policy, reference) == pytest.approx(expected, rel=1e-6)


def test_weighting_and_length_discount_leave_the_sft_term_of_a_mix_alone() -> None:
    logps, mask = rows_of([[[-1.0, -2.0, -4.0], [-3.0]]])
    policy, rank = TokenLogps(logps, log_sum_p2=mx.full(logps.shape, -0.5)), mx.array([PAIR_RANK])

    def loss(kind: str) -> float:
        config = LossConfig(type=kind, use_weighting=True, ld_alpha=0.0)
        return compute_loss(policy, mx.zeros_like(logps), mask, rank, None, config).loss.item()

    assert loss("sigmoid:1,sft:1") - loss("sigmoid") == pytest.approx(7 / 3, rel=1e-5)
