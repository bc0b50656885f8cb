"""How much memory a run will need, told before anything of it is computed, and the settings with which it fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.config import RunConfig, SpeedConfig
from mlx_dpo.data.tokenize import truncate
from mlx_dpo.errors import RunError
from mlx_dpo.events import OnEvent, Warned, ignore
from mlx_dpo.losses.mix import mean_over
from mlx_dpo.models.lora import LEAVES
from mlx_dpo.planning.batch_shape import BatchShape
from mlx_dpo.planning.graph import Unknown
from mlx_dpo.planning.machine import CPU_CACHE, PROCESS_BYTES, Machine, in_gb
from mlx_dpo.planning.peak_memory import IN_FLIGHT, peak_memory
from mlx_dpo.planning.traced_run import (
    CachedActivations,
    Phase,
    RunSpec,
    TracedRun,
    persistent_memory,
    trace_run,
    update_memory,
)


@dataclass(frozen=True)
class Plan:
    """What a run will need, in bytes.

    `peak` is the most that MLX's arrays take at once, `parts` what for, and `phases` the peak of each phase of the run.
    With more room than that MLX runs ahead and takes more: `limit` is the memory from which on it is to wait.
    `buffer_cache` is what MLX may keep, on top of `peak`, of what was freed: on a GPU as much as a phase works with, as
    far as there is room; none where memory is short. `cache_in_memory` (outside MLX) or
    `cache_on_disk` is the size of the activation cache, `largest` the micro-batch of most tokens, `speed` the
    optimizations that the model's code takes; `notes` say what is not counted.
    """

    peak: int
    parts: dict[str, int]
    phases: dict[str, int]
    limit: int
    buffer_cache: int
    cache_in_memory: int
    cache_on_disk: int
    largest: BatchShape | None
    speed: SpeedConfig
    notes: list[str]

    def fits(self, machine: Machine) -> bool:
        """Whether the run can be done on `machine`."""
        return machine.fits(self.peak, self.cache_in_memory)


def foresee(spec: RunSpec, machine: Machine) -> Plan:
    """What the run of `spec` will need on `machine`.

    Where MLX cannot describe what the model does, the gradients of experts' adapters are left out, or else all
    activations; a note says so.
    """
    notes: list[str] = []
    try:
        run = _trace_run(spec, notes)
    except Unknown as error:
        notes = [f"activations are not counted, since MLX cannot describe what this model does: {error}"]
        memory = persistent_memory(spec)
        phase = Phase(memory, update_memory(memory))  # the one that needs no graph
        run = TracedRun({"the update": phase}, None, spec.config.speed, CachedActivations(0, "nowhere"))

    on_gpu = mx.default_device() == mx.gpu
    in_flight = IN_FLIGHT["gpu" if on_gpu else "cpu"]
    working = {
        name: phase.working if isinstance(phase.working, int) else peak_memory(phase.working, in_flight)
        for name, phase in run.phases.items()
    }
    phases = {name: sum(phase.parts.values()) + working[name] for name, phase in run.phases.items()}
    highest = max(phases, key=lambda name: phases[name])
    in_memory = run.cached.nbytes if run.cached.where == "memory" else 0
    parts = run.phases[highest].parts | {"update" if highest == "the update" else "activations": working[highest]}
    return Plan(
        peak=phases[highest],
        parts={name: size for name, size in parts.items() if size},
        phases=phases,
        limit=machine.usable if on_gpu or notes else phases[highest],  # on a CPU running ahead gains nothing
        buffer_cache=min(max(working.values()), machine.room(phases[highest], in_memory)) if on_gpu else CPU_CACHE,
        cache_in_memory=in_memory,
        cache_on_disk=run.cached.nbytes if run.cached.where == "disk" else 0,
        largest=run.largest,
        speed=run.speed,
        notes=notes,
    )


def _trace_run(spec: RunSpec, notes: list[str]) -> TracedRun:
    """The traced run, if need be without the gradients of experts' adapters, which MLX 0.32 cannot describe."""
    experts = [m for _, m in spec.model.named_modules() if "lora_a" in m and m["lora_a"].ndim == 3]
    try:
        return trace_run(spec)
    except Unknown:
        if not experts:
            raise
    with _frozen(experts):
        found = trace_run(spec)
    notes.append("what the gradients of the experts' adapters take is not counted")
    return found


