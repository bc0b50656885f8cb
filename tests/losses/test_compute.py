"""What the trainer relies on: compilation, padding, micro-batches, and numbers that stay finite."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_dpo.config import LossConfig
from mlx_dpo.losses.compute import compute_loss
from mlx_dpo.losses.metrics import Sums, averages, batch_metrics
from mlx_dpo.losses.table import LOSSES
from mlx_dpo.types import LossOutput, TokenLogps
from support.loss_rows import PAIR_RANK, loss_of, pair, random_batch, rows_of


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
    assert (together == pytest.approx(apart, rel=1e-6)) is (LOSSES[name].mean_over == "rows")


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
