"""How a model ranks preferences, from its name and that of the data: as a summary or row by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from mlx_dpo.config import DataConfig, LossConfig, ModelConfig, SpeedConfig
from mlx_dpo.data.batching import WINDOW
from mlx_dpo.data.load import load_to_judge
from mlx_dpo.data.records import Record, kind_of
from mlx_dpo.data.tokenize import EncodeReport, TokenizedRow, encode_records
from mlx_dpo.errors import ModelError, UsageError
from mlx_dpo.evaluation.rows import Score, describe_answers, describe_pair, evaluate_rows, replay, score_rows
from mlx_dpo.events import OnEvent, Progressed, Warned, ignore
from mlx_dpo.logprobs.check import check_optimizations
from mlx_dpo.logprobs.scorer import Scorer
from mlx_dpo.losses import accepted_kinds, needs_reference
from mlx_dpo.models import lora
from mlx_dpo.models.load import LoadedModel, load
from mlx_dpo.reference import store
from mlx_dpo.reference.store import RefLogps
from mlx_dpo.training.setup import kind_of as trained_on
from mlx_dpo.training.setup import mismatched
from mlx_dpo.types import Kind

Split = Literal["auto", "train", "valid", "test"]
"""Which rows of the data. auto: a folder's test file, else its valid file, else all of it. valid, where the data has no
such file: the rows that training holds out."""


ACCURACY = ("rewards/accuracies", "accuracy_low", "accuracy_high")
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
    setup = set_up(
        model, data, loss, (trained_on(loss), *accepted_kinds(loss)), split=split,
        reference_adapter=reference_adapter, batch_size=batch_size, on_event=on_event,
    )  # fmt: skip
    found = evaluate_rows(
        setup.score, setup.rows, setup.ref_logps, loss, setup.kind, batch_size=batch_size, on_event=on_event
    )
    if setup.is_reference:
        found = {name: value for name, value in found.items() if name not in ACCURACY}
    report = setup.report
    return {
        "model": model.path,
        "adapter": model.adapter,
        "data": data.path,
        "objective": loss.type,
        "reference": "none" if setup.ref_logps is None else reference_adapter or loss.reference,
        "rows": report.kept,
        "dropped": len(report.dropped),
        "cut_rows": report.cut_rows,
        "cut_tokens": report.cut_tokens,
        "lost_eos": report.lost_eos,
        "prompt_tokens": report.prompt_tokens,
        "completion_tokens": report.completion_tokens,
    } | found


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
    setup = set_up(
        model, data, loss, get_args(Kind), split=split,
        reference_adapter=reference_adapter, batch_size=batch_size, on_event=on_event,
    )  # fmt: skip
    describe = describe_pair if setup.kind == "pair" else describe_answers
    window = WINDOW * batch_size
    for start in range(0, len(setup.rows), window):
        on_event(Progressed("scoring", start, len(setup.rows), "rows"))
        row_indices = range(start, min(start + window, len(setup.rows)))
        policy = score_rows(setup.score, setup.rows, batch_size, row_indices)
        for i, found in zip(row_indices, policy, strict=True):
            yield describe(setup.rows[i], found, setup.ref_logps[i] if setup.ref_logps is not None else None, loss.beta)
    on_event(Progressed("scoring", len(setup.rows), len(setup.rows), "rows"))


def set_up(
    model: ModelConfig,
    data: DataConfig,
    loss: LossConfig,
    kinds: Sequence[Kind],
    *,
    split: Split = "auto",
    reference_adapter: str | None = None,
    batch_size: int = 8,
    on_event: OnEvent = ignore,
) -> EvalSetup:
    """Loads data, model and adapters, and computes the reference's log-probs or finds them on disk.

    Rows of another kind than `kinds` are converted to the first of those.
    """
    other = _reference_model(model, reference_adapter or loss.reference) if needs_reference(loss) else None
    kind, records = _records(data, kinds, split, on_event)
    loaded = _load(other or model, on_event)
    rows, report = encode_records(records, loaded.tokenizer, data)
    for text in report.warnings(data.max_length):
        on_event(Warned(text))
    if kind == "unpaired":
        rows = mismatched(rows)
    if other is None:
        return EvalSetup(_with_adapter(loaded, model.adapter, rows, on_event), rows, None, False, kind, report)
    from_base = other == replace(model, adapter=None)
    scorer = _with_adapter(loaded, model.adapter if from_base else other.adapter, rows, on_event)
    digest = store.model_digest(loaded, with_adapter=not from_base)
    with lora.switched_off(loaded.model) if from_base and model.adapter else nullcontext():
        ref_logps = store.compute_reference(scorer, rows, digest, batch_size=batch_size, on_event=on_event)
    if other == model:
        return EvalSetup(replay(ref_logps), rows, ref_logps, True, kind, report)
    if not from_base:
        vocabulary = loaded.tokenizer.get_vocab()
        loaded = _load(model, on_event)
        if loaded.tokenizer.get_vocab() != vocabulary:
            raise ModelError(
                f"the reference {loss.reference} has another tokenizer than {model.path}: ids mean other tokens",
                "a reference must read the same tokens, as another size or stage of the same model family does",
            )
        scorer = _with_adapter(loaded, model.adapter, rows, on_event)
    return EvalSetup(scorer, rows, ref_logps, False, kind, report)


def _reference_model(model: ModelConfig, wanted: str) -> ModelConfig:
    """The model that `wanted` names: base, an adapter's folder, another model's folder or Hub name.

    Raises:
        UsageError: it is to be the starting adapter, which nobody named.
    """
    if wanted == "start":
        raise UsageError(
            "the reference is to be the starting adapter, but which one that was is not said",
            "name its folder as the reference",
        )
    if wanted == "base":
        return replace(model, adapter=None)
    if (Path(wanted).expanduser() / "adapter_config.json").is_file():
        return replace(model, adapter=wanted)
    return replace(model, path=wanted, revision=None, adapter=None)


def _load(model: ModelConfig, on_event: OnEvent) -> LoadedModel:
    on_event(Progressed("loading the model", 0, 1, ""))
    loaded = load(model)
    on_event(Progressed("loading the model", 1, 1, ""))
    return loaded


def _with_adapter(loaded: LoadedModel, adapter: str | None, rows: Sequence[TokenizedRow], on_event: OnEvent) -> Scorer:
    """Puts `adapter` on the model and gives a scorer by the optimizations that hold for it."""
    if adapter:
        lora.load(loaded.model, adapter)
    speed = SpeedConfig(activation_cache=False)  # of use only from the second pass on
    speed, _ = check_optimizations(loaded.model, rows, speed, on_event=on_event)
    loaded.model.eval()
    return Scorer(loaded.model, speed)


def _records(data: DataConfig, kinds: Sequence[Kind], split: Split, on_event: OnEvent) -> tuple[Kind, list[Record]]:
    records = load_to_judge(
        data.path, kinds, split, valid_fraction=data.valid_fraction, seed=data.split_seed, on_event=on_event
    )
    return cast(Kind, kind_of(records[0])), records
