"""The learning rate follows transformers' formulas, and every optimizer takes the step that its definition says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args, get_type_hints

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.optimizers import clip_grad_norm
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_dpo.config import OptimConfig
from mlx_dpo.training.optim import OPTIMIZERS, SHAPES, learning_rate, make_optimizer, make_update, warmup_steps


def rates(total: int, **settings: Any) -> list[float]:
    config = OptimConfig(**{"learning_rate": 1.0, "warmup_ratio": 0.0} | settings)
    return [learning_rate(config, step, total) for step in range(total)]


# schedules, in worked numbers


def test_constant() -> None:
    assert rates(4, lr_scheduler_type="constant") == [1, 1, 1, 1]


def test_linear_falls_to_one_step_above_zero() -> None:
    assert rates(4, lr_scheduler_type="linear") == [1, 0.75, 0.5, 0.25]


def test_cosine_is_at_half_in_the_middle() -> None:
    half = math.sqrt(0.5) / 2
    assert rates(4, lr_scheduler_type="cosine") == pytest.approx([1, 0.5 + half, 0.5, 0.5 - half])


def test_warm_up_rises_from_zero_in_equal_steps() -> None:
    """4 of 8 steps: 0, 1/4, 2/4, 3/4; then linear over the other 4."""
    assert rates(8, lr_scheduler_type="linear", warmup_steps=4) == [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25]


def test_the_warm_up_ratio_is_rounded_up_and_steps_win_over_it() -> None:
    assert warmup_steps(OptimConfig(warmup_ratio=0.1), 25) == 3
    assert warmup_steps(OptimConfig(warmup_ratio=0.0), 25) == 0
    assert warmup_steps(OptimConfig(warmup_ratio=0.1, warmup_steps=7), 25) == 7
    assert warmup_steps(OptimConfig(warmup_ratio=0.1, warmup_steps=0), 25) == 0


def test_a_warm_up_longer_than_the_run_only_rises() -> None:
    assert rates(3, warmup_steps=6) == pytest.approx([0, 1 / 6, 2 / 6])


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("total", "warmup"), [(20, 0), (20, 2), (7, 3), (1, 0), (2, 1)])
def test_rates_are_those_of_transformers(shape: Any, total: int, warmup: int) -> None:
    """Its `get_linear_schedule_with_warmup`, and those of cosine and constant, as their source has them."""

    def theirs(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        left = (step - warmup) / max(1, total - warmup)
        if shape == "linear":
            return max(0.0, (total - step) / max(1, total - warmup))
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * left))) if shape == "cosine" else 1.0

    found = rates(total, lr_scheduler_type=shape, warmup_steps=warmup, learning_rate=3e-4)
    assert found == pytest.approx([3e-4 * theirs(step) for step in range(total)], rel=1e-12)


# optimizers


def stepped(config: OptimConfig, gradients: list[float], start: float = 1.0) -> list[float]:
    """One parameter through several steps."""
    model = nn.Module()
    model.w = mx.array([[start]])
    optimizer = make_optimizer(config)
    values = []
    for gradient in gradients:
        optimizer.update(model, {"w": mx.array([[gradient]])})
        values.append(model.w.item())
    return values


def test_sgd_goes_down_the_gradient() -> None:
    config = OptimConfig(name="sgd", learning_rate=0.1)
    assert stepped(config, [2.0, -1.0]) == pytest.approx([0.8, 0.9])


def test_sgd_with_momentum() -> None:
    """v: 2, then 0.5 * 2 + 2 = 3."""
    config = OptimConfig(name="sgd", learning_rate=0.1, momentum=0.5)
    assert stepped(config, [2.0, 2.0]) == pytest.approx([0.8, 0.5])


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adams_first_steps_are_the_learning_rate_as_in_pytorch(name: Any) -> None:
    """Bias-corrected, a constant gradient of any size moves by lr each step; uncorrected, by 3.2 lr at first."""
    config = OptimConfig(name=name, learning_rate=0.1)
    assert stepped(config, [5.0, 5.0]) == pytest.approx([0.9, 0.8], rel=1e-5)
    assert stepped(config, [-0.01, -0.01]) == pytest.approx([1.1, 1.2], rel=1e-5)


def test_adams_second_step_by_hand() -> None:
    """Gradients 1 and 3: m = 0.1 * 0.9 + 0.3 = 0.39, of 0.19; v = 0.001 * 0.999 + 0.009 = 0.009999, of 0.001999."""
    config = OptimConfig(name="adam", learning_rate=0.1)
    second = 0.1 * (0.39 / 0.19) / math.sqrt(0.009999 / 0.001999)
    assert stepped(config, [1.0, 3.0]) == pytest.approx([0.9, 0.9 - second], rel=1e-5)


def test_adamw_decays_the_weight_and_not_the_gradient() -> None:
    config = OptimConfig(name="adamw", learning_rate=0.1, weight_decay=0.5)
    assert stepped(config, [5.0]) == pytest.approx([1.0 * (1 - 0.05) - 0.1], rel=1e-5)


def test_lion_moves_by_the_learning_rate_in_the_gradients_direction() -> None:
    config = OptimConfig(name="lion", learning_rate=0.1)
    assert stepped(config, [5.0, 0.001]) == pytest.approx([0.9, 0.8])


def test_every_optimizer_that_can_be_named_is_there() -> None:
    hints = get_type_hints(OptimConfig)
    assert set(OPTIMIZERS) == set(get_args(hints["name"]))
    assert set(SHAPES) == set(get_args(hints["lr_scheduler_type"]))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_reduces_a_convex_loss_and_the_state_survives_a_file(name: Any, tmp_path: Path) -> None:
    """Two steps, or one step, the state through a file, and another: the same weights bit for bit."""
    config = OptimConfig(name=name, learning_rate=0.01, momentum=0.9, weight_decay=0.01)
    target = mx.random.normal((8, 6), key=mx.random.key(0))

    def loss(model: nn.Module) -> mx.array:
        return ((model.w - target) ** 2).sum()

    def one_step(model: nn.Module, optimizer: Any) -> None:
        optimizer.update(model, {"w": nn.value_and_grad(model, loss)(model)[1]["w"]})
        mx.eval(model.parameters(), optimizer.state)

    model = nn.Module()
    model.w = mx.zeros((8, 6))
    optimizer = make_optimizer(config)
    before = loss(model).item()
    one_step(model, optimizer)
    assert loss(model).item() < before

    mx.save_safetensors(str(tmp_path / "state.safetensors"), dict(tree_flatten(optimizer.state)))
    other = nn.Module()
    other.w = mx.array(model.w)
    again = make_optimizer(config)
    again.init(other.trainable_parameters())
    again.state = tree_unflatten(list(mx.load(str(tmp_path / "state.safetensors")).items()))
    one_step(model, optimizer)
    one_step(other, again)
    assert mx.array_equal(model.w, other.w)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_compiled_update_is_clipping_and_the_optimizers_own_rule_to_the_bit(name: str) -> None:
    """Three steps at three rates: nothing of the first is baked in. Only on a CPU are they the same bits."""
    optimizer, plain = (make_optimizer(OptimConfig(name=name, weight_decay=0.01 * (name != "adam"))) for _ in "ab")
    mx.random.seed(0)
    ours: Any = {"a": mx.random.normal((24, 8)), "b": [{}, {"c": mx.random.normal((8, 16))}]}
    theirs = ours
    optimizer.init(ours)
    plain.init(theirs)
    update = make_update(optimizer, 0.5)
    for rate in (1e-2, 3e-2, 1e-3):
        gradients = tree_map(lambda value: mx.random.normal(value.shape), ours)
        optimizer.learning_rate = plain.learning_rate = rate
        before = ours
        ours, state, norm = update(ours, gradients, optimizer.state)
        optimizer.state = state
        clipped, expected_norm = clip_grad_norm(gradients, 0.5)
        theirs = plain.apply_gradients(clipped, theirs)
        mx.eval(ours, optimizer.state, theirs, plain.state)
        assert norm.item() == pytest.approx(expected_norm.item(), rel=1e-6)
        for found, expected in ((ours, theirs), (optimizer.state, plain.state)):
            for (where, a), (_, b) in zip(tree_flatten(found), tree_flatten(expected), strict=True):
                same = mx.array_equal(a, b) if mx.default_device() == mx.cpu else mx.allclose(a, b, rtol=1e-4)
                assert same, where
        assert not mx.array_equal(before["a"], ours["a"]), "and what it began with is still there"
