"""The table of losses: each name with its function and the facts that the trainer and the checks need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from mlx_dpo.config import LossConfig
from mlx_dpo.losses import demonstration, pair, ranking, reference_free, unpaired
from mlx_dpo.losses.views import ACCEPTS
from mlx_dpo.types import Kind

REFERENCE = frozenset({"reference", "ref_model_sync_steps", "ref_model_mixup_alpha"})
PAIR = REFERENCE | {"beta", "ld_alpha", "use_weighting"}
MARGIN = PAIR | {"f_divergence_type", "f_alpha_divergence_coef"}
CPO = frozenset({"beta", "cpo_alpha", "alphapo_alpha"})
KTO = REFERENCE | {"beta", "desirable_weight", "undesirable_weight"}


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
    reward: Callable[[mx.array, mx.array, mx.array, LossConfig], mx.array] = implicit_reward

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads the reference's log-probs when there are any."""
        return self.reference != "unused"

    @property
    def accepts(self) -> frozenset[Kind]:
        """The kinds of rows that it can be trained on."""
        return ACCEPTS[self.kind]


LOSSES: dict[str, LossSpec] = {
    "sigmoid": LossSpec(fn=pair.sigmoid, reference="optional", options=MARGIN),
    "hinge": LossSpec(fn=pair.hinge, reference="optional", options=MARGIN),
    "ipo": LossSpec(fn=pair.ipo, reference="optional", options=MARGIN),
    "exo_pair": LossSpec(fn=pair.exo_pair, reference="optional", options=MARGIN | {"label_smoothing"}),
    "nca_pair": LossSpec(fn=pair.nca_pair),
    "robust": LossSpec(fn=pair.robust, reference="optional", options=MARGIN | {"label_smoothing"}),
    "bco_pair": LossSpec(fn=pair.bco_pair),
    "sppo_hard": LossSpec(fn=pair.sppo_hard),
    "aot": LossSpec(fn=pair.aot, mean_over="batch", options=PAIR - {"use_weighting"} | {"label_smoothing"}),
    "aot_unpaired": LossSpec(
        fn=pair.aot_unpaired, mean_over="batch", options=PAIR - {"use_weighting"} | {"label_smoothing"}
    ),
    "apo_zero": LossSpec(fn=pair.apo_zero),
    "apo_down": LossSpec(fn=pair.apo_down),
    "discopop": LossSpec(fn=pair.discopop, reference="optional", options=MARGIN | {"discopop_tau"}),
    "sft": LossSpec(
        fn=demonstration.sft, kind="demonstration", reference="unused", mean_over="tokens", options=frozenset()
    ),
    "sigmoid_norm": LossSpec(fn=pair.sigmoid_norm, reference="optional", options=MARGIN),
    "cdpo": LossSpec(fn=pair.cdpo, reference="optional", options=MARGIN | {"label_smoothing"}),
    "dpop": LossSpec(fn=pair.dpop, options=PAIR | {"dpop_lambda"}),
    "cpo": LossSpec(
        fn=reference_free.cpo,
        reference="unused",
        mean_over="batch",
        options=CPO | {"label_smoothing"},
        reward=reference_free.sum_reward,
    ),
    "cpo_hinge": LossSpec(
        fn=reference_free.cpo_hinge,
        reference="unused",
        mean_over="batch",
        options=CPO,
        reward=reference_free.sum_reward,
    ),
    "cpo_ipo": LossSpec(
        fn=reference_free.cpo_ipo,
        reference="unused",
        mean_over="batch",
        options=CPO,
        reward=reference_free.mean_reward,
    ),
    "simpo": LossSpec(
        fn=reference_free.simpo,
        reference="unused",
        options=frozenset({"beta", "simpo_gamma", "alphapo_alpha", "label_smoothing"}),
        reward=reference_free.mean_reward,
    ),
    "orpo": LossSpec(
        fn=reference_free.orpo,
        reference="unused",
        mean_over="batch",
        options=frozenset({"beta"}),
        reward=reference_free.mean_reward,
    ),
    "unlikelihood": LossSpec(
        fn=reference_free.unlikelihood,
        reference="unused",
        options=frozenset({"unlikelihood_alpha"}),
        reward=reference_free.mean_reward,
    ),
    "plackett_luce": LossSpec(
        fn=ranking.plackett_luce, kind="ranking", reference="optional", options=REFERENCE | {"beta"}
    ),
    "kto": LossSpec(fn=unpaired.kto, kind="unpaired", reads_mismatched=True, mean_over="batch", options=KTO),
    "apo_zero_unpaired": LossSpec(fn=unpaired.apo_zero_unpaired, kind="unpaired", options=KTO),
}
