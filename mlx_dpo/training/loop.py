"""The training loop, read from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_map

from mlx_dpo.config import RunConfig
from mlx_dpo.data.batching import Batch, make_batch
from mlx_dpo.errors import RunError
from mlx_dpo.evaluation.rows import evaluate_rows
from mlx_dpo.events import Evaluated, OnEvent, Saved, Started, Stepped, Warned, ignore
from mlx_dpo.logprobs.scorer import wanted_stats
from mlx_dpo.losses.metrics import Sums, averages
from mlx_dpo.losses.mix import check_loss_config
from mlx_dpo.losses.objective import batch_loss, batch_weight
from mlx_dpo.models import lora
from mlx_dpo.planning.machine import own_limits
from mlx_dpo.reference import store
from mlx_dpo.run.card import write_card
from mlx_dpo.run.folder import RunFolder, open_run
from mlx_dpo.settings import check_config, to_yaml
from mlx_dpo.training import report
from mlx_dpo.training.checkpoint import TrainerState, restore_checkpoint, save_checkpoint
from mlx_dpo.training.early_stopping import stops_early
from mlx_dpo.training.interrupt import deferred_interrupt
from mlx_dpo.training.optim import learning_rate, make_optimizer
from mlx_dpo.training.samples import answer_samples
from mlx_dpo.training.setup import PreparedRun, fingerprint, prepare


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. `evaluations` are the held-out metrics, with their `step`, from before the first one on."""

    output: Path
    steps: int
    total_steps: int
    interrupted: bool
    evaluations: list[dict[str, float]]
    best_step: int
    stopped_early: bool = False


def train(config: RunConfig, *, resume: bool = False, on_event: OnEvent = ignore) -> TrainResult:
    """Trains an adapter as `config` says and leaves it in `config.train.output`.

    The first Ctrl-C (SIGINT, SIGTERM) ends the run after the step at hand with a checkpoint; `resume` goes on from the
    newest one with exactly the batches, random numbers and optimizer state that would have come.

    Raises:
        MlxDpoError: of the kind that says what is wrong with the data, the model, the settings or the run folder.
    """
    check_config(config)
    check_loss_config(config.loss)
    with open_run(Path(config.train.output), resume=resume) as run, own_limits(), ExitStack() as run_long:
        prepared = prepare(config, run_long, on_event)
        optimizer = make_optimizer(config.optim)
        optimizer.init(prepared.loaded.model.trainable_parameters())
        state = _where_to_begin(prepared, run, optimizer, resume=resume)
        take_step = make_step(prepared, optimizer)
        _warn(report.warn_of_reference(prepared), on_event)
        on_event(Started(report.facts(prepared), prepared.total_steps, state.step))
        with deferred_interrupt() as request:
            if state.step == 0:
                _evaluate(prepared, run, state, on_event)

            stop = request.is_set()
            early = stops_early(config.train, state)
            while state.step < prepared.total_steps and not stop and not early:
                rate = learning_rate(config.optim, state.step, prepared.total_steps)
                metrics = take_step(_next_batches(prepared, state), rate, state)

                # once in a while: report, evaluate, save
                _report(prepared, run, state, metrics, on_event)
                last = state.step == prepared.total_steps
                every = config.train.steps_per_eval
                if last or (every and state.step % every == 0):
                    _evaluate(prepared, run, state, on_event)
                    early = not last and stops_early(config.train, state)
                    answer_samples(prepared, run, state.step, on_event, last=last or early)
                if early:
                    run.append_metrics({"step": state.step, "early_stopping/best_step": state.best_step})
                stop = request.is_set()  # read once, so that the step that ends the run is the step that is saved
                if last or stop or early or state.step % config.train.save_every == 0:
                    _save(prepared, run, optimizer, state, on_event)

        if not (config.train.keep_best and state.best):  # else the best evaluation's adapter is there
            lora.save(prepared.loaded.model, prepared.adapter, run.path, base=prepared.loaded.name)
        write_card(run.path)
        on_event(Saved(state.step, run.path))
        early = early and state.step < prepared.total_steps
        interrupted = state.step < prepared.total_steps and not early
        return TrainResult(
            run.path, state.step, prepared.total_steps, interrupted, state.evaluations, state.best_step, early
        )


