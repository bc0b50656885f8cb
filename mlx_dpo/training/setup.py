"""Everything before the first step: data, model, adapter, and the reference's log-probs."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_dpo.config import LoraConfig, LossConfig, ModelConfig, RunConfig
from mlx_dpo.data.batching import length, make_batch, order_batches
from mlx_dpo.data.load import load_splits
from mlx_dpo.data.records import Record
from mlx_dpo.data.tokenize import TokenizedRow, encode_records
from mlx_dpo.errors import ModelError, UsageError
from mlx_dpo.events import OnEvent, Progressed, Warned, ignore
from mlx_dpo.logprobs.activation_cache import ActivationCache
from mlx_dpo.logprobs.check import check_optimizations
from mlx_dpo.logprobs.scorer import UNCHECKED, Scorer
from mlx_dpo.losses import accepted_kinds, needs_reference
from mlx_dpo.models import lora
from mlx_dpo.models.load import LoadedModel, has_weights, load, read_weights, unload_blocks
from mlx_dpo.planning.machine import Machine, limit_memory, this_machine
from mlx_dpo.planning.plan import Plan, choose, fit_to_machine, remedy, said
from mlx_dpo.planning.traced_run import RunSpec
from mlx_dpo.reference import store
from mlx_dpo.reference.tr_dpo import MovingReference
from mlx_dpo.training.optim import make_optimizer
from mlx_dpo.types import Kind


@dataclass
class PreparedRun:
    """All that the loop works with. `rows` are those to train on and behind them those held out; so is `reference`."""

    config: RunConfig
    loaded: LoadedModel
    adapter: lora.Adapter
    scorer: Scorer
    rows: list[TokenizedRow]
    train_rows: int
    reference: store.RefLogps | MovingReference | None
    kind: Kind
    total_steps: int
    difference: float  # of a token's log-prob between the speed optimizations and the plain path, nats
    plan: Plan | None = None  # of its memory

    _epoch: int = -1
    _batches: list[list[int]] = field(default_factory=list)

    @property
    def held_out(self) -> range:
        """The row_indices of the held-out rows."""
        return range(self.train_rows, len(self.rows))

    def batches(self, epoch: int) -> list[list[int]]:
        """The micro-batches of an epoch as row_indices in `rows`."""
        if self._epoch != epoch:
            self._epoch, self._batches = epoch, epoch_batches(self.config, self.rows[: self.train_rows], epoch)
        return self._batches


def prepare(config: RunConfig, on_event: OnEvent = ignore) -> PreparedRun:
    """Everything before the first step: data, model, adapter, and the reference's log-probs.

    Raises:
        RunError: the run does not fit this machine.
    """
    spec, loaded, adapter = begin(config, partial(load, lazy=True), on_event)
    spec, plan = _fit_to_machine(spec, on_event)
    on_event(Progressed("loading the model", 0, 1, ""))
    read_weights(loaded)
    on_event(Progressed("loading the model", 1, 1, ""))
    config, everything = spec.config, spec.rows
    rows = everything[: spec.train_rows]
    steps = _total_steps(config, len(rows))
    row_indices = [*_visited(config, rows, steps), *range(len(rows), len(everything))]
    checkpoint = config.train.grad_checkpoint
    speed, difference = check_optimizations(
        loaded.model, everything, config.speed, checkpoint=checkpoint, on_event=on_event
    )
    if speed != plan.speed:
        _, plan = _fit_to_machine(replace(spec, config=replace(config, speed=speed)), on_event)
    budget = (speed.activation_cache_memory_gb * 1e9, speed.activation_cache_disk_gb * 1e9)
    activation_cache = ActivationCache(everything, *budget, row_indices) if speed.activation_cache else None
    scorer = Scorer(loaded.model, speed, checkpoint=checkpoint, activation_cache=activation_cache)
    if _fill_activation_cache(scorer, config.train.batch_size, everything, row_indices, on_event):
        unload_blocks(loaded, config.model, scorer.first_adapted)
    known = None
    if needs_reference(config.loss):
        known = _reference(config, loaded, scorer, adapter, everything, row_indices, on_event)
    mx.random.seed(config.train.seed)
    return PreparedRun(
        config, loaded, adapter, scorer, everything, len(rows), known, spec.kind, steps, difference, plan
    )


def _fit_to_machine(spec: RunSpec, on_event: OnEvent) -> tuple[RunSpec, Plan]:
    spec, plan = fit_to_machine(spec, this_machine(), on_event)
    limit_memory(plan.limit, plan.working)
    return spec, plan


def plan_run(config: RunConfig, machine: Machine | None = None, *, on_event: OnEvent = ignore) -> tuple[Plan, str]:
    """What a run will need in memory, before anything is loaded, and what to change where it does not fit.

    Only config.json and the tokenizer are read, and the rows. `machine` is this one if it is not given. With
    `train.auto` the plan is that of the settings that fit.

    Raises:
        MlxDpoError: the data, the model or the settings cannot be used.
    """
    machine = machine or this_machine()
    spec, loaded, _ = begin(config, partial(load, lazy=True, weights=False), on_event)
    spec, plan = choose(spec, machine)
    if not has_weights(loaded.path):
        plan.notes.append("the weights are not here yet: their form is what config.json says")
    change = said(spec.config, config) if plan.fits(machine) else remedy(spec, machine)
    return plan, change


def begin(
    config: RunConfig, load_model: Callable[[ModelConfig], LoadedModel], on_event: OnEvent = ignore
) -> tuple[RunSpec, LoadedModel, lora.Adapter]:
    """Rows as tokens, and the model that `load_model` gives with its adapter on it."""
    kind = kind_of(config.loss)
    splits = load_splits(
        config.data.path,
        valid_fraction=config.data.valid_fraction,
        seed=config.data.split_seed,
        kind=kind,
        on_event=on_event,
    )
    loaded = load_model(config.model)
    rows = _encoded(splits.train, loaded, config, "", on_event)
    valid = _encoded(splits.valid, loaded, config, "held out: ", on_event) if splits.valid else []
    if len(rows) < config.train.batch_size:
        on_event(
            Warned(f"{len(rows)} rows are fewer than a batch of {config.train.batch_size}: each step takes them all")
        )
    if kind == "unpaired":
        rows, valid = mismatched(rows), mismatched(valid)

    start = config.model.adapter
    if start:
        adapter = lora.load(loaded.model, start, dropout=config.lora.dropout)
        _check_own_settings(config, adapter)
    else:
        adapter = lora.attach(loaded.model, config.lora, seed=config.train.seed)
    optimizer = partial(make_optimizer, config.optim)
    return RunSpec(config, loaded.model, [*rows, *valid], len(rows), kind, optimizer), loaded, adapter


def _check_own_settings(config: RunConfig, adapter: lora.Adapter) -> None:
    """An adapter brings its own rank, scale and modules; another wish beside it would be ignored."""
    wanted, plain = config.lora, LoraConfig()
    scale = wanted.scale if wanted.alpha is None else wanted.alpha / wanted.rank
    asked = {
        "rank": (wanted.rank, plain.rank, adapter.rank),
        "scale": (scale, plain.scale, adapter.scale),
        "num_layers": (wanted.num_layers, plain.num_layers, adapter.num_layers),
        "keys": (wanted.keys, plain.keys, adapter.keys),
    }
    given = [
        f"{name} {value} (it has {own})" for name, (value, usual, own) in asked.items() if value not in (usual, own)
    ]
    if given:
        raise UsageError(
            f"training goes on with the adapter {config.model.adapter}, which cannot get {', '.join(given)}",
            "leave that out; of an adapter's settings only lora.dropout can be chosen anew",
        )


def _encoded(
    records: list[Record], loaded: LoadedModel, config: RunConfig, which: str, on_event: OnEvent
) -> list[TokenizedRow]:
    rows, report = encode_records(records, loaded.tokenizer, config.data)
    for text in report.warnings(config.data.max_length):
        on_event(Warned(which + text))
    return rows


def epoch_batches(config: RunConfig, rows: list[TokenizedRow], epoch: int) -> list[list[int]]:
    """The micro-batches of one epoch over the rows to train on."""
    train = config.train
    return order_batches(rows, train.batch_size, seed=train.seed, epoch=epoch, shuffle=train.shuffle)


def _total_steps(config: RunConfig, rows: int) -> int:
    if config.train.iters:
        return config.train.iters
    micro_batches = math.ceil(rows / config.train.batch_size)
    return math.ceil(config.train.epochs * math.ceil(micro_batches / config.train.grad_accumulation_steps))


def _visited(config: RunConfig, rows: list[TokenizedRow], steps: int) -> list[int]:
    """The row_indices that the run comes to: all of them, unless it ends within the first epoch."""
    batches = epoch_batches(config, rows, 0)[: steps * config.train.grad_accumulation_steps]
    return sorted(place for batch in batches for place in batch)


def _fill_activation_cache(
    scorer: Scorer, batch_size: int, rows: list[TokenizedRow], row_indices: list[int], on_event: OnEvent
) -> bool:
    """Computes what the frozen blocks give for the rows, before anything else and always in the same batches.

    Afterwards those blocks are not needed any more: whether it could be so.

    Rounding depends on the batch in which a row is computed. Were rows kept as they happen to come by, a resumed run,
    which meets them in other batches, would differ from a straight one in the last bits.
    """
    if scorer.activation_cache is None or scorer.first_adapted == 0:
        return False
    visited = len(row_indices)
    row_indices = [i for i in row_indices if rows[i].shares_prompt]
    row_indices.sort(key=lambda i: (len(rows[i].completions), length(rows[i])))
    for start in range(0, len(row_indices), batch_size):
        on_event(Progressed("frozen blocks", start, len(row_indices), "rows"))
        part = row_indices[start : start + batch_size]
        batch = make_batch([rows[i] for i in part], part)
        states = scorer.score(batch, gradient=False).states
        mx.eval(states)  # and not the log-probs: no block above is computed
        scorer.keep(batch, states)
        if scorer.activation_cache.no_room:
            break
    on_event(Progressed("frozen blocks", len(row_indices), len(row_indices), "rows"))
    if scorer.activation_cache.no_room:
        size = scorer.activation_cache.nbytes / 1e9
        on_event(
            Warned(
                f"what the frozen blocks give for {len(row_indices)} rows takes {size:.1f} GB, and is "
                "computed in every step: speed.activation_cache_memory_gb and …_disk_gb have no room for it"
            )
        )
    return not scorer.activation_cache.no_room and len(row_indices) == visited


def kind_of(loss: LossConfig) -> Kind:
    """The kind of rows that a loss is trained on: the one that loses nothing where it takes several."""
    kinds = accepted_kinds(loss)
    return next(kind for kind in ("demonstration", "unpaired", "ranking", "pair") if kind in kinds)


def mismatched(rows: list[TokenizedRow]) -> list[TokenizedRow]:
    """Unpaired rows with a second answer, the next row's: what KTO estimates its KL from (Ethayarajh et al. 2024)."""
    following = rows[1:] + rows[:1]
    return [
        row._replace(completions=row.completions + other.completions, starts=row.starts * 2, ranks=(1.0, 0.0))
        for row, other in zip(rows, following, strict=True)
    ]


