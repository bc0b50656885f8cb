"""What each loss says, in worked arithmetic, and what holds between losses."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_dpo.arrays import LossOutput, TokenLogps
from mlx_dpo.config import LossConfig
from mlx_dpo.losses import LOSSES, compute_loss
from mlx_dpo.losses.numerics import log_one_minus_exp, log_sigmoid
from mlx_dpo.metrics import Sums, averages, batch_metrics

PAIR_RANK = [1.0, 2.0]


def rows_of(answers: list[list[list[float]]]) -> tuple[mx.array, mx.array]:
    """Token log-probs [R, K, C] and their mask from rows of answers of tokens, padded on the right."""
    width = max(len(tokens) for row in answers for tokens in row)
    logps = [[tokens + [0.0] * (width - len(tokens)) for tokens in row] for row in answers]
    mask = [[[1.0] * len(tokens) + [0.0] * (width - len(tokens)) for tokens in row] for row in answers]
    return mx.array(logps), mx.array(mask)


def loss_of(
    kind: str,
    policy: list[list[list[float]]],
    reference: list[list[list[float]]] | None = None,
    rank: list[list[float]] | None = None,
    label: list[float] | None = None,
    **options: Any,
) -> float:
    """The loss of rows of token log-probs under policy and reference; pairs unless ranks say otherwise."""
    logps, mask = rows_of(policy)
    ranks = mx.array(rank) if rank else mx.broadcast_to(mx.array(PAIR_RANK), mask.shape[:2])
    labels = None if label is None else mx.array(label)
    base = None if reference is None else rows_of(reference)[0]
    return compute_loss(TokenLogps(logps), base, mask, ranks, labels, LossConfig(type=kind, **options)).loss.item()


def pair(
    chosen_ratio: float, rejected_ratio: float, chosen_length: int = 1, rejected_length: int = 1
) -> tuple[Any, Any]:
    """Policy and reference of one pair whose log-ratios are these, spread evenly over its tokens."""
    reference = [[[-3.0] * chosen_length, [-2.0] * rejected_length]]
    policy = [
        [
            [-3.0 + chosen_ratio / chosen_length] * chosen_length,
            [-2.0 + rejected_ratio / rejected_length] * rejected_length,
        ]
    ]
    return policy, reference


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


# Rankings


def ranking_loss(rewards: list[float], rank: list[float], beta: float = 1.0) -> float:
    reference = [[[-5.0] for _ in rewards]]
    policy = [[[-5.0 + reward / beta] for reward in rewards]]
    return loss_of("plackett_luce", policy, reference, rank=[rank], beta=beta)


def test_plackett_luce_by_hand() -> None:
    assert ranking_loss([2.0, 2.0, 2.0], [1, 2, 3]) == pytest.approx(math.log(3) + math.log(2), rel=1e-6)
    assert ranking_loss([2.0, 2.0, 2.0], [1, 1, 2]) == pytest.approx(2 * math.log(2), rel=1e-6)


def test_plackett_luce_gives_every_order_its_probability() -> None:
    # By enumeration: the chance of drawing the answers in this order, without replacement, by weight e^reward.
    rewards = [0.3, -1.2, 0.9, 0.0]
    total = 0.0
    for order in itertools.permutations(range(4)):
        drawn, left = 1.0, list(order)
        while left:
            drawn *= math.exp(rewards[left[0]]) / sum(math.exp(rewards[k]) for k in left)
            left = left[1:]
        found = math.exp(-ranking_loss([rewards[k] for k in order], [1, 2, 3, 4]))
        assert found == pytest.approx(drawn, rel=1e-5)
        total += found
    assert total == pytest.approx(1.0, rel=1e-5)


def test_plackett_luce_with_ties_lets_each_answer_compete_with_the_worse_ones_only() -> None:
    rewards, rank = [0.3, -1.2, 0.9, 0.0, 2.0], [1, 2, 2, 3, 3]
    expected = 0.0
    for reward, place in zip(rewards, rank, strict=True):
        worse = sum(math.exp(r) for r, p in zip(rewards, rank, strict=True) if p > place)
        expected -= math.log(math.exp(reward) / (math.exp(reward) + worse))
    assert ranking_loss(rewards, rank) == pytest.approx(expected, rel=1e-6)
    assert ranking_loss([1.0, -2.0, 0.5], [1, 1, 1]) == 0.0


def test_the_ranks_order_counts_not_their_size_and_absent_answers_do_not() -> None:
    plain = ranking_loss([0.3, -1.2, 0.9], [1, 2, 3])
    assert ranking_loss([0.3, -1.2, 0.9], [2, 5, 9]) == plain
    assert ranking_loss([0.3, -1.2, 0.9, 7.0], [1, 2, 3, 0]) == plain


def test_plackett_luce_of_two_answers_is_dpo_to_the_last_bit() -> None:
    random.seed(3)
    policy = [[[random.uniform(-9, 0) for _ in range(5)] for _ in range(2)] for _ in range(32)]
    reference = [[[random.uniform(-9, 0) for _ in range(5)] for _ in range(2)] for _ in range(32)]
    assert loss_of("plackett_luce", policy, reference) == loss_of("sigmoid", policy, reference)


# Unpaired completions


def judged(ratio: float, mismatched: float) -> tuple[list[list[float]], list[list[float]]]:
    """Policy and reference of a row: its completion's log-ratio and that of the mismatched one."""
    return [[-3.0 + ratio], [-4.0 + mismatched]], [[-3.0], [-4.0]]


