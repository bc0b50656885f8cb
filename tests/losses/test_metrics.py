"""What the metrics mean: TRL's definitions, averages that are exact, and the statistics by hand or by brute force."""

from __future__ import annotations

import itertools
import math
import random

import mlx.core as mx
import pytest

from mlx_dpo.config import LossConfig
from mlx_dpo.losses.compute import compute_loss
from mlx_dpo.losses.metrics import (
    Sums,
    averages,
    batch_metrics,
    kendall_tau,
    kl_k2,
    ranked_accuracy,
    roles,
    wilson_interval,
)
from mlx_dpo.types import Kind, TokenLogps
from support.loss_rows import random_batch, rows_of


def metrics_of(
    policy: list[list[list[float]]],
    reference: list[list[list[float]]] | None,
    rank: list[list[float]],
    kind: Kind,
    config: LossConfig,
    label: list[float] | None = None,
    **measured: mx.array,
) -> dict[str, float]:
    """The metrics of one batch of token log-probs."""
    logps, mask = rows_of(policy)
    base = None if reference is None else rows_of(reference)[0]
    labels = None if label is None else mx.array(label)
    now = TokenLogps(logps, **measured)
    output = compute_loss(now, base, mask, mx.array(rank), labels, config)
    return averages([batch_metrics(output, now, base, mask, mx.array(rank), labels, kind)])


def test_pairs_have_trls_metrics() -> None:
    # lr 4 and -1 in one pair, 0 and 2 in the other; β = 0.1
    policy = [[[-1.0, -2.0], [-6.0]], [[-3.0], [-1.0, -1.0]]]
    reference = [[[-3.0, -4.0], [-5.0]], [[-3.0], [-2.0, -2.0]]]
    found = metrics_of(
        policy,
        reference,
        [[1, 2], [1, 2]],
        "pair",
        LossConfig(),
        entropy=mx.array([[[1.0, 2.0], [3.0, 9.0]], [[4.0, 9.0], [5.0, 6.0]]]),
        mean_logit=mx.array([[[1.0, 2.0], [3.0, 9.0]], [[6.0, 9.0], [5.0, 7.0]]]),
        correct=mx.array([[[1.0, 0.0], [1.0, 1.0]], [[0.0, 1.0], [1.0, 1.0]]]),
    )
    expected = {
        "loss": (math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(0.2))) / 2,
        "rewards/chosen": 0.2,
        "rewards/rejected": 0.05,
        "rewards/margins": 0.15,
        "rewards/accuracies": 0.5,
        "logps/chosen": -3.0,
        "logps/rejected": -4.0,
        "logits/chosen": (1 + 2 + 6) / 3,
        "logits/rejected": (3 + 5 + 7) / 3,
        "entropy": (1 + 2 + 3 + 4 + 5 + 6) / 6,
        "mean_token_accuracy": 1 / 3,
        # k2 of the tokens' log-ratios 2, 2, -1, 0, 1, 1: (2 + 2 + 1/2 + 0 + 1/2 + 1/2) over 4 sequences, 6 tokens
        "kl/sequence": 5.5 / 4,
        "kl/token": 5.5 / 6,
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_what_costs_more_is_there_only_when_it_was_measured_and_rewards_only_when_there_are_any() -> None:
    found = metrics_of([[[-1.0], [-2.0]]], None, [[1, 2]], "pair", LossConfig(type="sft"))
    assert set(found) == {"loss", "logps/chosen", "logps/rejected"}


def test_a_tie_counts_as_wrong() -> None:
    same = [[[-1.0], [-1.0]]]
    assert metrics_of(same, same, [[1, 2]], "pair", LossConfig())["rewards/accuracies"] == 0.0


def test_accuracy_is_of_pairs_and_not_of_their_means() -> None:
    # One pair wrong by 10, two right by 1: the means are ordered wrongly, two of three pairs rightly.
    policy = [[[-11.0], [-1.0]], [[-1.0], [-2.0]], [[-1.0], [-2.0]]]
    zero = [[[0.0], [0.0]]] * 3
    found = metrics_of(policy, zero, [[1, 2]] * 3, "pair", LossConfig())
    assert found["rewards/accuracies"] == pytest.approx(2 / 3)
    assert found["rewards/margins"] < 0


