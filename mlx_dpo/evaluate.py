"""How a model ranks preferences: accuracy with its interval, rewards, log-probs, KL; as a summary or row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import mlx.core as mx
import numpy as np

from mlx_dpo import lora, reference
from mlx_dpo.arrays import Kind, TokenLogps
from mlx_dpo.batching import WINDOW, Batch, length, make_batch
from mlx_dpo.config import DataConfig, LossConfig, ModelConfig, SpeedConfig
from mlx_dpo.data.load import load_records, load_splits
from mlx_dpo.data.sources import read_splits
from mlx_dpo.encode import EncodeReport, TokenizedRow, encode_records
from mlx_dpo.errors import ModelError, UsageError
from mlx_dpo.events import OnEvent, Phase, Warned, ignore
from mlx_dpo.logprobs import Scorer
from mlx_dpo.losses import accepted_kinds, compute_loss, needs_reference
from mlx_dpo.metrics import Sums, averages, batch_metrics, ranked_accuracy, wilson_interval
from mlx_dpo.model import LoadedModel, load
from mlx_dpo.prepare import kind_of as trained_on
from mlx_dpo.prepare import mismatched
from mlx_dpo.records import Record, kind_of
from mlx_dpo.reference import Reference
from mlx_dpo.speed import settle

Score = Callable[..., TokenLogps]
"""What gives a batch's token log-probs: a `Scorer`, or something that is called like one."""

Split = Literal["auto", "train", "valid", "test"]
"""Which rows of the data. auto: a folder's test file, else its valid file, else all of it. valid, where the data has no
such file: the rows that training holds out."""


ACCURACY = ("rewards/accuracies", "accuracy_low", "accuracy_high")
"""What says nothing where the policy is the reference."""


@dataclass(frozen=True)
class Bench:
    """A model, its reference and the rows to judge it by, ready to be scored.

    `known` are the rows' reference log-probs, None without a reference; `is_reference` says that the policy is the
    reference itself, so nothing is computed twice and every reward is exactly 0.
    """

    score: Score
    rows: list[TokenizedRow]
    known: Reference | None
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
    bench = set_up(
        model, data, loss, (trained_on(loss), *accepted_kinds(loss)), split=split,
        reference_adapter=reference_adapter, batch_size=batch_size, on_event=on_event,
    )  # fmt: skip
    found = evaluate_rows(
        bench.score, bench.rows, bench.known, loss, bench.kind, batch_size=batch_size, on_event=on_event
    )
    if bench.is_reference:
        found = {name: value for name, value in found.items() if name not in ACCURACY}
    report = bench.report
    return {
        "model": model.path,
        "adapter": model.adapter,
        "data": data.path,
        "objective": loss.type,
        "reference": "none" if bench.known is None else reference_adapter or loss.reference,
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
    bench = set_up(
        model, data, loss, get_args(Kind), split=split,
        reference_adapter=reference_adapter, batch_size=batch_size, on_event=on_event,
    )  # fmt: skip
    describe = describe_pair if bench.kind == "pair" else describe_answers
    window = WINDOW * batch_size
    for start in range(0, len(bench.rows), window):
        on_event(Phase("scoring", start, len(bench.rows), "rows"))
        places = range(start, min(start + window, len(bench.rows)))
        policy = score_rows(bench.score, bench.rows, batch_size, places)
        for i, found in zip(places, policy, strict=True):
            yield describe(bench.rows[i], found, bench.known[i] if bench.known is not None else None, loss.beta)
    on_event(Phase("scoring", len(bench.rows), len(bench.rows), "rows"))


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
) -> Bench:
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
        return Bench(_with_adapter(loaded, model.adapter, rows, on_event), rows, None, False, kind, report)
    from_base = other == replace(model, adapter=None)
    scorer = _with_adapter(loaded, model.adapter if from_base else other.adapter, rows, on_event)
    digest = reference.model_digest(loaded, with_adapter=not from_base)
    with lora.switched_off(loaded.model) if from_base and model.adapter else nullcontext():
        known = reference.compute_reference(scorer, rows, digest, batch_size=batch_size, on_event=on_event)
    if other == model:
        return Bench(replay(known), rows, known, True, kind, report)
    if not from_base:
        vocabulary = loaded.tokenizer.get_vocab()
        loaded = _load(model, on_event)
        if loaded.tokenizer.get_vocab() != vocabulary:
            raise ModelError(
                f"the reference {loss.reference} has another tokenizer than {model.path}: ids mean other tokens",
                "a reference must read the same tokens, as another size or stage of the same model family does",
            )
        scorer = _with_adapter(loaded, model.adapter, rows, on_event)
    return Bench(scorer, rows, known, False, kind, report)


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
    on_event(Phase("loading the model", 0, 1, ""))
    loaded = load(model)
    on_event(Phase("loading the model", 1, 1, ""))
    return loaded


