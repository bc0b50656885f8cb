"""Losses and metrics against the numbers that TRL's own trainers gave for the same model, adapter and pairs."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import pytest

from mlx_dpo.config import LossConfig
from mlx_dpo.errors import UsageError
from mlx_dpo.losses.compute import compute_loss
from mlx_dpo.losses.metrics import averages, batch_metrics
from mlx_dpo.losses.mix import check_loss_config
from mlx_dpo.losses.table import LOSSES
from mlx_dpo.losses.views import Pairs, Side
from mlx_dpo.types import TokenLogps

FORMATS = ("standard", "conversational")
TRL_LOSSES = [
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
]
COLLATOR_EXTRAS = ("max_length", "precompute_ref_log_probs", "peft_model_given")  # about rows or references, not losses


class Case(NamedTuple):
    """The first 8 pairs of a data format: TRL's numbers, and the log-probs that they were made from."""

    expected: dict[str, Any]
    policy: TokenLogps
    reference: mx.array
    mask: mx.array

    @property
    def rank(self) -> mx.array:
        return mx.broadcast_to(mx.array([1.0, 2.0]), self.mask.shape[:2])


@pytest.fixture(scope="module")
def cases(golden: Path) -> dict[str, Case]:
    expected = json.loads((golden / "golden.json").read_text())["cases"]
    base, tuned = golden_model(golden), golden_model(golden, adapter=True)
    found = {}
    for name in FORMATS:
        pairs = expected[f"llama/{name}"]["pairs"][:8]
        reference, mask = token_logps(base, pairs)
        found[name] = Case(expected[f"llama/{name}"], token_logps(tuned, pairs)[0], reference.logps, mask)
    return found


def golden_model(golden: Path, adapter: bool = False) -> Any:
    """The golden Llama as mlx-lm computes it, with the adapter added to its weights."""
    from mlx_lm.models.llama import Model, ModelArgs

    model = Model(ModelArgs.from_dict(json.loads((golden / "models/llama/config.json").read_text())))
    weights = mx.load(str(golden / "models/llama/model.safetensors"))
    if adapter:
        lora = mx.load(str(golden / "adapters/llama/adapter_model.safetensors"))
        for name in [name for name in lora if "lora_A" in name]:
            target = name.removeprefix("base_model.model.").replace("lora_A.", "")
            weights[target] = weights[target] + 2.0 * lora[name.replace("lora_A", "lora_B")] @ lora[name]
    model.load_weights(list(weights.items()))
    return model


def token_logps(model: Any, pairs: list[dict[str, Any]]) -> tuple[TokenLogps, mx.array]:
    """Everything that the losses and metrics can ask for, by its definition, and the mask; sequence by sequence."""
    width = max(len(pair[f"{side}_ids"]) for pair in pairs for side in ("chosen", "rejected"))
    rows: dict[str, list[mx.array]] = {name: [] for name in (*TokenLogps._fields, "mask")}
    for pair in pairs:
        for side in ("chosen", "rejected"):
            prompt, answer = pair["prompt_ids"], pair[f"{side}_ids"]
            logits = model(mx.array([prompt + answer]))[0, len(prompt) - 1 : -1].astype(mx.float32)
            logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            target = mx.array(answer)
            padding = [(0, width - len(answer))]
            measured = {
                "logps": mx.take_along_axis(logps, target[:, None], axis=-1)[:, 0],
                "entropy": -(mx.exp(logps) * logps).sum(axis=-1),
                "mean_logit": logits.mean(axis=-1),
                "correct": (logits.argmax(axis=-1) == target).astype(mx.float32),
                "log_sum_p2": mx.logsumexp(2 * logps, axis=-1),
                "mask": mx.ones(len(answer)),
            }
            for name, values in measured.items():
                rows[name].append(mx.pad(values, padding))
    shaped = {name: mx.stack(values).reshape(len(pairs), 2, width) for name, values in rows.items()}
    mx.eval(shaped)
    mask = shaped.pop("mask")
    return TokenLogps(**shaped), mask


def settings(config: dict[str, Any]) -> LossConfig:
    """TRL's DPOConfig fields as ours: the list of losses and the list of weights become a mix."""
    types = config.get("loss_type", ["sigmoid"])
    weights = config.get("loss_weights", [1.0] * len(types))
    ours = {name: value for name, value in config.items() if name in {field.name for field in fields(LossConfig)}}
    return LossConfig(type=",".join(f"{name}:{weight}" for name, weight in zip(types, weights, strict=True)), **ours)