def test_reference_free_rewards_are_those_that_trl_logs() -> None:
    policy = [[[-1.0, -3.0], [-4.0]]]
    cpo = metrics_of(policy, None, [[1, 2]], "pair", LossConfig(type="cpo"))
    assert cpo["rewards/chosen"] == pytest.approx(0.1 * -4)
    simpo = metrics_of(policy, None, [[1, 2]], "pair", LossConfig(type="simpo", beta=2.0))
    assert simpo["rewards/chosen"] == pytest.approx(2 * -2)
    alphapo = metrics_of(policy, None, [[1, 2]], "pair", LossConfig(type="simpo", beta=2.0, alphapo_alpha=0.25))
    assert alphapo["rewards/chosen"] == pytest.approx(2 * (1 - math.exp(0.25 * 2)) / 0.25)


def test_a_mixs_rewards_are_those_of_its_first_preference_loss() -> None:
    found = metrics_of([[[-1.0, -3.0], [-4.0]]], None, [[1, 2]], "pair", LossConfig(type="sft:1,simpo:1", beta=2.0))
    assert found["rewards/chosen"] == pytest.approx(2 * -2)


def test_rankings_show_their_best_and_worst_answers() -> None:
    # rewards 4, 1, 2, 3 in ranks 1, 1, 2, 3; a second row has two answers, ordered wrongly
    policy = [[[4.0], [1.0], [2.0], [3.0]], [[0.0], [5.0], [0.0], [0.0]]]
    zero = [[[0.0]] * 4] * 2
    config = LossConfig(type="plackett_luce", beta=1.0)
    found = metrics_of(policy, zero, [[1, 1, 2, 3], [1, 2, 0, 0]], "ranking", config)
    assert found["rewards/chosen"] == pytest.approx((4 + 1 + 0) / 3)
    assert found["rewards/rejected"] == pytest.approx((3 + 5) / 2)
    # of the first row's 5 unequal pairs 4>2 and 4>3 are right, 1>2, 1>3 and 2>3 are not; of the second's none
    assert found["rewards/accuracies"] == pytest.approx(2 / 6)
    # τ-b: (2 - 3) / √(5 · 6) and -1
    assert found["rewards/kendall_tau"] == pytest.approx((-1 / math.sqrt(30) - 1) / 2)


def test_unpaired_rows_show_good_and_bad_ones_and_the_estimated_kl() -> None:
    policy = [[[-1.0], [-1.0]], [[-6.0], [-5.0]], [[-2.0], [-3.0]]]
    reference = [[[-3.0], [-3.0]], [[-5.0], [-5.0]], [[-2.0], [-4.0]]]  # lr 2, -1, 0; mismatched 2, 0, 1
    rank = [[1, 0]] * 3
    found = metrics_of(policy, reference, rank, "unpaired", LossConfig(type="kto"), label=[1.0, -1.0, -1.0])
    assert found["rewards/chosen"] == pytest.approx(0.2)
    assert found["rewards/rejected"] == pytest.approx(-0.05)
    assert found["rewards/margins"] == pytest.approx(0.25)
    assert found["logps/rejected"] == pytest.approx(-4.0)
    assert found["kl"] == pytest.approx(1.0)
    assert found["kl/token"] == pytest.approx((2 + 0.5 + 0) / 3)  # the mismatched completions are not the rows' own
    assert "rewards/accuracies" not in found


def test_a_batch_of_good_rows_alone_has_no_rejected_metrics() -> None:
    found = metrics_of([[[-1.0]]], [[[-2.0]]], [[1]], "unpaired", LossConfig(type="apo_zero_unpaired"), label=[1.0])
    assert "rewards/chosen" in found
    assert not {"rewards/rejected", "rewards/margins", "logps/rejected"} & set(found)


def test_demonstrations_have_no_rejected_side() -> None:
    found = metrics_of([[[-1.0, -3.0]]], None, [[1]], "demonstration", LossConfig(type="sft"))
    assert found == pytest.approx({"loss": 2.0, "logps/chosen": -4.0})


def test_micro_batches_of_unequal_size_average_to_the_whole_batchs_metrics() -> None:
    policy, reference, mask, rank, _ = random_batch("ranking", rows=7)
    policy = policy._replace(entropy=-policy.logps, mean_logit=policy.logps**2, correct=mask)

    def part(start: int, stop: int) -> Sums:
        rows = slice(start, stop)
        now = TokenLogps(*(None if values is None else values[rows] for values in policy))
        output = compute_loss(now, reference[rows], mask[rows], rank[rows], None, LossConfig(type="plackett_luce"))
        return batch_metrics(output, now, reference[rows], mask[rows], rank[rows], None, "ranking")

    assert averages([part(0, 1), part(1, 3), part(3, 7)]) == pytest.approx(averages([part(0, 7)]), rel=1e-5)