def _with_adapter(loaded: LoadedModel, adapter: str | None, rows: Sequence[TokenizedRow], on_event: OnEvent) -> Scorer:
    """Puts `adapter` on the model and gives a scorer by the levers that hold for it."""
    if adapter:
        lora.load(loaded.model, adapter)
    speed = SpeedConfig(trunk=False)  # of use only from the second pass on
    speed, _ = settle(loaded.model, rows, speed, on_event=on_event)
    loaded.model.eval()
    return Scorer(loaded.model, speed)


def _records(data: DataConfig, kinds: Sequence[Kind], split: Split, on_event: OnEvent) -> tuple[Kind, list[Record]]:
    records = _split(data, None if len(set(kinds)) > 1 else kinds[0], split, on_event)
    own = cast(Kind, kind_of(records[0]))
    return (own, records) if own in kinds else (kinds[0], _split(data, kinds[0], split, on_event))


def _split(data: DataConfig, kind: Kind | None, split: Split, on_event: OnEvent) -> list[Record]:
    there = ["train"] if data.path == "-" else list(read_splits(data.path))
    if split == "valid" and "valid" not in there:
        return load_splits(
            data.path, valid_fraction=data.valid_fraction, seed=data.split_seed, kind=kind, on_event=on_event
        ).valid
    wanted = next(name for name in ("test", "valid", "train") if name in there) if split == "auto" else split
    return load_records(data.path, kind, split=wanted, on_event=on_event)


def replay(known: Reference) -> Score:
    """What was computed once, in a scorer's place: exactly the same numbers, however rows are batched."""

    def score(batch: Batch, stats: tuple[str, ...] = (), *, gradient: bool = False) -> TokenLogps:
        return TokenLogps(reference.reference_batch(known, batch))

    return score


def score_rows(
    score: Score, rows: Sequence[TokenizedRow], batch_size: int, places: Sequence[int] | None = None
) -> Reference:
    """Token log-probs of the rows at `places` (all without them), in that order, for a model in evaluation mode."""
    found: dict[int, list[np.ndarray]] = {}
    for batch in by_length(rows, batch_size, places):
        found.update(zip(batch.index.tolist(), reference.score_batch(cast(Scorer, score), batch), strict=True))
    return [found[i][: len(rows[i].completions)] for i in (range(len(rows)) if places is None else places)]


def describe_pair(
    row: TokenizedRow, policy: list[np.ndarray], known: list[np.ndarray] | None, beta: float
) -> dict[str, Any]:
    """A pair's line of `score`."""
    whole = describe_answers(row, policy, known, beta)
    chosen, rejected = whole["rewards"]
    base = whole["ref_logps"] or (None, None)
    return {
        "id": row.id,
        "chosen_logps": whole["logps"][0],
        "rejected_logps": whole["logps"][1],
        "ref_chosen_logps": base[0],
        "ref_rejected_logps": base[1],
        "chosen_tokens": whole["tokens"][0],
        "rejected_tokens": whole["tokens"][1],
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "margin": chosen - rejected,
    }