def difference(found: float, expected: float) -> float:
    """Relative, except for shares of tokens or pairs that are 0."""
    return abs(found - expected) / max(abs(expected), 1e-6)


def largest_difference(case: Case, config: LossConfig, expected: dict[str, Any]) -> float:
    """Over the loss and every metric that TRL logged and a loss can know."""
    output = compute_loss(case.policy, case.reference, case.mask, case.rank, None, config)
    found = averages([batch_metrics(output, case.policy, case.reference, case.mask, case.rank, None, "pair")])
    metrics = {name: value for name, value in expected["metrics"].items() if name != "num_tokens"}
    assert metrics.keys() <= found.keys()
    return max(
        difference(found["loss"], expected["loss"]), *(difference(found[name], metrics[name]) for name in metrics)
    )


@pytest.mark.parametrize("name", FORMATS)
def test_the_log_probs_are_those_of_trl(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    for row, pair in enumerate(case.expected["pairs"][:8]):
        for k, side in enumerate(("chosen", "rejected")):
            expected = pair[f"policy_{side}_token_logps"]
            assert case.policy.logps[row, k, : len(expected)].tolist() == pytest.approx(expected, rel=1e-5, abs=2e-5)
            assert case.reference[row, k].sum().item() == pytest.approx(pair[f"ref_{side}_logp"], rel=1e-6)


@pytest.mark.parametrize("loss", TRL_LOSSES)
@pytest.mark.parametrize("name", FORMATS)
def test_every_loss_and_metric_is_that_of_trl(cases: dict[str, Case], name: str, loss: str) -> None:
    entries = {
        key: entry
        for key, entry in cases[name].expected["losses"].items()
        if key.split("|")[0] == loss and "loss" in entry
    }
    assert entries
    for key, entry in entries.items():
        beta, smoothing = (float(part.split("=")[1]) for part in key.split("|")[1:])
        config = LossConfig(type=loss, beta=beta, label_smoothing=smoothing)
        assert largest_difference(cases[name], config, entry) < 1e-4, key


@pytest.mark.parametrize("name", FORMATS)
def test_every_extra_is_that_of_trl(cases: dict[str, Case], name: str) -> None:
    seen = 0
    for key, entry in cases[name].expected["extras"].items():
        if key.startswith(COLLATOR_EXTRAS) or "error" in entry or entry["loss"] == "nan":
            continue
        tolerance = 1e-3 if key.startswith("f=") else 1e-4
        assert largest_difference(cases[name], settings(entry["config"]), entry) < tolerance, key
        seen += 1
    assert seen > 50


def test_where_trl_overflows_discopop_is_finite_and_right(cases: dict[str, Case]) -> None:
    overflows = [
        (case, settings(entry["config"]))
        for case in cases.values()
        for entry in case.expected["extras"].values()
        if entry.get("loss") == "nan"
    ]
    assert overflows
    for case, config in overflows:

        def loss(logps: mx.array, case: Case = case, config: LossConfig = config) -> mx.array:
            return compute_loss(TokenLogps(logps), case.reference, case.mask, case.rank, None, config).loss

        found, gradient = mx.value_and_grad(loss)(case.policy.logps)
        assert found.item() == pytest.approx(discopop_in_float64(case, config), rel=1e-3)
        assert mx.isfinite(gradient).all().item()
        assert mx.abs(gradient).max().item() > 0


def discopop_in_float64(case: Case, config: LossConfig) -> float:
    """Eq. 5 with Python's numbers, the overflowing product left out where it is 0."""
    ratios = ((case.policy.logps - case.reference) * case.mask).sum(axis=-1).tolist()
    total = 0.0
    for chosen, rejected in ratios:
        logit = config.beta * (f_prime(chosen, config) - f_prime(rejected, config))
        modulation = 1 / (1 + math.exp(min(-logit / config.discopop_tau, 700)))
        logistic = -logit if logit < -700 else math.log1p(math.exp(-logit))
        exponential = math.exp(-logit) * modulation if logit > -30 else 0.0
        total += logistic * (1 - modulation) + exponential
    return total / len(ratios)


def f_prime(log_ratio: float, config: LossConfig) -> float:
    if config.f_divergence_type == "forward_kl":
        return 1 - math.exp(-log_ratio)
    power = config.f_alpha_divergence_coef - 1
    return (math.exp(power * log_ratio) - 1) / power


def test_what_trl_refuses_or_crashes_on_is_refused_by_name_or_works(cases: dict[str, Case]) -> None:
    with pytest.raises(UsageError, match="exo_pair needs label_smoothing > 0"):
        check_loss_config(LossConfig(type="exo_pair"))
    for key, entry in cases["standard"].expected["extras"].items():
        if "error" not in entry:
            continue
        config = settings(entry["config"])
        if key == "wpo/hinge":  # TRL's autograd cannot; a weight on a hinge is nothing special
            check_loss_config(config)
            case = cases["standard"]
            assert compute_loss(case.policy, case.reference, case.mask, case.rank, None, config).loss.item() > 0
        else:
            with pytest.raises(UsageError, match=r"(use_weighting|f_divergence_type) = .* is not used by"):
                check_loss_config(config)


def test_an_option_that_trl_ignores_is_refused_although_the_loss_is_the_same(cases: dict[str, Case]) -> None:
    smoothed = LossConfig(type="sigmoid", label_smoothing=0.1)
    with pytest.raises(UsageError, match=r"label_smoothing = 0\.1 .* is not used by sigmoid.*cdpo"):
        check_loss_config(smoothed)
    with pytest.raises(UsageError, match=r"f_divergence_type = forward_kl .* is not used by sft"):
        check_loss_config(LossConfig(type="sft", f_divergence_type="forward_kl"))
    case = cases["standard"]
    expected = case.expected["losses"]["sigmoid|beta=0.1|ls=0.1"]
    assert largest_difference(case, smoothed, expected) < 1e-4


@pytest.fixture(scope="module")
def reference_free(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "reference_free.json").read_text())["cases"]


