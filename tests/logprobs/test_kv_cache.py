"""Every family of mlx-lm's hybrids shares prompts: states, like keys and values, are read once and have a gradient."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dpo.config import SpeedConfig
from mlx_dpo.data.batching import Batch, make_batch
from mlx_dpo.data.tokenize import TokenizedRow
from mlx_dpo.events import Warned
from mlx_dpo.logprobs import kv_cache
from mlx_dpo.logprobs.buckets import ONE_BUCKET
from mlx_dpo.logprobs.check import check_optimizations, two_short
from mlx_dpo.logprobs.kv_cache import PrefixStates, prefix_caches
from mlx_dpo.logprobs.scorer import Scorer, plain_logps
from mlx_dpo.models.gated_delta import trainable_gated_delta
from support.adapters import random_rows
from support.hybrids import STATES, tiny_hybrid


def measure(model: nn.Module, batch: Batch, scorer: Scorer | None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Token log-probs, and the gradient of their sum under random weights."""
    weight = mx.random.normal(batch.mask.shape, key=mx.random.key(7)) * mx.array(batch.mask)

    def objective(model: nn.Module) -> tuple[mx.array, mx.array]:
        out = plain_logps(model, batch) if scorer is None else scorer(batch, gradient=True)
        return (out.logps * weight).sum(), out.logps

    (_, logps), gradient = nn.value_and_grad(model, objective)(model)
    return np.array(logps), {name: np.array(value) for name, value in tree_flatten(gradient)}


def assert_exact(model: nn.Module, batch: Batch, scorer: Scorer) -> None:
    logps, gradient = measure(model, batch, scorer)
    expected, expected_gradient = measure(model, batch, None)
    np.testing.assert_allclose(logps, expected, atol=5e-5)
    assert gradient.keys() == expected_gradient.keys()
    largest = max(float(np.abs(value).max()) for value in expected_gradient.values())
    for name, value in expected_gradient.items():
        scale = float(np.abs(value).max()) + 1e-3 * largest
        np.testing.assert_allclose(gradient[name], value, rtol=0, atol=5e-4 * scale, err_msg=name)


@pytest.mark.parametrize("family", STATES)
@pytest.mark.parametrize(
    ("checkpoint", "prefill_step_size", "bucket_overhead"),
    [(False, 0, ONE_BUCKET), (True, 5, ONE_BUCKET), (True, 5, 0)],
)
def test_every_family_gives_the_plain_paths_log_probs_and_gradients_by_all_its_weights(
    family: str, checkpoint: bool, prefill_step_size: int, bucket_overhead: int
) -> None:
    """Of prompts of unequal length, one of them a single token, each with three answers."""
    model = tiny_hybrid(family)
    batch = make_batch(rows := random_rows(64, answers=3), range(len(rows)))
    speed = SpeedConfig(activation_cache=False, prefill_step_size=prefill_step_size)
    with trainable_gated_delta(model):
        scorer = Scorer(model, speed, checkpoint=checkpoint, bucket_overhead=bucket_overhead)
        assert scorer.layout(batch).prompts, "shared"
        assert_exact(model, batch, scorer)


@pytest.mark.parametrize("family", ["mamba2", "nemotron_h", "qwen3_5"])
@pytest.mark.parametrize("prefill_step_size", [0, 300])
def test_prompts_may_end_anywhere_in_the_chunks_that_a_recurrence_is_computed_in(
    family: str, prefill_step_size: int
) -> None:
    """mlx-lm's Mamba 2 takes 256 tokens at a time, the gated delta rule here 64."""
    random = np.random.default_rng(0)
    lengths = (601, 300, 258, 257, 256, 65, 64, 2)
    rows = [
        TokenizedRow(str(n), random.integers(3, 64, n).tolist(), ([5, 6, 7], [8]), (0, 0), (1.0, 2.0)) for n in lengths
    ]
    model = tiny_hybrid(family)
    batch = make_batch(rows, range(len(rows)))
    speed = SpeedConfig(activation_cache=False, prefill_step_size=prefill_step_size)
    with trainable_gated_delta(model):
        assert_exact(model, batch, Scorer(model, speed, bucket_overhead=ONE_BUCKET))


@pytest.mark.parametrize("family", STATES)
def test_the_check_takes_them_all_with_every_optimization(family: str) -> None:
    model = tiny_hybrid(family)
    said: list[object] = []
    with trainable_gated_delta(model):
        checked = check_optimizations(model, random_rows(64), SpeedConfig(), on_event=said.append)
    assert checked.speed == SpeedConfig()
    assert not said


@pytest.mark.parametrize("family", kv_cache.IGNORE_LENGTHS)
def test_the_check_finds_a_family_that_keeps_the_state_behind_the_padding(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of prompts of one length too: a run may come to others."""
    monkeypatch.setattr(kv_cache, "IGNORE_LENGTHS", ())
    model = tiny_hybrid(family, scale=0.3)
    rows = [row._replace(prompt=row.prompt[:9]) for row in random_rows(64) if len(row.prompt) >= 9]
    said: list[object] = []
    with trainable_gated_delta(model):
        checked = check_optimizations(model, rows, SpeedConfig(), on_event=said.append)
    assert not checked.speed.shared_prompt and checked.speed.length_buckets
    assert len(said) == 1 and isinstance(said[0], Warned) and "speed.shared_prompt" in said[0].text


def test_the_rows_of_the_check_have_prompts_of_unequal_length_even_where_the_data_has_one() -> None:
    row = random_rows(64)[0]
    assert [len(found.prompt) for found in two_short([row, row])] == [17, 9]
    assert [len(found.prompt) for found in two_short([row])] == [17, 9]
    short = row._replace(prompt=row.prompt[:1], completions=([5], [6]))
    assert [len(found.prompt) for found in two_short([short, short, row, row])] == [17, 9], (
        "of one token nothing is read"
    )


def test_lengths_count_what_a_step_reads() -> None:
    """Of more tokens than there are, mlx-lm's Mamba 2 would index past the end."""
    cache = PrefixStates(2, np.array([7, 3, 5]))
    cache.step = (4, 6)
    assert cache.lengths is not None and cache.lengths.tolist() == [2, -1, 1]
    assert cache.make_mask(2).tolist() == [[True, True], [False, False], [True, False]]


def test_caches_are_those_that_the_model_makes() -> None:
    assert [type(cache).__name__ for cache in prefix_caches(tiny_hybrid("nemotron_h"))] == [
        "PrefixStates",
        "PrefixKVCache",
        "PrefixStates",
    ]
    (first, *_) = prefix_caches(tiny_hybrid("falcon_h1"))
    assert [type(member).__name__ for member in first.members] == ["PrefixStates", "PrefixKVCache"]


def test_answers_of_a_single_token_are_read_with_a_second_one() -> None:
    """On Metal mlx-lm's Mamba 2 takes a kernel without a gradient for a single token on top of a state."""
    row = TokenizedRow("row", [3, 4, 5, 6], ([7], [8]), (0, 0), (1.0, 2.0))
    model = tiny_hybrid("mamba2")
    scorer = Scorer(model, SpeedConfig(activation_cache=False, prefill_step_size=1))
    batch = make_batch([row], [0])
    widths = [end - start for bucket in scorer.layout(batch).answers for start, end in scorer.steps(bucket)]
    assert widths == [2]
    assert_exact(model, batch, scorer)
