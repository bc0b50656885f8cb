"""Plackett-Luce over rankings, by enumeration and by hand."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from support.loss_rows import loss_of


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