def test_cpo_simpo_and_alphapo_are_those_of_trl(reference_free: dict[str, Any]) -> None:
    ours = {"sigmoid": "cpo", "hinge": "cpo_hinge", "ipo": "cpo_ipo", "simpo": "simpo"}
    seen = 0
    for name, case in reference_free.items():
        for key, entry in case["losses"].items():
            found = re.fullmatch(r"cpo/(\w+)\|beta=(.+)\|ls=(.+)\|alphapo_alpha=(.+)", key)
            if found is None:
                continue
            loss, beta, smoothing, alpha = found.groups()
            config = LossConfig(
                type=ours[loss],
                beta=float(beta),
                label_smoothing=float(smoothing),
                alphapo_alpha=float(alpha),
                simpo_gamma=entry["simpo_gamma"] or 0.0,
                cpo_alpha=0.0,
            )
            rows = row_losses(case, config)
            assert rows == pytest.approx(entry["losses"], rel=1e-4), f"{name} {key}"
            seen += 1
    assert seen > 100


def test_orpos_odds_ratio_is_that_of_trl(reference_free: dict[str, Any]) -> None:
    for name, case in reference_free.items():
        for beta in (0.1, 0.5):
            entry = case["losses"][f"orpo/odds_ratio|beta={beta}"]
            lengths = pair_lengths(case)[0]
            likelihood = -sum(case["policy_chosen_logp_sum"]) / sum(lengths)
            expected = [likelihood - term for term in entry["beta_times_logsigmoid_log_odds"]]
            assert row_losses(case, LossConfig(type="orpo", beta=beta)) == pytest.approx(expected, rel=1e-5), name


def pair_lengths(case: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Completion tokens, from the sums and means of the log-probs."""
    chosen, rejected = (
        [
            round(total / mean)
            for total, mean in zip(case[f"policy_{side}_logp_sum"], case[f"policy_{side}_logp_avg"], strict=True)
        ]
        for side in ("chosen", "rejected")
    )
    return chosen, rejected


def row_losses(case: dict[str, Any], config: LossConfig) -> list[float]:
    """The loss function itself on TRL's log-prob sums, a number a row."""
    chosen, rejected = mx.array(case["policy_chosen_logp_sum"]), mx.array(case["policy_rejected_logp_sum"])
    chosen_length, rejected_length = (mx.array(lengths, dtype=mx.float32) for lengths in pair_lengths(case))
    nothing = mx.zeros_like(chosen)
    tokens = nothing[:, None]
    pairs = Pairs(
        *(
            Side(policy=logps, reference=nothing, score=logps, length=length, tokens=tokens, mask=tokens)
            for logps, length in ((chosen, chosen_length), (rejected, rejected_length))
        )
    )
    return LOSSES[config.type].fn(pairs, config).tolist()
