"""The training loop, read from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optimizers

from mlx_dpo.config import RunConfig
from mlx_dpo.errors import DeviceError, device_error, device_errors
from mlx_dpo.evaluation.rows import evaluate_rows
from mlx_dpo.events import Evaluated, OnEvent, Saved, Started, Stepped, Warned, ignore
from mlx_dpo.losses.mix import check_loss_config
from mlx_dpo.macos import kept_awake
from mlx_dpo.models import lora
from mlx_dpo.planning.machine import own_limits
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
from mlx_dpo.training.step import Steps


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
    with (
        device_errors(),
        open_run(Path(config.train.output), resume=resume) as run,
        own_limits(),
        ExitStack() as run_long,
    ):
        run_long.enter_context(kept_awake(config.train.caffeinate))
        prepared = prepare(config, run_long, on_event)
        optimizer = make_optimizer(config.optim)
        optimizer.init(prepared.loaded.model.trainable_parameters())
        state = _where_to_begin(prepared, run, optimizer, resume=resume)
        take_step = Steps(prepared, optimizer)
        _warn(report.warn_of_reference(prepared), on_event)
        on_event(Started(report.facts(prepared), prepared.total_steps, state.step))
        save = partial(_save, prepared, run, optimizer, state, on_event)
        with _saved_if_the_device_fails(run, state, take_step, save), deferred_interrupt() as request:
            evaluated = bool(state.evaluations) and state.evaluations[-1]["step"] == state.step
            if not evaluated and (state.step == 0 or _due(config.train.steps_per_eval, state.step, prepared)):
                _evaluate(prepared, run, state, on_event)

            stop, saved_at = request.is_set(), time.monotonic()
            early = stops_early(config.train, state)
            while state.step < prepared.total_steps and not stop and not early:
                rate = learning_rate(config.optim, state.step, prepared.total_steps)
                minutes = (time.monotonic() - saved_at) / 60
                evaluate = _due(config.train.steps_per_eval, state.step + 1, prepared)
                save_now = _due(config.train.save_every, state.step + 1, prepared)
                save_now = save_now or minutes >= (config.train.save_every_minutes or math.inf)
                batches, place = _next_batches(prepared, state.epoch, state.position)
                ahead = None if evaluate or save_now else _next_batches(prepared, *place)[0]
                metrics = take_step(batches, rate, state, ahead)
                state.epoch, state.position = place

                # once in a while: report, evaluate, save
                _report(prepared, run, state, metrics, on_event)
                last = state.step == prepared.total_steps
                if evaluate:
                    _evaluate(prepared, run, state, on_event)
                    early = not last and stops_early(config.train, state)
                    answer_samples(prepared, run, state.step, on_event, last=last or early)
                if early:
                    run.append_metrics({"step": state.step, "early_stopping/best_step": state.best_step})
                stop = request.is_set()  # read once, so that the step that ends the run is the step that is saved
                if stop:
                    take_step.go_back()  # to this step, from the next one that was being described
                if save_now or stop or early:
                    save()
                    saved_at = time.monotonic()

        if not (config.train.keep_best and state.best):  # else the best evaluation's adapter is there
            lora.save(prepared.loaded.model, prepared.adapter, run.path, base=prepared.loaded.name)
        write_card(run.path)
        on_event(Saved(state.step, run.path))
        early = early and state.step < prepared.total_steps
        interrupted = state.step < prepared.total_steps and not early
        return TrainResult(
            run.path, state.step, prepared.total_steps, interrupted, state.evaluations, state.best_step, early
        )


def _next_batches(prepared: PreparedRun, epoch: int, position: int) -> tuple[list[list[int]], tuple[int, int]]:
    """The micro-batches of the step that begins there, and where the one after it begins: epoch and position."""
    batches = prepared.batches(epoch)
    taken = batches[position : position + prepared.config.train.grad_accumulation_steps]
    position += len(taken)
    return taken, (epoch + 1, 0) if position == len(batches) else (epoch, position)


def _due(every: int | None, step: int, prepared: PreparedRun) -> bool:
    """Whether what is done every so many steps, and after the last one, is due after `step`."""
    return step == prepared.total_steps or bool(every and step % every == 0)


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
        batch_size=prepared.config.train.batch_size, row_indices=prepared.held_out, noise=prepared.checked.noise,
        on_event=on_event,
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
    mx.clear_cache()  # steps are of other shapes


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


@contextmanager
def _saved_if_the_device_fails(
    run: RunFolder, state: TrainerState, take_step: Steps, save: Callable[[], None]
) -> Iterator[None]:
    """Inside the `with`, where GPU or memory fail, the last step that was finished is saved before the run ends."""
    try:
        yield
    except RuntimeError as error:
        if (found := device_error(error)) is None:
            raise
        take_step.go_back()
        if state.step and not run.checkpoint(state.step).exists():
            with suppress(RuntimeError):
                mx.synchronize()  # what the GPU still says of the step that failed
            with mx.stream(mx.cpu):
                save()
        kept = f"; it is saved as it was after step {state.step}, and --resume goes on from there" if state.step else ""
        raise DeviceError(f"after step {state.step}: {found.message}", found.remedy + kept) from error


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