def kto_of(rows: list[tuple[float, float, float]], kind: str = "kto", **options: Any) -> float:
    policy, reference = zip(*(judged(ratio, mismatched) for ratio, mismatched, _ in rows), strict=True)
    labels = [label for _, _, label in rows]
    return loss_of(kind, list(policy), list(reference), [[1.0, 0.0]] * len(rows), labels, **options)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_kto_measures_from_the_mean_log_ratio_of_mismatched_completions() -> None:
    # z = (2 + 4) / 2 = 3; good with lr 5: 1 - σ(0.1 (5 - 3)); bad with lr 1: 1 - σ(0.1 (3 - 1)), twice
    expected = (1 - sigma(0.2) + 2 * (1 - sigma(0.2))) / 2
    found = kto_of([(5.0, 2.0, 1.0), (1.0, 4.0, -1.0)], beta=0.1, undesirable_weight=2.0)
    assert found == pytest.approx(expected, rel=1e-5)


def test_kto_never_measures_from_below_zero() -> None:
    assert kto_of([(10.0, -6.0, 1.0)], beta=0.1) == pytest.approx(0.2689, abs=5e-5)


def test_ktos_estimate_is_reported_and_is_not_what_is_trained() -> None:
    policy, reference = judged(5.0, 2.0)
    logps, mask = rows_of([policy])
    base, rank, label = rows_of([reference])[0], mx.array([[1.0, 0.0]]), mx.array([1.0])

    def loss(logps: mx.array) -> Any:
        return compute_loss(TokenLogps(logps), base, mask, rank, label, LossConfig(type="kto"))

    output, gradient = mx.value_and_grad(loss)(logps)
    assert output.kl.item() == pytest.approx(2.0, rel=1e-6)
    assert gradient[0, 1].item() == 0.0
    assert gradient[0, 0].item() < 0.0


def test_kto_without_mismatched_completions_is_refused() -> None:
    with pytest.raises(ValueError, match="mismatched completion"):
        loss_of("kto", [[[-1.0]]], [[[-1.0]]], [[1.0]], [1.0])


def test_unpaired_apo_zero_by_hand_with_or_without_the_second_answer() -> None:
    expected = 2 * 0.7311
    assert kto_of([(10.0, 5.0, -1.0)], "apo_zero_unpaired", beta=0.1, undesirable_weight=2.0) == pytest.approx(
        expected, abs=1e-4
    )
    alone = loss_of("apo_zero_unpaired", [[[-3.0]]], [[[-13.0]]], [[1.0]], [-1.0], beta=0.1, undesirable_weight=2.0)
    assert alone == pytest.approx(expected, abs=1e-4)