def test_metrics_have_no_gradient() -> None:
    policy, reference, mask, rank, _ = random_batch("pair")

    def reward(logps: mx.array) -> mx.array:
        output = compute_loss(TokenLogps(logps), reference, mask, rank, None, LossConfig())
        sums = batch_metrics(output, TokenLogps(logps), reference, mask, rank, None, "pair")
        return sum(mean.total for mean in sums.values())  # type: ignore[return-value]

    assert mx.abs(mx.grad(reward)(policy.logps)).max().item() == 0.0


def test_who_is_chosen_and_rejected() -> None:
    chosen, rejected = roles(mx.array([[1.0, 2, 2, 0], [3, 1, 1, 2], [1, 1, 1, 1]]), None)
    assert chosen.tolist() == [[1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]]
    assert rejected.tolist() == [[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    good, bad = roles(mx.array([[1.0, 0.0], [1.0, 0.0]]), mx.array([1.0, -1.0]))
    assert good.tolist() == [[1, 0], [0, 0]]
    assert bad.tolist() == [[0, 0], [1, 0]]


def brute_tau_b(rewards: list[float], ranks: list[float]) -> float | None:
    """By the definition, over all pairs of present answers."""
    answers = [(reward, rank) for reward, rank in zip(rewards, ranks, strict=True) if rank > 0]
    concordant = discordant = tied_reward = tied_rank = pairs = 0
    for (reward, rank), (other, place) in itertools.combinations(answers, 2):
        pairs += 1
        tied_reward += reward == other
        tied_rank += rank == place
        agreement = (reward - other) * (place - rank)
        concordant += agreement > 0
        discordant += agreement < 0
    scale = math.sqrt((pairs - tied_rank) * (pairs - tied_reward))
    return (concordant - discordant) / scale if scale else None


def test_kendalls_tau_is_its_definition_with_ties_and_absent_answers() -> None:
    chance = random.Random(5)
    for _ in range(50):
        ranks = [float(chance.randint(0, 3)) for _ in range(5)]
        rewards = [float(chance.randint(-2, 2)) for _ in range(5)]
        tau, defined = kendall_tau(mx.array([rewards]), mx.array([ranks]))
        expected = brute_tau_b(rewards, ranks)
        assert bool(defined.item()) is (expected is not None)
        assert tau.item() == pytest.approx(expected or 0.0, abs=1e-6)


def test_kendalls_tau_by_hand() -> None:
    tau, _ = kendall_tau(mx.array([[3.0, 1.0, 2.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]), mx.array([[1.0, 2.0, 3.0]] * 3))
    assert tau.tolist() == pytest.approx([1 / 3, 1.0, -1.0])


def test_of_two_answers_kendalls_tau_is_twice_the_accuracy_less_one() -> None:
    rewards, rank = mx.array([[1.0, 0.0], [2.0, 5.0], [3.0, 1.0]]), mx.array([[1.0, 2.0]] * 3)
    accuracy = ranked_accuracy(rewards, rank)
    tau, _ = kendall_tau(rewards, rank)
    assert tau.mean().item() == pytest.approx(2 * accuracy.total.item() / accuracy.number.item() - 1)


def test_near_the_reference_k2_is_the_kl_whatever_the_text() -> None:
    policy = [0.52, 0.29, 0.19]
    reference = [0.5, 0.3, 0.2]
    exact = sum(p * math.log(p / q) for p, q in zip(policy, reference, strict=True))
    log_ratio = mx.log(mx.array(policy) / mx.array(reference))
    for text in (policy, reference):
        assert (mx.array(text) * kl_k2(log_ratio)).sum().item() == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),  # z²/(n + z²) = 3.8415 / 13.8415
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilsons_interval(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=1e-4)


def test_wilsons_interval_are_the_shares_that_the_trials_do_not_refute() -> None:
    # Its ends solve |p̂ - p| = z √(p (1 - p) / n).
    for end in wilson_interval(13, 40):
        assert abs(13 / 40 - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / 40), rel=1e-6)


@pytest.mark.parametrize(("successes", "n"), [(-1, 10), (11, 10), (0, -1)])
def test_impossible_counts_have_no_interval(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="trials"):
        wilson_interval(successes, n)
