"""What may be asked of a loss: mixes, options, and refusals that name what is wrong and what would be right."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import mlx.core as mx
import pytest

from mlx_dpo.config import LossConfig
from mlx_dpo.errors import UsageError
from mlx_dpo.losses.compute import compute_loss
from mlx_dpo.losses.mix import accepted_kinds, check_loss_config, mean_over, needs_reference, parse_mix
from mlx_dpo.losses.table import LOSSES, REFERENCE
from mlx_dpo.types import TokenLogps


def refusal(**options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        check_loss_config(LossConfig(**options))
    return caught.value.message


def test_a_loss_alone_weighs_1_and_a_mix_says_its_weights() -> None:
    assert parse_mix("ipo") == (("ipo", 1.0),)
    assert parse_mix("sigmoid:0.8, bco_pair:0.2,sft") == (("sigmoid", 0.8), ("bco_pair", 0.2), ("sft", 1.0))


def test_all_that_is_wrong_with_a_mix_is_said_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        parse_mix("sigmod:0.8,sft:x,sft,ipo:-1,hinge:nan")
    message = caught.value.message
    assert "unknown loss 'sigmod': did you mean sigmoid?" in message
    assert "the weight of 'sft' must be a positive number, not 'x'" in message
    assert "sft stands twice" in message
    assert "the weight of 'ipo' must be a positive number, not '-1'" in message
    assert "the weight of 'hinge' must be a positive number, not 'nan'" in message
    assert "plackett_luce" in caught.value.remedy


@pytest.mark.parametrize("text", ["", "sigmoid,", "sigmoid:"])
def test_a_loss_left_empty_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_mix(text)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_goes_with_its_defaults_unless_it_needs_label_smoothing(name: str) -> None:
    smoothing = 0.1 if name in ("cdpo", "exo_pair") else 0.0
    check_loss_config(LossConfig(type=name, label_smoothing=smoothing))


GIVEN: dict[str, Any] = {
    "beta": 0.3,
    "reference": "start",
    "ref_model_sync_steps": 10,
    "ref_model_mixup_alpha": 0.4,
    "label_smoothing": 0.2,
    "f_divergence_type": "alpha_divergence",
    "f_alpha_divergence_coef": 0.3,
    "ld_alpha": 0.5,
    "use_weighting": True,
    "discopop_tau": 0.1,
    "dpop_lambda": 3.0,
    "simpo_gamma": 1.0,
    "cpo_alpha": 0.5,
    "alphapo_alpha": 0.25,
    "unlikelihood_alpha": 0.25,
    "desirable_weight": 1.5,
    "undesirable_weight": 1.5,
}


def test_there_is_a_value_here_for_every_option() -> None:
    assert set(GIVEN) == {field.name for field in fields(LossConfig)} - {"type"}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_takes_the_options_that_it_reads_and_refuses_every_other_by_name(name: str) -> None:
    read = {option: GIVEN[option] for option in LOSSES[name].options}
    check_loss_config(LossConfig(type=name, **read))
    unread = {option: value for option, value in GIVEN.items() if option not in read}
    message = refusal(type=name, **unread)
    for option, value in unread.items():
        assert f"{option} = {value} (default {getattr(LossConfig, option)}) is not used by {name}; it is by " in message


@pytest.mark.parametrize("name", LOSSES)
def test_what_the_table_says_a_loss_reads_is_what_changes_it(name: str) -> None:
    spec = LOSSES[name]
    ranks = {"pair": [1, 2], "ranking": [1, 2, 3], "unpaired": [1, 0], "demonstration": [1]}[spec.kind]
    shape = (2, len(ranks), 4)
    lengths = mx.array([[4, 2, 3], [3, 4, 1]])[:, : len(ranks), None]
    mask = (mx.arange(4) < lengths).astype(mx.float32)
    logps = -0.1 - 0.05 * mx.arange(mask.size).reshape(shape)
    policy = TokenLogps(logps * mask, log_sum_p2=-0.3 * mask)
    reference, rank = -0.4 * mask, mx.broadcast_to(mx.array(ranks, dtype=mx.float32), shape[:2])
    label = mx.array([1.0, -1.0]) if spec.kind == "unpaired" else None

    def loss(**options: Any) -> float:
        base = {"label_smoothing": 0.1} if "label_smoothing" in spec.options else {}
        config = LossConfig(type=name, **(base | options))
        return compute_loss(policy, reference, mask, rank, label, config).loss.item()

    changed = {option for option, value in GIVEN.items() if loss(**{option: value}) != loss()}
    if "f_alpha_divergence_coef" in spec.options:
        alpha = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}
        changed |= {"f_alpha_divergence_coef"} if loss(**alpha) != loss(f_divergence_type="alpha_divergence") else set()
    # Which reference it is, the trainer reads. LD-DPO's weights are in every sum, and refused where they mean nothing.
    assert spec.options - REFERENCE <= changed
    assert changed - spec.options <= {"ld_alpha"}


def test_a_mix_takes_an_option_that_one_of_its_losses_reads() -> None:
    check_loss_config(LossConfig(type="robust:1,sft:0.5", label_smoothing=0.1))
    check_loss_config(LossConfig(type="sigmoid:1,sft:1", f_divergence_type="js_divergence", ld_alpha=0.5))
    assert "label_smoothing = 0.1 (default 0.0) is not used by sigmoid, sft" in refusal(
        type="sigmoid:1,sft:1", label_smoothing=0.1
    )


def test_an_option_on_which_all_preference_terms_rest_must_suit_each_of_them() -> None:
    message = refusal(type="sigmoid:1,apo_zero:1", f_divergence_type="forward_kl")
    assert "f_divergence_type = forward_kl (default reverse_kl) is not used by apo_zero" in message
    assert "use_weighting = True (default False) is not used by aot" in refusal(type="sigmoid,aot", use_weighting=True)


def test_losses_of_different_rows_do_not_mix() -> None:
    message = refusal(type="sigmoid:1,kto:1")
    assert "no row suits all of sigmoid:1,kto:1: sigmoid takes pair, kto takes unpaired" in message
    assert accepted_kinds(LossConfig(type="plackett_luce:1,sft:0.1")) == {"ranking", "pair"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta": 0.0}, "beta must be positive"),
        ({"beta": float("nan")}, "beta must be positive"),
        ({"type": "exo_pair"}, "exo_pair needs label_smoothing > 0; its paper recommends 0.001"),
        ({"type": "cdpo"}, "cdpo needs label_smoothing > 0"),
        ({"type": "robust", "label_smoothing": 0.5}, "label_smoothing of robust must be below 0.5"),
        ({"type": "aot", "label_smoothing": 1.0}, r"label_smoothing must lie in [0, 1)"),
        ({"ld_alpha": 1.5}, "ld_alpha must lie in [0, 1]"),
        ({"type": "discopop", "discopop_tau": 0.0}, "discopop_tau must be positive"),
        ({"type": "dpop", "dpop_lambda": -1.0}, "dpop_lambda must not be negative"),
        ({"type": "simpo", "simpo_gamma": -1.0}, "simpo_gamma must not be negative"),
        ({"type": "cpo", "cpo_alpha": -1.0}, "cpo_alpha must not be negative"),
        ({"type": "unlikelihood", "unlikelihood_alpha": 2.0}, "unlikelihood_alpha must lie in [0, 1]"),
        ({"type": "kto", "desirable_weight": -1.0}, "desirable_weight must not be negative"),
        ({"f_divergence_type": "chi"}, "f_divergence_type must be one of reverse_kl, forward_kl"),
        (
            {"f_alpha_divergence_coef": 0.3},
            "f_alpha_divergence_coef is used by f_divergence_type alpha_divergence only",
        ),
        ({"type": "kto", "reference": "none"}, "reference none leaves kto nothing to measure from"),
        (
            {"reference": "none", "f_divergence_type": "forward_kl"},
            "forward_kl is a divergence from a reference, and reference is none",
        ),
    ],
)
def test_a_value_out_of_range_is_refused(options: dict[str, Any], said: str) -> None:
    assert said in refusal(**options)


def test_everything_wrong_is_said_at_once_with_a_remedy() -> None:
    with pytest.raises(UsageError) as caught:
        check_loss_config(LossConfig(type="sft", beta=0.5, label_smoothing=2.0, simpo_gamma=1.0))
    assert caught.value.message.count("\n  - ") == 4
    assert caught.value.remedy


def test_which_objectives_need_a_reference() -> None:
    assert needs_reference(LossConfig())
    assert needs_reference(LossConfig(type="simpo:1,sigmoid:1"))
    assert not needs_reference(LossConfig(reference="none"))
    assert not needs_reference(LossConfig(type="simpo:1,sft:1"))
    check_loss_config(LossConfig(type="orpo", reference="none"))


def test_which_objectives_accumulate_exactly() -> None:
    assert mean_over(LossConfig(type="sigmoid:0.5,ipo:0.5")) != "batch"
    assert mean_over(LossConfig(type="sigmoid:0.5,sft:0.5")) == "batch"
