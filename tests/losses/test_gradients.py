"""Every loss's gradient against a numerical derivative, and DPO's as its paper writes it."""

from __future__ import annotations

import random
from typing import Any

import mlx.core as mx
import pytest

from mlx_dpo.config import LossConfig
from mlx_dpo.losses.compute import compute_loss
from mlx_dpo.losses.table import LOSSES
from mlx_dpo.types import Kind, TokenLogps

STEP = 0.05  # wide, with four points: in float64 too MLX's exp is right to 1e-7 only
ROWS = 3

OPTIONS: dict[str, dict[str, Any]] = {
    "exo_pair": {"label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.1},
    "cdpo": {"label_smoothing": 0.1},
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {"label_smoothing": 0.1},
    "cpo": {"label_smoothing": 0.1},
    "simpo": {"label_smoothing": 0.1, "alphapo_alpha": 0.25},
    "discopop": {"discopop_tau": 0.2},
    "dpop": {"dpop_lambda": 2.0},
    "kto": {"undesirable_weight": 2.0},
}

CASES = [
    *((name, OPTIONS.get(name, {})) for name in LOSSES),
    *(
        ("sigmoid", {"f_divergence_type": divergence, "f_alpha_divergence_coef": alpha})
        for divergence, alpha in (
            ("forward_kl", 0.5),
            ("js_divergence", 0.5),
            ("alpha_divergence", 0.5),
            ("alpha_divergence", 2.0),
        )
    ),
    ("discopop", {"f_divergence_type": "forward_kl"}),
    ("sigmoid", {"ld_alpha": 0.3}),
    ("sigmoid:0.8,bco_pair:0.2,sft:1.0", {}),
]


def float64_batch(kind: Kind) -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array | None]:
    """Policy and reference token log-probs, mask, rank and label of three rows with answers of unequal length."""
    chance = random.Random(7)
    ranks = {"pair": [1, 2], "ranking": [1, 2, 2, 3], "unpaired": [1, 0], "demonstration": [1]}[kind]
    lengths = [[chance.randint(1, 4) for _ in ranks] for _ in range(ROWS)]

    def array(value: Any) -> mx.array:
        return mx.array(value, dtype=mx.float64)

    def tokens(low: float, high: float) -> mx.array:
        return array(
            [[[chance.uniform(low, high) if c < n else 0.0 for c in range(4)] for n in row] for row in lengths]
        )

    mask = array([[[float(c < n) for c in range(4)] for n in row] for row in lengths])
    label = array([1.0, -1.0, 1.0]) if kind == "unpaired" else None
    return tokens(-2, -0.1), tokens(-4, -1), mask, array([ranks] * ROWS), label


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_gradient_is_the_numerical_derivative(name: str, options: dict[str, Any]) -> None:
    with mx.stream(mx.cpu):
        kind = LOSSES[name.split(":")[0]].kind
        policy, reference, mask, rank, label = float64_batch(kind)
        if name == "dpop":  # whose penalty is for a policy below its reference
            reference = policy + 0.5 * mask
        config = LossConfig(type=name, beta=0.5, **options)

        def loss(logps: mx.array) -> mx.array:
            return compute_loss(TokenLogps(logps), reference, mask, rank, label, config).loss

        value, gradient = mx.value_and_grad(loss)(policy)
        assert value.dtype == mx.float64
        for place, scored in places(mask, kind):
            moved = mx.zeros_like(policy)
            moved[place] = STEP
            near, far = (loss(policy + n * moved).item() - loss(policy - n * moved).item() for n in (1, 2))
            expected = (8 * near - far) / (12 * STEP) if scored else 0.0
            assert gradient[place].item() == pytest.approx(expected, rel=1e-4, abs=1e-5), place


def places(mask: mx.array, kind: Kind) -> list[tuple[tuple[int, int, int], bool]]:
    """Each token's place, and whether the loss may move it: not padding, nor KTO's mismatched completion."""
    rows, answers, width = mask.shape
    return [
        ((r, k, c), mask[r, k, c].item() > 0 and not (kind == "unpaired" and k == 1))
        for r in range(rows)
        for k in range(answers)
        for c in range(width)
    ]


def test_dpos_gradient_is_weighted_by_how_wrongly_the_pair_is_ranked() -> None:
    # Rafailov et al. 2023, section 4: ∇L = -β σ(r_l - r_w) [∇ log π(y_w) - ∇ log π(y_l)], a mean over pairs.
    with mx.stream(mx.cpu):
        policy, reference, mask, rank, _ = float64_batch("pair")
        config = LossConfig(beta=0.3)

        def loss(logps: mx.array) -> Any:
            return compute_loss(TokenLogps(logps), reference, mask, rank, None, config)

        output, gradient = mx.value_and_grad(loss)(policy)
        weight = mx.sigmoid(output.rewards[:, 1] - output.rewards[:, 0])
        direction = mx.array([-1.0, 1.0], dtype=mx.float64)
        expected = 0.3 / ROWS * weight[:, None, None] * direction[None, :, None] * mask
        assert mx.abs(gradient - expected).max().item() < 1e-15


def test_a_wrongly_ranked_pair_pulls_harder_than_a_rightly_ranked_one() -> None:
    reference = mx.full((2, 2, 1), -5.0)
    policy = mx.array([[[-2.0], [-8.0]], [[-8.0], [-2.0]]])  # right, wrong: r_w - r_l = 0.6 and -0.6
    mask, rank = mx.ones_like(policy), mx.array([[1.0, 2.0], [1.0, 2.0]])

    def loss(logps: mx.array) -> mx.array:
        return compute_loss(TokenLogps(logps), reference, mask, rank, None, LossConfig(beta=0.1)).loss

    gradient = mx.grad(loss)(policy)
    assert -gradient[0, 0, 0].item() == pytest.approx(0.05 * 0.3543, rel=1e-3)  # σ(-0.6)
    assert -gradient[1, 0, 0].item() == pytest.approx(0.05 * 0.6457, rel=1e-3)  # σ(0.6)


def test_plackett_luces_gradient_is_what_each_draw_gave_less_what_it_was_expected_to() -> None:
    # d/dr_k of Σ -log softmax = Σ over the draws in which k stood of its probability, less 1 for the draw it won
    rewards = [0.4, -0.3, 1.1]
    with mx.stream(mx.cpu):
        policy = mx.array([[[r] for r in rewards]], dtype=mx.float64)
        ones, rank = mx.ones_like(policy), mx.array([[1.0, 2.0, 3.0]])

        def loss(logps: mx.array) -> mx.array:
            config = LossConfig(type="plackett_luce", beta=1.0)
            return compute_loss(TokenLogps(logps), mx.zeros_like(logps), ones, rank, None, config).loss

        gradient = mx.grad(loss)(policy)[0, :, 0].tolist()
    weights = [2.718281828459045**r for r in rewards]
    first = [w / sum(weights) for w in weights]
    second = [w / sum(weights[1:]) for w in weights[1:]]
    assert gradient == pytest.approx([first[0] - 1, first[1] + second[0] - 1, first[2] + second[1]], rel=1e-6)
