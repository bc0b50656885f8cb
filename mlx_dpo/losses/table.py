"""The DPO family: each loss a pure function of named log-probs, in one table with what trainer and checks need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import mlx.core as mx

from mlx_dpo.config import LossConfig
from mlx_dpo.losses import demonstration, pair, ranking, unpaired
from mlx_dpo.losses import reference_free as free
from mlx_dpo.types import Kind

# What losses read of LossConfig, by family; `check_loss_config` refuses what none of a mix reads.
REFERENCE = frozenset({"reference", "ref_model_sync_steps", "ref_model_mixup_alpha"})
PAIR = REFERENCE | {"beta", "ld_alpha", "use_weighting"}
MARGIN = PAIR | {"f_divergence_type", "f_alpha_divergence_coef"}
AOT = PAIR - {"use_weighting"} | {"label_smoothing"}  # sorted over the micro-batch: no row has a loss to weigh
CPO = frozenset({"beta", "cpo_alpha", "alphapo_alpha"})
SIMPO = frozenset({"beta", "simpo_gamma", "alphapo_alpha", "label_smoothing"})
KTO = REFERENCE | {"beta", "desirable_weight", "undesirable_weight"}


Reward = Callable[[mx.array, mx.array, mx.array, LossConfig], mx.array]


def implicit_reward(logps: mx.array, reference: mx.array, length: mx.array, config: LossConfig) -> mx.array:
    """β (log π(y|x) - log π_ref(y|x)), DPO's reward; all [R, K]. TRL logs it whichever f-divergence is trained on."""
    return config.beta * (logps - reference)


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """One loss.

    - `fn(view, config)` gives [R], or [] where the loss is one number for the micro-batch. `kind` is the view it takes.
    - `reference`: required; optional, when only differences between a row's answers count, so that a run may go without
      (`reference: none`); or unused.
    - `reads_mismatched`: whether it reads another row's answer as each row's second one (`batching.mismatched`).
    - `mean_over`: rows, when the loss of a micro-batch is the mean over its rows; tokens, when it is the mean over its
      completion tokens; batch, when its rows depend on each other or both means occur, so that micro-batches do not add
      up to a large batch.
    - `options`: the fields of LossConfig that it reads.
    - `reward(logps, reference_logps, length, config)` gives what the metrics call its rewards; all [R, K].
    """

    fn: Callable[..., mx.array]
    kind: Kind = "pair"
    reference: Literal["required", "optional", "unused"] = "required"
    reads_mismatched: bool = False
    mean_over: Literal["rows", "tokens", "batch"] = "rows"
    options: frozenset[str] = PAIR
    reward: Reward = implicit_reward


_unreferenced = partial(LossSpec, reference="unused", reward=free.mean_reward)

LOSSES: dict[str, LossSpec] = {
    "sigmoid": LossSpec(fn=pair.sigmoid, reference="optional", options=MARGIN),
    "hinge": LossSpec(fn=pair.hinge, reference="optional", options=MARGIN),
    "ipo": LossSpec(fn=pair.ipo, reference="optional", options=MARGIN),
    "exo_pair": LossSpec(fn=pair.exo_pair, reference="optional", options=MARGIN | {"label_smoothing"}),
    "nca_pair": LossSpec(fn=pair.nca_pair),
    "robust": LossSpec(fn=pair.robust, reference="optional", options=MARGIN | {"label_smoothing"}),
    "bco_pair": LossSpec(fn=pair.bco_pair),
    "sppo_hard": LossSpec(fn=pair.sppo_hard),
    "aot": LossSpec(fn=pair.aot, mean_over="batch", options=AOT),
    "aot_unpaired": LossSpec(fn=pair.aot_unpaired, mean_over="batch", options=AOT),
    "apo_zero": LossSpec(fn=pair.apo_zero),
    "apo_down": LossSpec(fn=pair.apo_down),
    "discopop": LossSpec(fn=pair.discopop, reference="optional", options=MARGIN | {"discopop_tau"}),
    "sft": LossSpec(
        fn=demonstration.sft, kind="demonstration", reference="unused", mean_over="tokens", options=frozenset()
    ),
    "sigmoid_norm": LossSpec(fn=pair.sigmoid_norm, reference="optional", options=MARGIN),
    "cdpo": LossSpec(fn=pair.cdpo, reference="optional", options=MARGIN | {"label_smoothing"}),
    "dpop": LossSpec(fn=pair.dpop, options=PAIR | {"dpop_lambda"}),
    "cpo": _unreferenced(fn=free.cpo, options=CPO | {"label_smoothing"}, reward=free.sum_reward, mean_over="batch"),
    "cpo_hinge": _unreferenced(fn=free.cpo_hinge, options=CPO, reward=free.sum_reward, mean_over="batch"),
    "cpo_ipo": _unreferenced(fn=free.cpo_ipo, options=CPO, mean_over="batch"),
    "simpo": _unreferenced(fn=free.simpo, options=SIMPO),
    "orpo": _unreferenced(fn=free.orpo, options=frozenset({"beta"}), mean_over="batch"),
    "unlikelihood": _unreferenced(fn=free.unlikelihood, options=frozenset({"unlikelihood_alpha"})),
    "plackett_luce": LossSpec(
        fn=ranking.plackett_luce, kind="ranking", reference="optional", options=REFERENCE | {"beta"}
    ),
    "kto": LossSpec(fn=unpaired.kto, kind="unpaired", reads_mismatched=True, mean_over="batch", options=KTO),
    "apo_zero_unpaired": LossSpec(fn=unpaired.apo_zero_unpaired, kind="unpaired", options=KTO),
}