def alternatives(config: RunConfig) -> Iterator[RunConfig]:
    """The settings, then others with the same mathematics that need less memory, the faster ones first.

    Rows of an optimizer step stay together, in more and smaller micro-batches where the loss is a mean over rows;
    checkpointing computes activations twice. Losses whose rows depend on each other keep their micro-batch.
    """
    train = config.train
    cuts = [train]
    if mean_over(config.loss) != "batch":
        sizes = [size for size in range(train.batch_size - 1, 0, -1) if train.batch_size % size == 0]
        rows = train.batch_size * train.grad_accumulation_steps
        cuts += [replace(train, batch_size=n, grad_accumulation_steps=rows // n) for n in sizes]
    for checkpoint in dict.fromkeys((train.grad_checkpoint, True)):
        yield from (replace(config, train=replace(cut, grad_checkpoint=checkpoint)) for cut in cuts)


def lesser(config: RunConfig) -> Iterator[RunConfig]:
    """Settings that need less memory and train something else, with as little memory as the same mathematics allow."""
    *_, least = alternatives(config)
    for layers in (16, 8, 4):
        if config.lora.num_layers == -1 or layers < config.lora.num_layers:
            yield replace(least, lora=replace(least.lora, num_layers=layers))
    for length in (1024, 512, 256, 128):
        if config.data.max_length is None or length < config.data.max_length:
            yield replace(least, data=replace(least.data, max_length=length))


def choose_settings(spec: RunSpec, machine: Machine) -> tuple[RunSpec, Plan]:
    """The run as asked or, with `train.auto`, with the same mathematics in so little memory that it fits."""
    if spec.config.train.auto and (found := fit(spec, machine, alternatives(spec.config))):
        return found
    return spec, foresee(spec, machine)


def fit_to_machine(spec: RunSpec, machine: Machine, on_event: OnEvent = ignore) -> tuple[RunSpec, Plan]:
    """What `choose_settings` gives, where it fits `machine`.

    Raises:
        RunError: it does not fit; the remedy says what would.
    """
    chosen, plan = choose_settings(spec, machine)
    if not plan.fits(machine):
        parts = ", ".join(f"{name} {in_gb(size)}" for name, size in plan.parts.items() if size >= 5e7)
        cache = f" and {in_gb(plan.cache_in_memory)} of cached activations" if plan.cache_in_memory else ""
        raise RunError(
            f"this run does not fit: its arrays take {in_gb(plan.peak)} at once ({parts}){cache}, and {machine.name} "
            f"has {in_gb(machine.usable)} for them",
            remedy(spec, machine),
        )
    for note in plan.notes:
        on_event(Warned(note))
    train = replace(chosen.config.train, auto=False)  # who goes on with the run must not choose again
    return replace(chosen, config=replace(chosen.config, train=train)), plan


def fit(spec: RunSpec, machine: Machine, configs: Iterable[RunConfig]) -> tuple[RunSpec, Plan] | None:
    """The run with the first of `configs` that fits `machine`; None where none does."""
    for config in configs:
        changed = _changed(spec, config)
        count = config.lora.num_layers
        with _frozen([] if count == -1 else spec.model.layers[:-count]):
            plan = foresee(changed, machine)
            if not plan.fits(machine) and machine.fits(plan.peak, 0):  # then the activation cache goes to disk
                room = max(machine.total - plan.peak - PROCESS_BYTES, 0) // 1e8 / 10
                config = replace(config, speed=replace(config.speed, activation_cache_memory_gb=room))
                changed = replace(changed, config=config)
                plan = foresee(changed, machine)
        if plan.fits(machine):
            return changed, plan
    return None


def remedy(spec: RunSpec, machine: Machine) -> str:
    """What to change so that a run fits: with the same mathematics if that can be, else what comes nearest."""
    config = spec.config
    if found := fit(spec, machine, alternatives(config)):
        changed, plan = found
        return f"{said(changed.config, config)} needs {in_gb(plan.peak)} and computes the same; --auto chooses that"
    if found := fit(spec, machine, lesser(config)):
        changed, plan = found
        return f"it takes less to train: {said(changed.config, config)} needs {in_gb(plan.peak)}"
    return "take a smaller model, or one with fewer bits (--quantize-bits 4)"


def said(config: RunConfig, before: RunConfig) -> str:
    """The flags that make `config` of `before`."""
    flags = []
    for section in ("train", "lora", "data", "speed"):
        new, old = getattr(config, section), getattr(before, section)
        for name in (field.name for field in fields(new)):
            value = getattr(new, name)
            if value != getattr(old, name):
                flag = f"--set speed.{name}={value}" if section == "speed" else f"--{name.replace('_', '-')}"
                flags.append(flag if section == "speed" or value is True else f"{flag} {value}")
    return " ".join(flags)


def _changed(spec: RunSpec, config: RunConfig) -> RunSpec:
    """The spec with other settings, and with the rows that they leave."""
    length = config.data.max_length
    if length == spec.config.data.max_length:
        return replace(spec, config=config)
    cut = [truncate(row, length, "keep_start") for row in spec.rows]
    train, valid = ([row for row in part if row] for part in (cut[: spec.train_rows], cut[spec.train_rows :]))
    return replace(spec, config=config, rows=[*train, *valid], train_rows=len(train))


@contextmanager
def _frozen(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Adapters in these modules are not trained inside the `with`."""
    for module in modules:
        module.freeze(keys=list(LEAVES), strict=False)
    try:
        yield
    finally:
        for module in modules:
            module.unfreeze(keys=list(LEAVES), strict=False)