def make_step(
    prepared: PreparedRun, optimizer: optimizers.Optimizer
) -> Callable[[list[list[int]], float, TrainerState], dict[str, float]]:
    """What takes one optimizer step: gradients weighted by `batch_weight`, clipped, applied; it gives the metrics.

    It is called with the step's micro-batches (row indices), the learning rate and the run's state.
    """
    config, model, moving = prepared.config, prepared.loaded.model, prepared.moving_reference
    stats = wanted_stats(config)

    def objective(model: nn.Module, batch: Batch, ref_logps: mx.array | None, share: float) -> tuple[mx.array, Sums]:
        policy = prepared.scorer(batch, stats, gradient=True)
        loss, sums = batch_loss(policy, ref_logps, batch, config.loss, prepared.kind)
        return loss * share, sums

    gradient_of = nn.value_and_grad(model, objective)

    def step(micro_batches: list[list[int]], rate: float, state: TrainerState) -> dict[str, float]:
        began = time.perf_counter()
        model.train()
        batches = [make_batch([prepared.rows[i] for i in indices], indices) for indices in micro_batches]
        total = sum(batch_weight(batch, config.loss) for batch in batches)
        gradients, parts = None, []
        for batch in batches:
            ref_logps = None if prepared.ref_logps is None else store.batch_ref_logps(prepared.ref_logps, batch)
            (_, sums), fresh = gradient_of(model, batch, ref_logps, batch_weight(batch, config.loss) / total)
            gradients = fresh if gradients is None else tree_map(mx.add, gradients, fresh)
            mx.eval(gradients, sums)  # here: one micro-batch's activations are gone before the next one's
            parts.append(sums)
            state.tokens += int(batch.tokens_length.sum())
            del fresh  # else it would keep the unclipped gradients beside the clipped ones
        gradients, norm = optimizers.clip_grad_norm(gradients, config.optim.max_grad_norm or math.inf)
        optimizer.learning_rate = rate
        optimizer.update(model, gradients)
        mx.eval(model.trainable_parameters(), optimizer.state)
        state.step += 1
        if moving is not None and state.step % (config.loss.ref_model_sync_steps or 1) == 0:
            moving.follow()
        state.seconds += time.perf_counter() - began
        metrics = averages(parts) | {"grad_norm": norm.item(), "learning_rate": rate}
        if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["grad_norm"]):
            raise RunError(
                f"step {state.step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; not saved",
                "lower --learning-rate, or look at the rows with `mlx-dpo check`; --resume goes on from a checkpoint",
            )
        return metrics

    return step


def _next_batches(prepared: PreparedRun, state: TrainerState) -> list[list[int]]:
    """The micro-batches of the next step; moves the position on, into the next epoch after the last one."""
    batches = prepared.batches(state.epoch)
    taken = batches[state.position : state.position + prepared.config.train.grad_accumulation_steps]
    state.position += len(taken)
    if state.position == len(batches):
        state.epoch, state.position = state.epoch + 1, 0
    return taken


def _report(
    prepared: PreparedRun, run: RunFolder, state: TrainerState, metrics: dict[str, float], on_event: OnEvent
) -> None:
    if state.step == 1:
        _warn(report.warn_of_first_step(prepared, metrics), on_event)
    _warn(report.warn_of_kl(state, prepared.config, metrics, "the rows of this step"), on_event)
    if state.step % prepared.config.train.steps_per_report == 0 or state.step == prepared.total_steps:
        batches = math.ceil(prepared.train_rows / prepared.config.train.batch_size)
        metrics |= {
            "epoch": state.epoch + state.position / batches,
            "num_tokens": float(state.tokens),
            "seconds": state.seconds,
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
        }
        run.append_metrics({"step": state.step} | metrics)
    on_event(Stepped(state.step, prepared.total_steps, metrics))


def _evaluate(prepared: PreparedRun, run: RunFolder, state: TrainerState, on_event: OnEvent) -> None:
    """Scores the held-out rows, and keeps the adapter where it is the best so far (the lowest held-out loss)."""
    if not prepared.held_out:
        return
    prepared.loaded.model.eval()
    found = evaluate_rows(
        prepared.scorer, prepared.rows, prepared.ref_logps, prepared.config.loss, prepared.kind,
        batch_size=prepared.config.train.batch_size, row_indices=prepared.held_out, on_event=on_event,
    )  # fmt: skip
    if "logps/chosen" in found and prepared.kind in ("pair", "ranking"):
        start = state.evaluations[0]["logps/chosen"] if state.evaluations else found["logps/chosen"]
        found["logps/chosen_drift"] = found["logps/chosen"] - start
        _warn(report.warn_of_drift(state, found), on_event)
    _warn(report.warn_of_kl(state, prepared.config, found, "the held-out rows"), on_event)
    state.evaluations.append({"step": float(state.step)} | found)
    best = state.step > 0 and (state.best is None or found["loss"] < state.best["loss"])
    if best:
        state.best, state.best_step = found, state.step
        if prepared.config.train.keep_best:
            lora.save(prepared.loaded.model, prepared.adapter, run.path, base=prepared.loaded.name)
    run.append_metrics({"step": state.step} | {f"eval_{name}": value for name, value in found.items()})
    on_event(Evaluated(state.step, found, best))


def _where_to_begin(
    prepared: PreparedRun, run: RunFolder, optimizer: optimizers.Optimizer, *, resume: bool
) -> TrainerState:
    """A fresh start, or with `resume` the state of the newest checkpoint; the files of the run are brought to it."""
    settings = fingerprint(prepared)
    checkpoints = run.checkpoints() if resume else []
    if not checkpoints:
        run.config.write_text(to_yaml(prepared.config))
        state = TrainerState(fingerprint=settings)
    else:
        state = restore_checkpoint(checkpoints[-1], prepared.loaded.model, optimizer, settings)
        if prepared.moving_reference is not None:
            prepared.moving_reference.restore(checkpoints[-1])
    run.keep_metrics_until(state.step if checkpoints else -1)
    return state


def _warn(text: str | None, on_event: OnEvent) -> None:
    if text:
        on_event(Warned(text))


def _save(
    prepared: PreparedRun, run: RunFolder, optimizer: optimizers.Optimizer, state: TrainerState, on_event: OnEvent
) -> None:
    path = save_checkpoint(
        run, prepared.loaded.model, prepared.adapter, optimizer, state,
        base=prepared.loaded.name, keep=prepared.config.train.keep_checkpoints, reference=prepared.moving_reference,
    )  # fmt: skip
    on_event(Saved(state.step, path))