def _reference(
    config: RunConfig,
    loaded: LoadedModel,
    scorer: Scorer,
    adapter: lora.Adapter,
    rows: list[TokenizedRow],
    row_indices: list[int],
    on_event: OnEvent,
) -> store.RefLogps | MovingReference:
    """log π_ref of every row, from the model that `loss.reference` names; a TR-DPO reference can move from there."""
    wanted, size = config.loss.reference, config.train.batch_size
    if wanted not in ("base", "start"):
        other = _reference_model(config, loaded)
        plain = Scorer(other.model, UNCHECKED)
        digest = store.model_digest(other, with_adapter=True)
        return store.compute_reference(plain, rows, digest, batch_size=size, row_indices=row_indices, on_event=on_event)
    from_base = wanted == "base" or not config.model.adapter
    digest = store.model_digest(loaded, with_adapter=not from_base)
    with lora.switched_off(loaded.model) if from_base else nullcontext():
        loaded.model.eval()
        known = store.compute_reference(
            scorer, rows, digest, batch_size=size, row_indices=row_indices, on_event=on_event
        )
    if config.loss.ref_model_sync_steps is None:
        return known
    alpha = config.loss.ref_model_mixup_alpha
    return MovingReference(scorer, rows, adapter, known, alpha, from_base=from_base)


