"""Everything before the first step: rows, model, adapter, the memory it will take, and the reference's log-probs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.config import LoraConfig, ModelConfig, RunConfig
from mlx_dpo.data.batching import batches_by_length, epoch_batches, mismatched, order_batches, steps_of
from mlx_dpo.data.load import load_splits
from mlx_dpo.data.records import Record
from mlx_dpo.data.tokenize import EncodeReport, TokenizedRow, encode_records, template_warning
from mlx_dpo.errors import UsageError
from mlx_dpo.events import OnEvent, Progressed, Warned, ignore
from mlx_dpo.logprobs.activation_cache import ActivationCache
from mlx_dpo.logprobs.check import Checked, check_optimizations
from mlx_dpo.logprobs.scorer import Scorer
from mlx_dpo.losses.mix import needs_reference, reads_mismatched, row_kind
from mlx_dpo.models import lora
from mlx_dpo.models.gated_delta import trainable_gated_delta
from mlx_dpo.models.load import LoadedModel, has_weights, load, read_weights, unload_blocks
from mlx_dpo.planning.machine import Machine, limit_memory, this_machine
from mlx_dpo.planning.plan import Plan, choose_settings, fit_to_machine, remedy, said
from mlx_dpo.planning.traced_run import RunSpec
from mlx_dpo.reference import choose, store
from mlx_dpo.reference.store import RefLogps
from mlx_dpo.reference.tr_dpo import MovingReference
from mlx_dpo.training.early_stopping import check_early_stopping
from mlx_dpo.training.optim import make_optimizer
from mlx_dpo.training.samples import choose_samples
from mlx_dpo.types import Kind

TOKEN_BY_TOKEN = ("mamba", "jamba", "recurrent_gemma", "rwkv7", "bailing_moe_linear")
"""Files of mlx-lm whose recurrent blocks have a loop over tokens and no other way with a gradient."""


@dataclass
class PreparedRun:
    """All that the loop works with. `rows` are those to train on and behind them those held out; so are `ref_logps`."""

    config: RunConfig
    loaded: LoadedModel
    adapter: lora.Adapter
    scorer: Scorer
    rows: list[TokenizedRow]
    train_rows: int
    ref_logps: RefLogps | MovingReference | None
    ref_file: Path | None  # where they are kept
    kind: Kind
    total_steps: int
    checked: Checked  # how exact the optimizations are, and what rounding does
    plan: Plan | None = None  # of its memory
    blocks_unloaded: bool = False  # the frozen blocks' weights, since the activation cache has what they give
    samples: Mapping[int, str] = field(default_factory=dict)  # rows whose prompts are answered, with the prompts' words
    base_answers: list[str] | None = None  # to them, once there are any

    _epoch: int = -1
    _batches: list[list[int]] = field(default_factory=list)

    @property
    def held_out(self) -> range:
        """The indices of the held-out rows."""
        return range(self.train_rows, len(self.rows))

    @property
    def moving_reference(self) -> MovingReference | None:
        """The reference, where it is one that follows the policy (TR-DPO)."""
        return self.ref_logps if isinstance(self.ref_logps, MovingReference) else None

    def batches(self, epoch: int) -> list[list[int]]:
        """The micro-batches of an epoch as indices of `rows`."""
        if self._epoch != epoch:
            self._epoch, self._batches = epoch, epoch_batches(self.rows[: self.train_rows], self.config.train, epoch)
        return self._batches


def prepare(config: RunConfig, run_long: ExitStack, on_event: OnEvent = ignore) -> PreparedRun:
    """Everything before the first step; what must hold until the last one is entered into `run_long`.

    In this order: what does not fit is refused before any weight is read; optimizations are checked before anything
    relies on them; the frozen blocks come before the reference, which then starts from their output; and the random
    numbers of training are seeded last, whatever came before.

    Raises:
        RunError: the run does not fit this machine.
    """
    spec, loaded, adapter = begin(config, partial(load, lazy=True), on_event)
    check_early_stopping(config.train, len(spec.rows) - spec.train_rows, steps_of(spec.train_rows, config.train)[1])
    spec, plan = _fit_to_machine(spec, on_event)
    on_event(Progressed("loading the model", 0, 1, ""))
    read_weights(loaded)
    on_event(Progressed("loading the model", 1, 1, ""))
    config, rows = spec.config, spec.rows
    _, steps = steps_of(spec.train_rows, config.train)
    visited = spec.visited
    checkpoint = config.train.grad_checkpoint
    with trainable_gated_delta(loaded.model):  # left again, since planning traces such blocks in a way of its own
        checked = check_optimizations(loaded.model, rows, config.speed, checkpoint=checkpoint, on_event=on_event)
    speed = checked.speed
    mx.clear_cache()  # of each phase: its buffers fit no later one, and a GPU would keep them
    if speed != plan.speed:  # the plan took the model's word for it
        _, plan = _fit_to_machine(replace(spec, config=replace(config, speed=speed)), on_event)
    run_long.enter_context(trainable_gated_delta(loaded.model))
    budget = (speed.activation_cache_memory_gb * 1e9, speed.activation_cache_disk_gb * 1e9)
    cache = ActivationCache(rows, *budget, visited) if speed.activation_cache else None
    scorer = Scorer(loaded.model, speed, checkpoint=checkpoint, activation_cache=cache)
    unloaded = _fill_activation_cache(scorer, config.train.batch_size, rows, visited, on_event)
    if unloaded:
        unload_blocks(loaded, config.model, scorer.first_adapted)
    mx.clear_cache()
    ref_logps, ref_file = None, None
    if needs_reference(config.loss):
        ref_logps, ref_file = _reference(config, loaded, scorer, adapter, rows, visited, on_event)
        mx.clear_cache()
    mx.random.seed(config.train.seed)
    return PreparedRun(
        config, loaded, adapter, scorer, rows, spec.train_rows, ref_logps, ref_file, spec.kind, steps, checked, plan,
        blocks_unloaded=unloaded, samples=spec.samples,
    )  # fmt: skip


def _fit_to_machine(spec: RunSpec, on_event: OnEvent) -> tuple[RunSpec, Plan]:
    spec, plan = fit_to_machine(spec, this_machine(), on_event)
    limit_memory(plan.limit, plan.buffer_cache)
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
    spec, plan = choose_settings(spec, machine)
    if not has_weights(loaded.path):
        plan.notes.append("the weights are not here yet: their form is what config.json says")
    change = said(spec.config, config) if plan.fits(machine) else remedy(spec, machine)
    return plan, change


def begin(
    config: RunConfig, load_model: Callable[[ModelConfig], LoadedModel], on_event: OnEvent = ignore
) -> tuple[RunSpec, LoadedModel, lora.Adapter]:
    """Rows as tokens, and the model that `load_model` gives with its adapter on it."""
    kind = row_kind(config.loss)
    splits = load_splits(
        config.data.path,
        valid_fraction=config.data.valid_fraction,
        seed=config.data.split_seed,
        kind=kind,
        on_event=on_event,
    )
    loaded = load_model(config.model)
    if text := warn_of_loop(loaded.model):
        on_event(Warned(text))
    rows, report = _encoded(splits.train, loaded, config, "", on_event)
    valid: list[TokenizedRow] = []
    held_out = EncodeReport()
    if splits.valid:
        valid, held_out = _encoded(splits.valid, loaded, config, "held out: ", on_event)
    for text in template_warning(report, held_out):
        on_event(Warned(text))
    if len(rows) < config.train.batch_size:
        on_event(
            Warned(f"{len(rows)} rows are fewer than a batch of {config.train.batch_size}: each step takes them all")
        )
    if reads_mismatched(config.loss):
        rows = mismatched(rows, epoch_batches(rows, config.train, 0))
        size = config.train.batch_size
        valid = mismatched(valid, order_batches(valid, size, seed=0, epoch=0, shuffle=False))

    start = config.model.adapter
    if start:
        adapter = lora.load(loaded.model, start, dropout=config.lora.dropout)
        _check_own_settings(config, adapter)
    else:
        adapter = lora.attach(loaded.model, config.lora, seed=config.train.seed)
    optimizer = partial(make_optimizer, config.optim)
    spec = RunSpec(config, loaded.model, [*rows, *valid], len(rows), kind, optimizer)
    asked = choose_samples([*splits.train, *splits.valid], spec.rows, len(rows), config.train.eval_samples)
    return replace(spec, samples=asked), loaded, adapter


def warn_of_loop(model: nn.Module) -> str | None:
    """What reading token by token will cost, where a model has no other way; planning counts its memory."""
    family = type(model).__module__.rpartition(".")[2]
    if family not in TOKEN_BY_TOKEN:
        return None
    return (
        f"{family} blocks read a text token by token where a gradient is wanted, and keep a state for each: a step "
        "takes many times as long as with attention, and memory grows with the length. Short rows (--max-length) and "
        "few blocks (--num-layers) help; Mamba 2, gated-delta and convolution hybrids are read in chunks"
    )


def _check_own_settings(config: RunConfig, adapter: lora.Adapter) -> None:
    """An adapter brings its own rank, scale and modules; another wish beside it would be ignored."""
    wanted, plain = config.lora, LoraConfig()
    scale = wanted.scale if wanted.alpha is None else wanted.alpha / wanted.rank
    asked = {
        "rank": (wanted.rank, plain.rank, adapter.rank),
        "scale": (scale, plain.scale, adapter.scale),
        "num_layers": (wanted.num_layers, plain.num_layers, adapter.num_layers),
        "keys": (wanted.keys, plain.keys, adapter.keys),
        "fine_tune_type": (wanted.fine_tune_type, plain.fine_tune_type, adapter.fine_tune_type),
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
) -> tuple[list[TokenizedRow], EncodeReport]:
    rows, report = encode_records(records, loaded.tokenizer, config.data)
    for text in report.warnings(config.data.max_length):
        on_event(Warned(which + text))
    return rows, report


def _fill_activation_cache(
    scorer: Scorer, batch_size: int, rows: list[TokenizedRow], row_indices: list[int], on_event: OnEvent
) -> bool:
    """Computes what the frozen blocks give for the rows, before anything else and always in the same batches.

    Gives whether all of it is kept, so that those blocks are not needed any more.

    Rounding depends on the batch in which a row is computed. Were rows kept as they happen to come by, a resumed run,
    which meets them in other batches, would differ from a straight one in the last bits.
    """
    if scorer.activation_cache is None or scorer.first_adapted == 0:
        return False
    cached = [i for i in row_indices if rows[i].shares_prompt]
    for batch in batches_by_length(rows, batch_size, cached, work="frozen blocks", on_event=on_event):
        states = scorer.score(batch, gradient=False).states
        mx.eval(states)  # and not the log-probs: no block above is computed
        scorer.keep(batch, states)
        if scorer.activation_cache.no_room:
            on_event(Progressed("frozen blocks", len(cached), len(cached), "rows"))
            size = scorer.activation_cache.nbytes / 1e9
            on_event(
                Warned(
                    f"what the frozen blocks give for {len(cached)} rows takes {size:.1f} GB, and is computed in every "
                    "step: speed.activation_cache_memory_gb and speed.activation_cache_disk_gb have no room for it"
                )
            )
            return False
    return len(cached) == len(row_indices)


def _reference(
    config: RunConfig,
    loaded: LoadedModel,
    scorer: Scorer,
    adapter: lora.Adapter,
    rows: list[TokenizedRow],
    row_indices: list[int],
    on_event: OnEvent,
) -> tuple[RefLogps | MovingReference, Path]:
    """log π_ref of every row, from the model that `loss.reference` names, and where it is kept.

    A TR-DPO reference begins there and moves later.
    """
    wanted = choose.reference_model(config.loss.reference, config.model, config.model.adapter)
    how = {"batch_size": config.train.batch_size, "row_indices": row_indices, "on_event": on_event}
    logps, file = choose.compute_ref_logps(wanted, config.model, loaded, scorer, rows, **how)
    if config.loss.ref_model_sync_steps is None:
        return logps, file
    alpha, from_base = config.loss.ref_model_mixup_alpha, wanted.adapter is None
    return MovingReference(scorer, rows, adapter, logps, alpha, from_base=from_base), file


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
