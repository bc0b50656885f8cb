"""Every optimization is exact: the plain path's log-probs and gradients, for every model, alone and together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dpo.config import Dtype, ModelConfig, SpeedConfig
from mlx_dpo.data.batching import Batch, make_batch
from mlx_dpo.data.tokenize import TokenizedRow
from mlx_dpo.events import Warned
from mlx_dpo.logprobs.activation_cache import ActivationCache
from mlx_dpo.logprobs.buckets import BUCKET_OVERHEAD
from mlx_dpo.logprobs.check import check_optimizations
from mlx_dpo.logprobs.kv_cache import ContinuationKVCache, PrefixKVCache
from mlx_dpo.logprobs.scorer import OPTIMIZATIONS, STATS, Scorer, optimizations_on, plain_logps
from mlx_dpo.models.load import load
from support.adapters import adapted_model, random_rows
from support.tiny_models import TINY_MODELS, tiny_model_folder

NOT_SHARED = ("gemma2",)
"""Its attention takes no mask for each row."""
OFF = SpeedConfig(**OPTIMIZATIONS)


def measure(
    model: nn.Module, batch: Batch, scorer: Scorer | None, *, training: bool = False
) -> tuple[mx.array, mx.array]:
    """Token log-probs, and the gradient of their sum under fixed random weights as one vector."""
    model.train(training)
    weight = mx.random.normal(batch.mask.shape, key=mx.random.key(7)) * mx.array(batch.mask)

    def objective(model: nn.Module) -> tuple[mx.array, mx.array]:
        out = plain_logps(model, batch) if scorer is None else scorer(batch, gradient=True)
        return (out.logps * weight).sum(), out.logps

    (_, logps), gradient = nn.value_and_grad(model, objective)(model)
    return logps, mx.concatenate([value.reshape(-1) for _, value in sorted(tree_flatten(gradient))])


def assert_same(found: tuple[mx.array, mx.array], expected: tuple[mx.array, mx.array], atol: float = 5e-5) -> None:
    np.testing.assert_allclose(np.array(found[0]), np.array(expected[0]), atol=atol)
    a, b = found[1], expected[1]
    assert (mx.linalg.norm(a - b) / mx.linalg.norm(b)).item() < 1e-4
    assert ((a * b).sum() / (mx.linalg.norm(a) * mx.linalg.norm(b))).item() > 1 - 1e-6


def filled(scorer: Scorer, batch: Batch) -> Scorer:
    """The scorer after a pass that noted the cached states."""
    out = scorer.score(batch, gradient=False)
    scorer.keep(batch, out.states)
    assert scorer.activation_cache is not None and scorer.activation_cache.knows(batch)
    return scorer


def with_optimizations(on: tuple[bool, ...]) -> SpeedConfig:
    """Those optimizations and no others; steps shorter than a prompt, and of about the length of a sliding window."""
    return SpeedConfig(**dict(zip(OPTIMIZATIONS, on, strict=True)) | {"prefill_step_size": 7 * on[1]})


@pytest.mark.parametrize("arch", TINY_MODELS)
def test_all_optimizations_together_give_the_plain_paths_log_probs_and_gradients(arch: str, tmp_path: Path) -> None:
    model, vocabulary = adapted_model(tmp_path, arch)
    rows = random_rows(vocabulary)
    batch = make_batch(rows, range(len(rows)))
    speed = SpeedConfig(shared_prompt=arch not in NOT_SHARED, prefill_step_size=5)
    for checkpoint in (False, True):
        activation_cache = ActivationCache(rows, 1e9, 0)
        bucket_overhead = 0 if checkpoint else BUCKET_OVERHEAD  # every length by itself, and all together
        scorer = filled(
            Scorer(
                model, speed, checkpoint=checkpoint, activation_cache=activation_cache, bucket_overhead=bucket_overhead
            ),
            batch,
        )
        assert scorer.first_adapted == 2
        atol = 3e-4 if arch == "gemma2" else 5e-5  # a product's rounding depends on its shape, and gemma 2 amplifies it
        assert_same(measure(model, batch, scorer, training=checkpoint), measure(model, batch, None), atol)


@pytest.mark.parametrize("shared_prompt", [False, True])
def test_blocks_that_read_keys_of_blocks_below_keep_their_gradient_when_computed_twice(
    shared_prompt: bool, tmp_path: Path
) -> None:
    """Gemma 4's last blocks take others' keys and values as arguments, which may be what a cache keeps too."""
    model, vocabulary = adapted_model(tmp_path, "gemma4", num_layers=4)
    rows = random_rows(vocabulary)
    batch = make_batch(rows, range(len(rows)))
    speed = SpeedConfig(shared_prompt=shared_prompt, activation_cache=False, prefill_step_size=5)
    expected = measure(model, batch, None)
    assert_same(measure(model, batch, Scorer(model, speed, checkpoint=True), training=True), expected)


@pytest.mark.parametrize("on", list(itertools.product((False, True), repeat=len(OPTIMIZATIONS))))
@pytest.mark.parametrize(("arch", "bucket_overhead"), [("llama", 8), ("gemma3", 0), ("lfm2", 8), ("qwen3_5", 8)])
def test_every_choice_of_optimizations_is_exact(
    arch: str, bucket_overhead: int, on: tuple[bool, ...], tmp_path: Path
) -> None:
    model, vocabulary = adapted_model(tmp_path, arch)
    rows = random_rows(vocabulary, answers=3)
    batch = make_batch(rows, range(len(rows)))
    speed = with_optimizations(on)
    scorer = Scorer(model, speed, activation_cache=ActivationCache(rows, 1e9, 0), bucket_overhead=bucket_overhead)
    if on[0]:
        filled(scorer, batch)
    assert_same(measure(model, batch, scorer), measure(model, batch, None))


def test_in_steps_attention_leaves_out_most_of_what_is_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 × 64 pairs of prompt tokens, steps of 8 compute 8 × (8 + 16 + … + 64): 9/16 of them."""
    model, vocabulary = adapted_model(tmp_path, "llama")
    row = TokenizedRow("row", [3 + i % (vocabulary - 3) for i in range(65)], ([5], [6]), (0, 0), (1.0, 2.0))
    pairs: list[int] = []
    attend = mx.fast.scaled_dot_product_attention

    def counted(queries: mx.array, keys: mx.array, *args: object, **kwargs: object) -> mx.array:
        pairs.append(queries.shape[2] * keys.shape[2])
        return attend(queries, keys, *args, **kwargs)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", counted)
    for size, expected in ((0, 64 * 64), (8, 64 * 64 * 9 // 16)):
        pairs.clear()
        Scorer(model, SpeedConfig(activation_cache=False, prefill_step_size=size))(
            make_batch([row], [0]), gradient=False
        )
        answers = 2 * (2 + 64) * len(model.layers)  # both in one array, a token and one of padding each
        assert sum(pairs) - answers == expected * len(model.layers)


def test_states_kept_from_one_batching_serve_another(tmp_path: Path) -> None:
    model, vocabulary = adapted_model(tmp_path, "qwen3")
    rows = random_rows(vocabulary)
    scorer = Scorer(model, activation_cache=ActivationCache(rows, 1e9, 0))
    for places in ([2, 0], [1, 3]):
        filled(scorer, make_batch([rows[i] for i in places], places))
    other = make_batch([rows[3], rows[2]], [3, 2])
    assert scorer.score(other, gradient=False).states is None, "nothing is computed again"
    assert_same(measure(model, other, scorer), measure(model, other, None))


def test_with_the_activations_known_no_frozen_block_runs(tmp_path: Path) -> None:
    model, vocabulary = adapted_model(tmp_path, "llama")
    rows = random_rows(vocabulary)
    batch = make_batch(rows, range(len(rows)))
    scorer = filled(Scorer(model, activation_cache=ActivationCache(rows, 1e9, 0)), batch)
    before = scorer(batch, gradient=False).logps
    broken = {name: mx.full(value.shape, mx.nan) for name, value in tree_flatten(model.layers[0].parameters())}
    model.layers[0].load_weights(list(broken.items()))
    assert mx.array_equal(scorer(batch, gradient=False).logps, before)
    assert mx.isnan(plain_logps(model, batch).logps).any()


def test_an_activation_cache_that_the_budget_has_no_room_for_is_not_kept_and_the_numbers_stay_right(
    tmp_path: Path,
) -> None:
    model, vocabulary = adapted_model(tmp_path, "llama")
    rows = random_rows(vocabulary)
    batch = make_batch(rows, range(len(rows)))
    tokens = sum(len(row.prompt) + sum(len(ids) - 1 for ids in row.completions) for row in rows)
    store = ActivationCache(rows, tokens * 64 * 4 - 1, 0)
    scorer = Scorer(model, activation_cache=store)
    scorer(batch, gradient=False)
    assert store.no_room
    assert store.nbytes == tokens * 64 * 4, "hidden size 64 in float32"
    assert not store.wants(batch)
    assert_same(measure(model, batch, scorer), measure(model, batch, None))


def test_rows_that_a_run_does_not_come_to_take_no_room(tmp_path: Path) -> None:
    model, vocabulary = adapted_model(tmp_path, "llama")
    rows = random_rows(vocabulary)
    store = ActivationCache(rows, 1e9, 0, row_indices=[1, 3])
    scorer = Scorer(model, activation_cache=store)
    batch = make_batch([rows[1], rows[3]], [1, 3])
    filled(scorer, batch)
    assert store.nbytes == sum(len(rows[i].prompt) + sum(len(x) - 1 for x in rows[i].completions) for i in (1, 3)) * 256
    assert_same(measure(model, batch, scorer), measure(model, batch, None))
    other = make_batch([rows[0]], [0])
    assert not store.wants(other)
    assert_same(measure(model, other, scorer), measure(model, other, None))


def test_an_activation_cache_too_large_for_memory_goes_to_disk(tmp_path: Path) -> None:
    model, vocabulary = adapted_model(tmp_path, "llama")
    rows = random_rows(vocabulary)
    batch = make_batch(rows, range(len(rows)))
    store = ActivationCache(rows, 100, 1e9)
    scorer = filled(Scorer(model, activation_cache=store), batch)
    assert isinstance(store._states, np.memmap)
    assert_same(measure(model, batch, scorer), measure(model, batch, None))


def test_statistics_are_the_plain_paths_too(tmp_path: Path) -> None:
    model, vocabulary = adapted_model(tmp_path, "gemma2")
    rows = random_rows(vocabulary)
    batch = make_batch(rows, range(len(rows)))
    plain, fast = (
        plain_logps(model, batch, STATS),
        Scorer(model, SpeedConfig(shared_prompt=False))(batch, STATS, gradient=True),
    )
    for name in STATS:
        np.testing.assert_allclose(np.array(getattr(fast, name)), np.array(getattr(plain, name)), atol=1e-4)


def test_rows_cut_at_the_beginning_share_no_prompt_and_stay_exact(tmp_path: Path) -> None:
    model, vocabulary = adapted_model(tmp_path, "llama")
    rows = [row._replace(starts=(min(2, len(row.prompt)), 0)) for row in random_rows(vocabulary)]
    batch = make_batch(rows, range(len(rows)))
    assert not batch.shares_prompt
    for size in (0, 6):  # whole sequences at once, and in steps on top of each other
        scorer = Scorer(model, SpeedConfig(prefill_step_size=size), activation_cache=ActivationCache(rows, 1e9, 0))
        assert scorer.score(batch, gradient=False).states is None
        assert_same(measure(model, batch, scorer), measure(model, batch, None))


@pytest.mark.parametrize("arch", ["llama", "mamba2", "gemma2"])
def test_the_check_keeps_the_optimizations_that_hold_and_says_why_one_does_not(arch: str, tmp_path: Path) -> None:
    model, vocabulary = adapted_model(tmp_path, arch)
    said: list[object] = []
    speed, difference, _ = check_optimizations(model, random_rows(vocabulary), SpeedConfig(), on_event=said.append)
    assert speed == SpeedConfig(shared_prompt=arch != "gemma2")
    assert difference < 1e-4
    assert [isinstance(event, Warned) and "speed.shared_prompt" in event.text for event in said] == [True] * (
        arch == "gemma2"
    )


@pytest.mark.parametrize("arch", ["llama", "mamba2", "gemma2"])
def test_settle_holds_log_probs_alone_where_nothing_is_trained(arch: str, tmp_path: Path) -> None:
    loaded = load(ModelConfig(path=str(tiny_model_folder(tmp_path, arch))))
    speed, difference, noise = check_optimizations(
        loaded.model, random_rows(len(loaded.tokenizer)), SpeedConfig(activation_cache=False)
    )
    assert speed == SpeedConfig(activation_cache=False, shared_prompt=arch != "gemma2")
    assert difference < 1e-4
    assert noise == 0, "float32 on a CPU"


def test_the_check_does_not_trust_an_optimization_that_gives_other_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, vocabulary = adapted_model(tmp_path, "llama")
    honest = ContinuationKVCache.make_mask
    monkeypatch.setattr(
        ContinuationKVCache,
        "make_mask",
        lambda self, n, *a, **k: honest(self, n, *a, **k) & (mx.arange(self.width + self.read + n) > 0),
    )
    said: list[object] = []
    rows = [row for row in random_rows(vocabulary) if len(row.prompt) > 3]
    speed, *_ = check_optimizations(model, rows, SpeedConfig(), on_event=said.append)
    assert not speed.shared_prompt and speed.activation_cache and speed.chunked_logits
    assert len(said) == 1


@pytest.mark.parametrize("wrong", [0.0, -1.0, 0.9])
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_the_check_fails_a_gradient_that_is_missing_turned_or_a_tenth_too_small(
    wrong: float, compute_dtype: Dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log-probs stay right: only the gradient by the shared prompt's keys and values is wrong."""
    model, vocabulary = adapted_model(tmp_path, "llama", compute_dtype=compute_dtype)
    honest = ContinuationKVCache._picked

    def scaled(self: ContinuationKVCache, buckets: Sequence[mx.array]) -> mx.array:
        picked = honest(self, buckets)
        return mx.stop_gradient(picked * (1 - wrong)) + picked * wrong

    monkeypatch.setattr(ContinuationKVCache, "_picked", scaled)
    said: list[object] = []
    rows = [row for row in random_rows(vocabulary) if len(row.prompt) > 3]
    speed, difference, _ = check_optimizations(model, rows, SpeedConfig(), on_event=said.append)
    assert not speed.shared_prompt and speed.chunked_logits
    assert difference < 1e-4
    assert len(said) == 1 and isinstance(said[0], Warned) and "gradients by" in said[0].text


def test_settle_reads_in_steps_and_leaves_out_steps_that_give_other_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, vocabulary = adapted_model(tmp_path, "llama")
    monkeypatch.setattr(PrefixKVCache, "offset", 0)
    said: list[object] = []
    speed, *_ = check_optimizations(model, random_rows(vocabulary), SpeedConfig(), on_event=said.append)
    assert speed == SpeedConfig(prefill_step_size=0)
    assert len(said) == 1 and isinstance(said[0], Warned) and "speed.prefill_step_size" in said[0].text


def test_without_shared_prompts_nothing_is_read_in_steps() -> None:
    assert optimizations_on(SpeedConfig(shared_prompt=False)) == [
        "activation_cache",
        "length_buckets",
        "chunked_logits",
    ]
    assert (
        optimizations_on(SpeedConfig(**OPTIMIZATIONS))
        == optimizations_on(replace(SpeedConfig(**OPTIMIZATIONS), prefill_step_size=64))
        == []
    )