def _reference_model(config: RunConfig, loaded: LoadedModel) -> LoadedModel:
    """Another model, or the base with another adapter, by the folder or Hub name in `loss.reference`."""
    wanted = config.loss.reference
    if (Path(wanted).expanduser() / "adapter_config.json").is_file():
        other = load(replace(config.model, adapter=None))
        lora.load(other.model, wanted)
    else:
        other = load(replace(config.model, path=wanted, revision=None, adapter=None))
        if other.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
            raise ModelError(
                f"--reference {wanted} has another tokenizer than {config.model.path}: ids mean other tokens",
                "a reference must read the same tokens, as another size or prepared of the same model family does",
            )
    other.model.eval()
    return other


def fingerprint(prepared: PreparedRun) -> dict[str, Any]:
    """What decides the batches and what they mean; a checkpoint is only good where all of it is the same."""
    config = prepared.config
    ids = hashlib.blake2b(digest_size=16)
    for row in prepared.rows:
        ids.update(json.dumps([row.prompt, row.completions, row.starts, row.ranks, row.label]).encode())
    return {
        "rows": f"{prepared.train_rows} + {len(prepared.held_out)}, {ids.hexdigest()}",
        "model": f"{prepared.loaded.name}, {store.model_digest(prepared.loaded, with_adapter=False)}",
        "start": config.model.adapter,
        "lora": asdict(prepared.adapter) | {"keys": list(prepared.adapter.keys), "dropout": config.lora.dropout},
        "loss": asdict(config.loss),
        "optim": asdict(config.optim),
        "total_steps": prepared.total_steps,
        "order": [
            config.train.seed,
            config.train.shuffle,
            config.train.batch_size,
            config.train.grad_accumulation_steps,
        ],
    }