# What the trainer relies on


def random_batch(
    kind: str, rows: int = 4, seed: int = 0
) -> tuple[TokenLogps, mx.array, mx.array, mx.array, mx.array | None]:
    """Policy, reference, mask, rank and label of rows that a loss of this kind takes."""
    answers = {"pair": 2, "ranking": 4, "unpaired": 2, "demonstration": 1}[kind]
    chance = random.Random(seed)

    def tokens(length: int) -> list[float]:
        return [chance.uniform(-4, 0) for _ in range(length)]

    lengths = [[chance.randint(2, 6) for _ in range(answers)] for _ in range(rows)]
    policy, mask = rows_of([[tokens(length) for length in row] for row in lengths])
    reference, _ = rows_of([[tokens(length) for length in row] for row in lengths])
    ranks = {"pair": [1.0, 2.0], "ranking": [1.0, 2.0, 2.0, 3.0], "unpaired": [1.0, 0.0], "demonstration": [1.0]}[kind]
    rank = mx.broadcast_to(mx.array(ranks), (rows, answers))
    label = mx.where(mx.arange(rows) % 2 == 0, 1.0, -1.0) if kind == "unpaired" else None
    return TokenLogps(policy, log_sum_p2=policy * 0.5), reference, mask, rank, label


def config_of(name: str) -> LossConfig:
    return LossConfig(type=name, label_smoothing=0.1 if "label_smoothing" in LOSSES[name].options else 0.0)