def describe_answers(
    row: TokenizedRow, policy: list[np.ndarray], known: list[np.ndarray] | None, beta: float
) -> dict[str, Any]:
    """A ranking's, an unpaired row's or a demonstration's line of `score`; KTO's mismatched answer is left out."""
    judged = [k for k, rank in enumerate(row.ranks) if rank > 0]
    logps = [float(policy[k].sum(dtype=np.float64)) for k in judged]
    base = None if known is None else [float(known[k].sum(dtype=np.float64)) for k in judged]
    line: dict[str, Any] = {
        "id": row.id,
        "logps": logps,
        "ref_logps": base,
        "tokens": [len(row.completions[k]) - (not row.context(k)) for k in judged],
        "rewards": [beta * (own - ref) for own, ref in zip(logps, base or [0.0] * len(logps), strict=True)],
    }
    if row.label:
        line["label"] = row.label > 0
    elif len(judged) > 1:
        line["ranks"] = list(row.ranks)
    return line


def by_length(rows: Sequence[TokenizedRow], batch_size: int, places: Sequence[int] | None = None) -> Iterator[Batch]:
    """Batches of like length and number of answers, for passes in which order does not matter.

    Of the rows at `places` where they are given; a batch's `index` are places in `rows`.
    """
    wanted = range(len(rows)) if places is None else places
    order = sorted(wanted, key=lambda i: (len(rows[i].completions), length(rows[i])))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        yield make_batch([rows[i] for i in part], part)


def evaluate_rows(
    score: Score,
    rows: Sequence[TokenizedRow],
    known: Reference | None,
    loss: LossConfig,
    kind: Kind,
    *,
    batch_size: int,
    places: Sequence[int] | None = None,
    stats: tuple[str, ...] = (),
    on_event: OnEvent = ignore,
) -> dict[str, float]:
    """TRL's metrics over the rows at `places` (all without them), as if they were one batch, for a policy in
    evaluation mode.

    Beside them `accuracy_low` and `accuracy_high`, the 95 % Wilson interval of rewards/accuracies over `comparisons`
    pairs, and of pairs and rankings how log-probs alone rank them. `known` are the rows' reference log-probs; None for
    losses without a reference.
    """
    parts: list[Sums] = []
    done, total = 0, len(rows if places is None else places)
    for batch in by_length(rows, batch_size, places):
        on_event(Phase("evaluation", done, total, "rows"))
        policy = score(batch, stats, gradient=False)
        base = reference.reference_batch(known, batch) if known is not None else None
        mask, rank, label = mx.array(batch.mask), mx.array(batch.rank), labels(batch, kind)
        output = compute_loss(policy, base, mask, rank, label, loss)
        sums = batch_metrics(output, policy, base, mask, rank, label, kind)
        if kind in ("pair", "ranking"):
            sums |= logp_accuracies("logps", policy.logps, mask, rank)
            sums |= logp_accuracies("ref_logps", base, mask, rank) if base is not None else {}
        mx.eval(sums)
        parts.append(sums)
        done += len(batch.index)
    on_event(Phase("evaluation", done, total, "rows"))
    return averages(parts) | accuracy_interval(parts)


def logp_accuracies(name: str, logps: mx.array, mask: mx.array, rank: mx.array) -> Sums:
    """Pairs whose better answer the model finds likelier, by the sum over tokens and by the mean; `logps [R, K, C]`.

    It needs no reference: how a model ranks before any training. A sum favours short answers, a mean does not.
    """
    total = logps.sum(-1)
    return {
        f"{name}/accuracies": ranked_accuracy(total, rank),
        f"{name}/accuracies_per_token": ranked_accuracy(total / mx.maximum(mask.sum(-1), 1), rank),
    }


def labels(batch: Batch, kind: Kind) -> mx.array | None:
    """The judgements of unpaired rows, `[R]` float; None for every other kind."""
    return mx.array(batch.label.astype(np.float32)) if kind == "unpaired" else None


def accuracy_interval(parts: Sequence[Sums]) -> dict[str, float]:
    """The 95 % interval of the accuracy over all parts; empty where nothing was compared."""
    counted = [part["rewards/accuracies"] for part in parts if "rewards/accuracies" in part]
    comparisons = sum(float(mean.number) for mean in counted)
    if not comparisons:
        return {}
    low, high = wilson_interval(sum(float(mean.total) for mean in counted), comparisons)
    return {"accuracy_low": low, "accuracy_high": high, "comparisons": comparisons}
