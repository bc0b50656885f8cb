"""How a model ranks preferences, from its name and that of the data: as a summary or row by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import mlx.core as mx

from mlx_dpo.config import DataConfig, LossConfig, ModelConfig, SpeedConfig
from mlx_dpo.data.batching import WINDOW, mismatched, order_batches
from mlx_dpo.data.load import load_to_judge
from mlx_dpo.data.records import kind_of
from mlx_dpo.data.tokenize import EncodeReport, TokenizedRow, encode_records, template_warning
from mlx_dpo.evaluation.rows import Score, describe_answers, describe_pair, evaluate_rows, replay, score_rows
from mlx_dpo.events import OnEvent, Progressed, Warned, ignore
from mlx_dpo.logprobs.check import check_optimizations
from mlx_dpo.logprobs.scorer import Scorer
from mlx_dpo.losses.mix import accepted_kinds, needs_reference, reads_mismatched, row_kind
from mlx_dpo.models import lora
from mlx_dpo.models.gated_delta import trainable_gated_delta
from mlx_dpo.models.load import LoadedModel, load, read_weights
from mlx_dpo.reference import choose
from mlx_dpo.reference.store import RefLogps
from mlx_dpo.types import Kind

Split = Literal["auto", "train", "valid", "test"]
"""Which rows of the data. auto: a folder's test file, else its valid file, else all of it. valid, where the data has no
such file: the rows that training holds out."""


COUNTED = ("cut_rows", "cut_tokens", "lost_eos", "prompt_tokens", "completion_tokens")
ACCURACY = ("rewards/accuracies", "accuracy_low", "accuracy_high", "rewards/within_noise")
"""What says nothing where the policy is the reference."""


@dataclass(frozen=True)
class EvalSetup:
    """A model, its reference and the rows to judge it by, ready to be scored.

    `ref_logps` are the rows' reference log-probs, None without a reference; `is_reference` says that the policy is the
    reference itself, so nothing is computed twice and every reward is exactly 0.
    """

    score: Score
    rows: list[TokenizedRow]
    ref_logps: RefLogps | None
    is_reference: bool
    kind: Kind
    report: EncodeReport
    noise: float = 0.0  # what rounding does to a token's log-prob, nats


def evaluate(
    model: ModelConfig,
    data: DataConfig,
    loss: LossConfig | None = None,
    *,
    split: Split = "auto",
    reference_adapter: str | None = None,
    batch_size: int = 8,
    on_event: OnEvent = ignore,
) -> dict[str, Any]:
    """TRL's metrics of a model with its adapter over a file or folder of preferences, and what was counted.

    The policy is `model.path` with `model.adapter`; the reference is the base model, or what `loss.reference` names,
    or the folder `reference_adapter`. Without an adapter the policy is the reference: rewards are 0 and rank nothing,
    so rewards/accuracies and its interval are left out. `logps/accuracies` says even then what share of pairs has the
    higher summed log-prob on its chosen side, `logps/accuracies_per_token` the same of log-probs per token,
    `ref_logps/…` of the reference.

    Beside the metrics: `accuracy_low` and `accuracy_high` (the 95 % interval of rewards/accuracies), `rows`, `dropped`,
    `cut_rows`, `cut_tokens`, `lost_eos`, `prompt_tokens`, `completion_tokens`, and by name `model`, `adapter`, `data`,
    `reference`, `objective`.

    Raises:
        MlxDpoError: the data, the model or an adapter cannot be used, or they do not go together.
    """
    loss = loss or LossConfig()
    kinds = (row_kind(loss), *accepted_kinds(loss))
    with set_up(model, data, loss, kinds, split, reference_adapter, batch_size, on_event) as setup:
        found = evaluate_rows(
            setup.score, setup.rows, setup.ref_logps, loss, setup.kind, batch_size=batch_size, noise=setup.noise,
            on_event=on_event,
        )  # fmt: skip
    if setup.is_reference:
        found = {name: value for name, value in found.items() if name not in ACCURACY}
    report = setup.report
    return (
        {
            "model": model.path,
            "adapter": model.adapter,
            "data": data.path,
            "objective": loss.type,
            "reference": "none" if setup.ref_logps is None else reference_adapter or loss.reference,
            "rows": report.kept,
            "dropped": len(report.dropped),
        }
        | {name: getattr(report, name) for name in COUNTED}
        | found
    )


def score(
    model: ModelConfig,
    data: DataConfig,
    loss: LossConfig | None = None,
    *,
    split: Split = "auto",
    reference_adapter: str | None = None,
    batch_size: int = 8,
    on_event: OnEvent = ignore,
) -> Iterator[dict[str, Any]]:
    """One JSON-ready object a row, in file order, as soon as its window of batches is scored.

    Of pairs: `id, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_tokens, rejected_tokens,
    chosen_reward, rejected_reward, margin`: log-probs summed over the answer's scored tokens in nats, the number of
    those tokens, and DPO's implicit reward β (log π - log π_ref). Of other rows: `id, logps, ref_logps, tokens,
    rewards` as lists with an entry an answer, and `ranks` of a ranking, `label` of an unpaired row. Without a reference
    (`loss.reference: none`) the reference's values are None and log π_ref counts as 0. Dropped rows have no object.

    Raises:
        MlxDpoError: the data, the model or an adapter cannot be used, or they do not go together.
    """
    loss = loss or LossConfig()
    with set_up(model, data, loss, get_args(Kind), split, reference_adapter, batch_size, on_event) as setup:
        describe = describe_pair if setup.kind == "pair" else describe_answers
        window = WINDOW * batch_size
        for start in range(0, len(setup.rows), window):
            on_event(Progressed("scoring", start, len(setup.rows), "rows"))
            row_indices = range(start, min(start + window, len(setup.rows)))
            policy = score_rows(setup.score, setup.rows, batch_size, row_indices)
            for i, found in zip(row_indices, policy, strict=True):
                ref_logps = setup.ref_logps[i] if setup.ref_logps is not None else None
                yield describe(setup.rows[i], found, ref_logps, loss.beta)
        on_event(Progressed("scoring", len(setup.rows), len(setup.rows), "rows"))


@contextmanager
def set_up(
    model: ModelConfig,
    data: DataConfig,
    loss: LossConfig,
    kinds: Sequence[Kind],
    split: Split,
    reference_adapter: str | None,
    batch_size: int,
    on_event: OnEvent,
) -> Iterator[EvalSetup]:
    """Loads data, model and adapters, and computes the reference's log-probs or finds them on disk.

    Rows of another kind than `kinds` are converted to the first of those.
    """
    wanted = reference_adapter or loss.reference
    start = choose.started_from(model.adapter) if wanted == "start" else None
    reference = choose.reference_model(wanted, model, start) if needs_reference(loss) else None
    records = load_to_judge(data, kinds, split, on_event)
    kind = cast(Kind, kind_of(records[0]))
    loaded = load(model, lazy=True)
    rows, report = encode_records(records, loaded.tokenizer, data)
    for text in (*report.warnings(data.max_length), *template_warning(report)):
        on_event(Warned(text))
    if kind == "unpaired" and reads_mismatched(loss):
        rows = mismatched(rows, order_batches(rows, batch_size, seed=0, epoch=0, shuffle=False))
    found = None
    how = {"batch_size": batch_size, "on_event": on_event}
    if reference is not None and choose.is_other_model(reference, model):
        # before the policy's weights are read, so that one model at a time is in memory
        found = choose.compute_ref_logps(reference, model, loaded, None, rows, **how)
        mx.clear_cache()  # of the other model's weights
    with trainable_gated_delta(loaded.model):
        scorer, noise = _with_adapter(loaded, model.adapter, rows, on_event)
        if reference is not None and found is None:
            found = choose.compute_ref_logps(reference, model, loaded, scorer, rows, **how)
        mx.clear_cache()
        if found is not None and reference == model:
            yield EvalSetup(replay(found.logps), rows, found.logps, True, kind, report)
        else:
            yield EvalSetup(scorer, rows, found.logps if found else None, False, kind, report, noise)


def _with_adapter(
    loaded: LoadedModel, adapter: str | None, rows: Sequence[TokenizedRow], on_event: OnEvent
) -> tuple[Scorer, float]:
    """Reads the weights, puts `adapter` on the model, and gives a scorer that holds for it, and its rounding noise."""
    on_event(Progressed("loading the model", 0, 1, ""))
    read_weights(loaded)
    on_event(Progressed("loading the model", 1, 1, ""))
    if adapter:
        lora.load(loaded.model, adapter)
    speed = SpeedConfig(activation_cache=False)  # of use only from the second pass on
    checked = check_optimizations(loaded.model, rows, speed, on_event=on_event)
    loaded.model.eval()
    return Scorer(loaded.model, checked.speed), checked.noise
