"""The chunked gated delta rule is mlx-lm's loop, in values and in gradients, and models take it where they are told."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gated_delta
from mlx_lm.models.gated_delta import gated_delta_ops
from mlx_lm.utils import load_model

from mlx_dpo.config import LoraConfig
from mlx_dpo.data.batching import make_batch
from mlx_dpo.data.tokenize import TokenizedRow
from mlx_dpo.logprobs.scorer import UNCHECKED, Scorer, plain_logps
from mlx_dpo.models import lora
from mlx_dpo.models.gated_delta import CHUNK, SEGMENT, chunked_gated_delta, trainable_gated_delta
from mlx_dpo.planning.graph import as_checkpointed, trace, traceable_checkpoint
from mlx_dpo.planning.peak_memory import IN_FLIGHT, peak_memory
from support.hybrids import GATED_DELTA, tiny_hybrid
from support.tiny_models import tiny_model_folder

NAMES = ("y", "last state", "d q", "d k", "d v", "d g", "d beta", "d state")


def random_inputs(
    length: int,
    *,
    heads: tuple[int, int] = (2, 4),
    widths: tuple[int, int] = (32, 16),
    channels: bool = False,
    decay: float = 2.0,
    spread: float = 1.0,
    seed: int = 0,
) -> list[mx.array]:
    """q, k, v, g, beta and a first state of two sequences; the decays are sigmoid(decay ± spread)."""
    keys = iter(mx.random.split(mx.random.key(seed), 6))
    (key_heads, value_heads), (key_width, value_width) = heads, widths

    def normal(*shape: int) -> mx.array:
        return mx.random.normal((2, *shape), key=next(keys))

    def unit(x: mx.array) -> mx.array:
        return x / mx.linalg.norm(x, axis=-1, keepdims=True)

    return [
        unit(normal(length, key_heads, key_width)) * key_width**-0.5,
        unit(normal(length, key_heads, key_width)),
        normal(length, value_heads, value_width),
        mx.sigmoid(normal(length, value_heads, *[key_width] * channels) * spread + decay),
        mx.sigmoid(normal(length, value_heads)),
        0.3 * normal(value_heads, value_width, key_width),
    ]


def values_and_gradients(rule: Any, inputs: list[mx.array], mask: mx.array | None = None) -> list[mx.array]:
    """Output, last state, and the gradient of both under random weights, by each of the six inputs."""

    def objective(*inputs: mx.array) -> tuple[mx.array, ...]:
        y, state = rule(*inputs, mask)
        if mask is not None:
            y = mx.where(mask[..., None, None], y, 0)  # what the loop gives elsewhere is of no use
        weights = [mx.random.normal(x.shape, key=mx.random.key(9)) for x in (y, state)]
        return (y * weights[0]).sum() + (state * weights[1]).sum(), y, state

    (_, y, state), gradients = mx.value_and_grad(objective, argnums=list(range(6)))(*inputs)
    return [y, state, *gradients]


def assert_same(inputs: list[mx.array], mask: mx.array | None = None, tolerance: float = 2e-6) -> None:
    """Both ways agree to `tolerance` of the largest number of each array."""
    found = values_and_gradients(chunked_gated_delta, inputs, mask)
    for name, ours, loop in zip(NAMES, found, values_and_gradients(gated_delta_ops, inputs, mask), strict=True):
        assert ours.shape == loop.shape
        largest = float(mx.abs(loop).max())
        np.testing.assert_allclose(np.array(ours), np.array(loop), rtol=0, atol=tolerance * largest, err_msg=name)


# the rule itself

both_decays = pytest.mark.parametrize("channels", [False, True], ids=["a decay a head", "a decay a channel"])


@both_decays
@pytest.mark.parametrize("length", [1, 2, 7, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 2])
def test_it_is_the_loop_at_every_length(length: int, channels: bool) -> None:
    assert_same(random_inputs(length, channels=channels))


@both_decays
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (1, 4)])
def test_it_is_the_loop_whatever_heads_share_a_key(heads: tuple[int, int], channels: bool) -> None:
    assert_same(random_inputs(40, heads=heads, channels=channels))


@both_decays
def test_it_is_the_loop_across_segments(channels: bool) -> None:
    assert_same(random_inputs(SEGMENT + 70, heads=(1, 1), widths=(8, 8), channels=channels))


@both_decays
@pytest.mark.parametrize(
    ("decay", "spread"), [(12, 1), (-12, 1), (-40, 1), (0, 40)], ids=["near 1", "near 0", "all but 0", "both"]
)
def test_strong_and_weak_decays_neither_overflow_nor_lose_digits(decay: float, spread: float, channels: bool) -> None:
    # 2e-5: in float32 exp(log g) is |log g| units of rounding off, and a gradient by g that is as small as g is that
    assert_same(random_inputs(2 * CHUNK + 9, channels=channels, decay=decay, spread=spread), tolerance=2e-5)


@both_decays
def test_a_decay_of_exactly_0_has_the_loops_gradient(channels: bool) -> None:
    inputs = random_inputs(90, channels=channels)
    inputs[3] = mx.where(mx.random.uniform(shape=inputs[3].shape, key=mx.random.key(1)) < 0.2, 0, inputs[3])
    assert_same(inputs, tolerance=2e-5)


@pytest.mark.parametrize(("beta", "tolerance"), [(0.999, 5e-6), (1.9, 1e-4)])
def test_a_key_that_repeats_through_a_chunk_costs_few_digits(beta: float, tolerance: float) -> None:
    # (I + A)⁻¹ as a product of powers of A is off by more than its size here; β above 1 is OLMo's alone
    inputs = random_inputs(100, decay=12)
    inputs[1] = mx.broadcast_to(inputs[1][:, :1], inputs[1].shape)
    inputs[4] = mx.full(inputs[4].shape, beta)
    assert_same(inputs, tolerance=tolerance)


@both_decays
def test_masked_tokens_leave_the_state_alone(channels: bool) -> None:
    mask = mx.random.uniform(shape=(2, 75), key=mx.random.key(2)) > 0.3
    inputs = random_inputs(75, channels=channels)
    assert_same(inputs, mask)
    assert not np.array(chunked_gated_delta(*inputs, mask)[0])[~np.array(mask)].any()


def test_without_a_state_it_begins_from_zeros() -> None:
    *inputs, state = random_inputs(20)
    for ours, loop in zip(chunked_gated_delta(*inputs), gated_delta_ops(*inputs, mx.zeros_like(state)), strict=True):
        np.testing.assert_allclose(np.array(ours), np.array(loop), atol=1e-6)


def test_a_sequence_read_in_two_parts_is_the_sequence_read_at_once() -> None:
    *inputs, state = random_inputs(150)
    whole, last = chunked_gated_delta(*inputs, state)
    first, between = chunked_gated_delta(*[x[:, :37] for x in inputs], state)
    second, end = chunked_gated_delta(*[x[:, 37:] for x in inputs], between)
    np.testing.assert_allclose(np.array(mx.concatenate([first, second], axis=1)), np.array(whole), atol=1e-6)
    np.testing.assert_allclose(np.array(end), np.array(last), atol=1e-6)


def test_bfloat16_comes_out_as_the_loops_to_a_unit_of_rounding() -> None:
    q, k, v, g, beta, state = random_inputs(100)
    inputs = [*(x.astype(mx.bfloat16) for x in (q, k, v)), g, beta.astype(mx.bfloat16), state]
    y, last = chunked_gated_delta(*inputs)
    expected, expected_last = gated_delta_ops(*inputs)
    assert y.dtype == mx.bfloat16 and last.dtype == mx.float32
    y, expected = np.array(y.astype(mx.float32)), np.array(expected.astype(mx.float32))
    np.testing.assert_allclose(y, expected, rtol=2**-7, atol=1e-5)
    assert (y == expected).mean() > 0.99, "both are float32 inside"
    np.testing.assert_allclose(np.array(last), np.array(expected_last), atol=1e-5)


def test_the_backward_pass_holds_a_tenth_of_the_loops_memory() -> None:
    inputs = random_inputs(256, heads=(2, 2), widths=(128, 128))
    mx.eval(inputs)

    def peak(rule: Any) -> int:
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(values_and_gradients(rule, inputs))
        return mx.get_peak_memory() - before

    assert peak(chunked_gated_delta) < peak(gated_delta_ops) / 10


def test_its_memory_can_be_forecast() -> None:
    inputs = random_inputs(2 * SEGMENT, heads=(2, 2))
    marks = [mx.array(1.0) for _ in range(2)]  # one for each segment

    def gradient(*arrays: mx.array) -> list[mx.array]:
        rule = partial(chunked_gated_delta, checkpoint_fn=traceable_checkpoint(iter(arrays[6:])))
        return values_and_gradients(lambda *given: rule(*given), list(arrays[:6]))

    graph = trace(gradient, [*inputs, *marks])
    forecast = peak_memory(as_checkpointed(graph, graph.inputs[6:]), IN_FLIGHT["cpu"])
    mx.eval(inputs)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(values_and_gradients(chunked_gated_delta, inputs))
    assert 0.7 < forecast / (mx.get_peak_memory() - before) < 1.3


# models that take it


def loss_and_gradient(model: nn.Module, tokens: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
    def loss(model: nn.Module) -> mx.array:
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).mean()

    value, gradient = nn.value_and_grad(model, loss)(model)
    return value, dict(tree_flatten(gradient))


@pytest.mark.parametrize("family", GATED_DELTA)
def test_every_familys_blocks_are_found_and_give_what_they_gave(family: str) -> None:
    model = tiny_hybrid(family)
    tokens = mx.random.randint(0, 64, (2, 70), key=mx.random.key(4))
    loss, gradient = loss_and_gradient(model, tokens)
    with trainable_gated_delta(model) as count:
        assert count == GATED_DELTA[family][1]
        found, found_gradient = loss_and_gradient(model, tokens)
    np.testing.assert_allclose(found.item(), loss.item(), rtol=1e-5)
    assert found_gradient.keys() == gradient.keys()
    for name, expected in gradient.items():
        scale = float(mx.abs(expected).max()) + 1e-6
        np.testing.assert_allclose(
            np.array(found_gradient[name]), np.array(expected), rtol=0, atol=1e-4 * scale, err_msg=name
        )


def test_log_probs_and_lora_gradients_of_a_whole_model_are_the_same_with_and_without(tmp_path: Path) -> None:
    model, _ = load_model(tiny_model_folder(tmp_path / "model", "qwen3_5"))
    model.freeze()
    lora.attach(model, LoraConfig(num_layers=4, rank=4, keys=("linear_attn.in_proj_qkv", "mlp.down_proj")), seed=0)
    adapter = {
        name: mx.random.normal(value.shape, scale=0.05, key=mx.random.key(5))
        for name, value in lora.parameters(model).items()
    }
    model.load_weights(list(adapter.items()), strict=False)
    random = np.random.default_rng(0)
    prompts, answers = ([random.integers(3, 300, n).tolist() for n in lengths] for lengths in ((50, 31), (40, 12)))
    rows = [
        TokenizedRow(str(n), p, (a, a[:9]), (0, 0), (1.0, 2.0))
        for n, (p, a) in enumerate(zip(prompts, answers, strict=True))
    ]
    batch = make_batch(rows, [0, 1])

    def measure(score: Any) -> tuple[mx.array, dict[str, mx.array]]:
        def objective(model: nn.Module) -> tuple[mx.array, mx.array]:
            logps = score(batch)
            return (logps * mx.array([[1.0, -0.5]])[..., None]).sum(), logps

        (_, logps), gradient = nn.value_and_grad(model, objective)(model)
        return logps, dict(tree_flatten(gradient))

    expected, expected_gradient = measure(lambda batch: plain_logps(model, batch).logps)
    with trainable_gated_delta(model):
        checkpointed = Scorer(model, UNCHECKED, checkpoint=True)
        model.train()
        for score in (
            lambda batch: plain_logps(model, batch).logps,
            lambda batch: checkpointed(batch, gradient=True).logps,
        ):
            logps, gradient = measure(score)
            np.testing.assert_allclose(np.array(logps), np.array(expected), atol=2e-5)
            assert gradient.keys() == expected_gradient.keys()
            for name, value in expected_gradient.items():
                largest = float(mx.abs(value).max())
                assert largest > 0, name
                np.testing.assert_allclose(
                    np.array(gradient[name]), np.array(value), rtol=0, atol=1e-4 * largest, err_msg=name
                )


def test_on_metal_a_model_in_evaluation_mode_has_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    class Metal:
        """MLX as it answers on a Mac."""

        metal = type("metal", (), {"is_available": staticmethod(lambda: True)})
        default_device = staticmethod(lambda: mx.gpu)

        def __getattr__(self, name: str) -> Any:
            return getattr(mx, name)

    model = tiny_hybrid("qwen3_5")
    tokens = mx.random.randint(0, 64, (1, 20), key=mx.random.key(4))
    expected, _ = loss_and_gradient(model, tokens)
    monkeypatch.setattr(gated_delta, "mx", Metal())
    model.eval()
    with pytest.raises(TypeError):  # the kernel, which there is none of here, and on a Mac is without a gradient
        loss_and_gradient(model, tokens)
    with trainable_gated_delta(model):
        found, _ = loss_and_gradient(model, tokens)
    np.testing.assert_allclose(found.item(), expected.item(), rtol=1e-5)


def test_other_models_and_the_same_model_afterwards_are_untouched() -> None:
    model, other = tiny_hybrid("qwen3_5"), tiny_hybrid("qwen3_5")
    types = [type(module) for _, module in model.named_modules()]
    with pytest.raises(KeyError), trainable_gated_delta(model), trainable_gated_delta(model):
        assert [type(module) for _, module in model.named_modules()] != types
        assert [type(module) for _, module in other.named_modules()] == types
        raise KeyError
    assert [type(module) for _, module in model.named_modules()] == types


def test_a_model_without_such_blocks_stays_as_it_is(tmp_path: Path) -> None:
    model, _ = load_model(tiny_model_folder(tmp_path / "llama", "llama"))
    with trainable_gated_delta(model) as count:
        assert count == 0
