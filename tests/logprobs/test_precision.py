"""Float32 where it is asked for, one kind of kernel for policy and reference, and rounding that is measured."""

from __future__ import annotations

import math
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dpo.config import SpeedConfig
from mlx_dpo.data.batching import make_batch
from mlx_dpo.events import Warned
from mlx_dpo.logprobs.check import check_optimizations
from mlx_dpo.logprobs.precision import by_gradient_kernels, in_float32, rounding_noise, without_dropout
from mlx_dpo.logprobs.scorer import Scorer, plain_logps
from mlx_dpo.models.gated_delta import trainable_gated_delta
from support.adapters import adapted_model, random_rows
from support.emulated_gpu import emulated_gpu
from support.tiny_models import TINY_MODELS


@pytest.mark.parametrize("arch", TINY_MODELS)
@pytest.mark.parametrize("bits", [None, 4])
def test_on_a_gpu_in_16_bits_every_family_keeps_the_optimizations_that_it_has_in_float32(
    arch: str, bits: int | None, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    expected, vocabulary = adapted_model(tmp_path / "wide", arch)
    rows, said = random_rows(vocabulary), []
    wanted = check_optimizations(expected, rows, SpeedConfig())
    model, _ = adapted_model(tmp_path, arch, compute_dtype="bfloat16", quantize_bits=bits)
    with emulated_gpu(), trainable_gated_delta(model):
        found = check_optimizations(model, rows, SpeedConfig(), on_event=said.append)
        record_property("difference", found.difference)
        record_property("noise", found.noise)
    assert found.speed == wanted.speed
    assert found.difference < 1e-4
    assert 0.005 < found.noise < 1
    assert wanted.noise == 0
    assert len(said) == (wanted.speed != SpeedConfig()), "no other warning than in float32"
    assert all(isinstance(event, Warned) and "shared_prompt" in event.text for event in said)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_in_float32_a_16_bit_model_computes_what_its_widened_weights_do(bits: int | None, tmp_path: Path) -> None:
    model, vocabulary = adapted_model(tmp_path, "llama", compute_dtype="bfloat16", quantize_bits=bits)
    batch = make_batch(rows := random_rows(vocabulary), range(len(rows)))
    kinds = [type(module) for _, module in model.named_modules()]
    with in_float32(model):
        logits = model(mx.array(batch.tokens))
        found = plain_logps(model, batch).logps
    assert logits.dtype == mx.float32
    assert [type(module) for _, module in model.named_modules()] == kinds, "put back"
    narrow = plain_logps(model, batch).logps
    model.set_dtype(mx.float32)
    expected = plain_logps(model, batch).logps
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=2e-4)
    assert mx.abs(narrow - expected).max() > 1e-2


def test_in_bfloat16_a_fresh_policy_is_read_like_its_reference(tmp_path: Path) -> None:
    model, vocabulary = adapted_model(tmp_path, "llama", compute_dtype="bfloat16")
    batch = make_batch(rows := random_rows(vocabulary), range(len(rows)))
    with emulated_gpu():
        scorer = Scorer(model, SpeedConfig(activation_cache=False))
        reference = scorer(batch, gradient=False).logps
        ((_, policy), _) = nn.value_and_grad(model, lambda model: _loss(scorer(batch, gradient=True).logps))(model)
        fused = scorer._score(batch, (), gradient=False).logps.logps
        assert mx.abs(policy - reference).max() < 1e-5
        assert mx.abs(fused - reference).max() > 1e-3, "what it would be without"


def _loss(logps: mx.array) -> tuple[mx.array, mx.array]:
    return logps.sum(), logps


def test_what_is_described_as_if_for_a_gradient_is_the_same_and_a_real_one_goes_through() -> None:
    x = mx.arange(3.0)
    assert mx.array_equal(by_gradient_kernels(lambda: x * 2), x * 2)
    assert mx.array_equal(mx.grad(lambda y: by_gradient_kernels(lambda: (y * 2).sum()))(x), mx.full(3, 2.0)), "of y"


def test_noise_is_that_of_the_shapes(tmp_path: Path) -> None:
    """A score that adds a known error to what is read alone has that for its noise."""
    _, vocabulary = adapted_model(tmp_path, "llama")
    rows = random_rows(vocabulary)
    assert rounding_noise(lambda batch, grad: mx.array(batch.mask) * (0.25 if grad else 0), rows) == pytest.approx(0.25)
    assert rounding_noise(lambda batch, grad: mx.array(batch.mask, mx.float32), rows) == 0


def test_without_dropout_blocks_are_in_training_mode_and_nothing_is_dropped() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9))
    model.eval()
    with without_dropout(model):
        assert model.training and model.layers[0].training and not model.layers[1].training
    assert not model.training and not model.layers[0].training


def test_a_kernel_without_a_gradient_is_not_met_in_the_check(tmp_path: Path) -> None:
    """In evaluation mode mlx-lm's own rule has no gradient on a Mac; the check reads as training does."""
    model, vocabulary = adapted_model(tmp_path, "qwen3_5", compute_dtype="bfloat16")
    rows = random_rows(vocabulary)
    batch = make_batch(rows, range(len(rows)))
    with emulated_gpu():
        model.eval()
        with pytest.raises(ValueError, match="Not implemented for CustomKernel"):
            mx.eval(nn.value_and_grad(model, lambda model: plain_logps(model, batch).logps.sum())(model))
        with trainable_gated_delta(model):
            assert math.isfinite(check_optimizations(model, rows, SpeedConfig()).noise)