@pytest.mark.parametrize("name", ["sigmoid", "plackett_luce", "kto"])  # one a view: compiling takes seconds on a CPU
def test_compiled_or_not_a_loss_its_gradient_and_the_metrics_are_the_same(name: str) -> None:
    kind = LOSSES[name].kind
    policy, reference, mask, rank, label = random_batch(kind)

    def objective(logps: mx.array) -> tuple[LossOutput, Sums]:
        now = policy._replace(logps=logps)
        output = compute_loss(now, reference, mask, rank, label, config_of(name))
        return output, batch_metrics(output, now, reference, mask, rank, label, kind)

    def loss_first(logps: mx.array) -> tuple[mx.array, LossOutput, Sums]:
        output, sums = objective(logps)
        return output.loss, output, sums

    (loss, _, sums), gradient = mx.value_and_grad(loss_first)(policy.logps)
    (again, _, sums_again), gradient_again = mx.compile(mx.value_and_grad(loss_first))(policy.logps)
    assert again.item() == pytest.approx(loss.item(), rel=1e-5)
    assert mx.isfinite(gradient).all()
    assert mx.allclose(gradient_again, gradient, rtol=1e-4, atol=1e-6)
    assert averages([sums_again]) == pytest.approx(averages([sums]), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_padding_changes_nothing(name: str) -> None:
    policy, reference, mask, rank, label = random_batch(LOSSES[name].kind)
    wider = [mx.pad(array, [(0, 0), (0, 0), (0, 5)]) for array in (policy.logps, reference, mask)]
    plain = compute_loss(policy, reference, mask, rank, label, config_of(name)).loss
    padded = compute_loss(TokenLogps(wider[0]), wider[1], wider[2], rank, label, config_of(name)).loss
    assert padded.item() == pytest.approx(plain.item(), rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_separable_loss_is_the_mean_of_its_micro_batches_and_the_others_are_not(name: str) -> None:
    policy, reference, mask, rank, label = random_batch(LOSSES[name].kind)

    def part(start: int, stop: int) -> float:
        rows = slice(start, stop)
        labels = None if label is None else label[rows]
        logps = TokenLogps(policy.logps[rows])
        return compute_loss(logps, reference[rows], mask[rows], rank[rows], labels, config_of(name)).loss.item()

    together, apart = part(0, 4), (part(0, 2) + part(2, 4)) / 2
    assert (together == pytest.approx(apart, rel=1e-6)) is LOSSES[name].row_separable


def test_sft_micro_batches_add_up_when_weighted_by_their_tokens() -> None:
    policy, reference, mask, rank, _ = random_batch("demonstration")
    assert LOSSES["sft"].mean_over == "tokens"
    weighted = 0.0
    for rows in (slice(0, 1), slice(1, 4)):
        output = compute_loss(
            TokenLogps(policy.logps[rows]), None, mask[rows], rank[rows], None, LossConfig(type="sft")
        )
        weighted += output.loss.item() * mask[rows].sum().item()
    whole = compute_loss(policy, reference, mask, rank, None, LossConfig(type="sft")).loss.item()
    assert weighted / mask.sum().item() == pytest.approx(whole, rel=1e-6)


def test_a_module_trains_through_the_loss() -> None:
    policy, reference, mask, rank, _ = random_batch("pair")

    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = mx.zeros((2, 1))

    def loss(model: nn.Module) -> Any:
        logps = TokenLogps((policy.logps + model.shift) * mask)
        return compute_loss(logps, reference, mask, rank, None, LossConfig())

    model = Shift()
    output, gradient = nn.value_and_grad(model, loss)(model)
    assert output.rewards.shape == (4, 2)
    assert gradient["shift"][0].item() < 0 < gradient["shift"][1].item()


def test_a_pair_loss_refuses_other_than_two_answers_and_an_unpaired_one_wants_labels() -> None:
    with pytest.raises(ValueError, match="compares two answers"):
        loss_of("sigmoid", [[[-1.0], [-2.0], [-3.0]]], rank=[[1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match="needs a label"):
        loss_of("kto", [[[-1.0], [-2.0]]])
    with pytest.raises(ValueError, match="log_sum_p2"):
        loss_of("sigmoid", [[[-1.0], [-2.0]]], use_weighting=True)


@pytest.mark.parametrize("loss", ["sigmoid", "discopop", "cdpo", "exo_pair", "plackett_luce", "nca_pair"])
@pytest.mark.parametrize("ratio", [-1e4, -900.0, 900.0, 1e4])
def test_log_ratios_far_out_give_finite_losses_and_gradients(loss: str, ratio: float) -> None:
    policy, reference = pair(ratio, 0.0)
    logps, mask = rows_of(policy)
    config = LossConfig(type=loss, beta=0.5, label_smoothing=0.1)

    def value(logps: mx.array) -> mx.array:
        return compute_loss(TokenLogps(logps), rows_of(reference)[0], mask, mx.array([PAIR_RANK]), None, config).loss

    found, gradient = mx.value_and_grad(value)(logps)
    assert mx.isfinite(found)
    assert mx.isfinite(gradient).all()


def test_certain_tokens_leave_orpo_and_unlikelihood_finite() -> None:
    for loss in ("orpo", "unlikelihood"):
        logps, mask = rows_of([[[0.0, 0.0], [0.0, 0.0, -1e-9]]])

        def value(logps: mx.array, mask: mx.array = mask, loss: str = loss) -> mx.array:
            return compute_loss(TokenLogps(logps), None, mask, mx.array([PAIR_RANK]), None, LossConfig(type=loss)).loss

        found, gradient = mx.value_and_grad(value)(logps)
        assert mx.isfinite(found)
        assert mx.isfinite(gradient).all()


def test_log_sigmoid_and_log_one_minus_exp_are_right_over_their_range() -> None:
    for x in (-300.0, -20.0, -1.0, 0.0, 1.0, 20.0, 300.0):
        expected = x if x < -100 else -math.log1p(math.exp(-x))
        assert log_sigmoid(mx.array(x)).item() == pytest.approx(expected, rel=1e-6, abs=1e-12)
    for x in (-50.0, -5.0, -0.7, -0.69, -0.1, -1e-3, -1e-5):
        assert log_one_minus_exp(mx.array(x)).item() == pytest.approx(math.log(-math.expm1(x)), rel=1e-5)
