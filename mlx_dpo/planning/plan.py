"""What a run will need in memory, foreseen before anything of it is computed, and the settings with which it fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import mlx.core as mx

from mlx_dpo.config import RunConfig, SpeedConfig
from mlx_dpo.data.tokenize import truncate
from mlx_dpo.errors import RunError
from mlx_dpo.events import OnEvent, Warned, ignore
from mlx_dpo.losses import row_separable
from mlx_dpo.models.lora import LEAVES
from mlx_dpo.planning.batch_shape import BatchShape, batch_shape, part_of
from mlx_dpo.planning.graph import Unknown
from mlx_dpo.planning.machine import PROCESS_BYTES, Machine
from mlx_dpo.planning.peak_memory import RUN_AHEAD, Peak, RunAhead, peak_memory
from mlx_dpo.planning.traced_run import Description, Phase, RunSpec, describe, held_bytes

BEFORE_OPTIMIZER = ("loading", "check of the optimizations", "frozen blocks")
"""Phases in which there is no optimizer yet."""


@dataclass(frozen=True)
class Plan:
    """What a run will need, in bytes.

    `peak`: of MLX's arrays at the highest moment, and `parts` what that is for; `phases`: the peak of each phase by
    itself. `least`: the same where MLX waits for results rather than run ahead; with less the run cannot be. `limit`:
    from where on MLX is to wait. `working`: the most that a phase takes beside what it holds. `beside`: what is kept in
    memory outside MLX, the frozen blocks' output; `on_disk`: the same where it goes to a file. `largest`: the shape of
    the largest micro-batch. `speed`: the optimizations that the model's code takes. `notes`: what is not counted.
    """

    peak: int
    parts: dict[str, int]
    phases: dict[str, int]
    least: int
    limit: int
    working: int
    beside: int
    on_disk: int
    largest: BatchShape | None
    speed: SpeedConfig
    notes: list[str]

    def fits(self, machine: Machine) -> bool:
        """Whether the run can be on `machine`."""
        return machine.fits(self.least, self.beside)


def foresee(spec: RunSpec, machine: Machine) -> tuple[Plan, Description | None]:
    """What the run of `spec` will need on `machine`, and the graphs that say so.

    Where MLX cannot describe what the model does, the gradients of experts' adapters are left out, or else there are no
    graphs and the plan counts what is held all the time alone; a note says so.
    """
    held = held_bytes(spec)
    loading = held.weights + held.adapter
    notes: list[str] = []
    try:
        found = _describe(spec, notes)
    except Unknown as error:
        notes = [f"activations are not counted, since MLX cannot describe what this model does: {error}"]
        least, speed = max(sum(held), loading), spec.config.speed
        return Plan(
            least,
            held._asdict(),
            {"loading": loading},
            least,
            machine.usable,
            held.adapter + held.optimizer,
            0,
            0,
            None,
            speed,
            notes,
        ), None

    on_gpu = mx.default_device() == mx.gpu
    ahead = RUN_AHEAD["gpu" if on_gpu else "cpu"]
    waiting = {name: phase.held + _peak(phase, ahead, 0).nbytes for name, phase in found.phases.items()}
    least = max(*waiting.values(), loading)
    limit = machine.usable if on_gpu or notes else least  # on a CPU running ahead gains nothing
    evaluated = {name: _peak(phase, ahead, limit) for name, phase in found.phases.items()}
    phases = {name: found.phases[name].held + peak.nbytes for name, peak in evaluated.items()} | {"loading": loading}
    highest = max(phases, key=lambda name: phases[name])
    largest = batch_shape([spec.rows[i] for i in found.largest.index])
    parts = held._asdict()
    if highest in found.phases:
        parts["weights"] -= found.phases[highest].unloaded
    if highest in BEFORE_OPTIMIZER:
        del parts["optimizer"]
    for array in evaluated[highest].live if highest in evaluated else ():
        part = part_of(array.shape, found.widths, found.vocabulary)
        parts[part] = parts.get(part, 0) + array.nbytes
    if rest := phases[highest] - sum(parts.values()):
        parts["other"] = rest
    kept = {
        where: found.activation_cache.nbytes if found.activation_cache.where == where else 0
        for where in ("memory", "disk")
    }
    beside, on_disk = kept.values()
    working = max(peak.nbytes for peak in evaluated.values())
    return Plan(
        phases[highest], parts, phases, least, limit, working, beside, on_disk, largest, found.speed, notes
    ), found


def _describe(spec: RunSpec, notes: list[str]) -> Description:
    """The graphs, if it must be without the gradients of experts' adapters, which MLX 0.32 cannot describe."""
    experts = [m for _, m in spec.model.named_modules() if "lora_a" in m and m["lora_a"].ndim == 3]
    try:
        return describe(spec)
    except Unknown:
        if not experts:
            raise
    for module in experts:
        module.freeze(keys=list(LEAVES), recurse=False)
    try:
        found = describe(spec)
    finally:
        for module in experts:
            module.unfreeze(keys=list(LEAVES), recurse=False, strict=False)
    notes.append("what the gradients of the experts' adapters take is not counted")
    return found


def _peak(phase: Phase, ahead: RunAhead, limit: float) -> Peak:
    return peak_memory(phase.graph, ahead, limit=limit - phase.held, consumed=phase.given_up)


def alternatives(config: RunConfig) -> Iterator[RunConfig]:
    """Other settings with the same mathematics that need less memory, the faster ones first.

    Rows of an optimizer step stay together, in more and smaller micro-batches where the loss is a mean over rows;
    checkpointing computes activations twice. Losses whose rows depend on each other keep their micro-batch.
    """
    train = config.train
    cuts = [train]
    if row_separable(config.loss):
        sizes = [size for size in range(train.batch_size - 1, 0, -1) if train.batch_size % size == 0]
        rows = train.batch_size * train.grad_accumulation_steps
        cuts += [replace(train, batch_size=n, grad_accumulation_steps=rows // n) for n in sizes]
    for checkpoint in (False, True):
        for cut in cuts:
            changed = replace(cut, grad_checkpoint=checkpoint or train.grad_checkpoint)
            if changed != train:
                yield replace(config, train=changed)


def lesser(config: RunConfig) -> Iterator[RunConfig]:
    """Settings that need less memory and train something else, with as little memory as the same mathematics allow."""
    *_, least = [config, *alternatives(config)]
    for layers in (16, 8, 4):
        if config.lora.num_layers == -1 or layers < config.lora.num_layers:
            yield replace(least, lora=replace(least.lora, num_layers=layers))
    for length in (1024, 512, 256, 128):
        if config.data.max_length is None or length < config.data.max_length:
            yield replace(least, data=replace(least.data, max_length=length))


def fit_to_machine(spec: RunSpec, machine: Machine, on_event: OnEvent = ignore) -> tuple[RunSpec, Plan]:
    """The run as it is to be on `machine`: as asked or, with `train.auto`, with the same mathematics in less memory.

    Raises:
        RunError: it does not fit.
    """
    config = spec.config
    if config.train.auto and (found := fit(spec, machine, [config, *alternatives(config)])):
        chosen, plan = found
        settled = replace(chosen.config.train, auto=False)  # who goes on with the run must not choose again
        spec = replace(chosen, config=replace(chosen.config, train=settled))
    else:
        plan, _ = foresee(spec, machine)
        refuse(spec, plan, machine)
    for note in plan.notes:
        on_event(Warned(note))
    return spec, plan


def fit(spec: RunSpec, machine: Machine, configs: Iterable[RunConfig]) -> tuple[RunSpec, Plan] | None:
    """The run with the first of `configs` that fits `machine`; None where none does."""
    for config in configs:
        changed = _changed(spec, config)
        with _adapted(changed):
            plan, _ = foresee(changed, machine)
            if not plan.fits(machine) and machine.fits(plan.least, 0):  # the frozen blocks' output goes to disk
                room = max(machine.total - plan.least - PROCESS_BYTES, 0) // 1e8 / 10
                config = replace(config, speed=replace(config.speed, activation_cache_memory_gb=room))
                changed = replace(changed, config=config)
                plan, _ = foresee(changed, machine)
        if plan.fits(machine):
            return changed, plan
    return None


def refuse(spec: RunSpec, plan: Plan, machine: Machine) -> None:
    """Says no to a run that does not fit, with what would.

    Raises:
        RunError: it does not fit.
    """
    if plan.fits(machine):
        return
    parts = ", ".join(f"{name} {in_gb(size)}" for name, size in plan.parts.items() if size >= 5e7)
    beside = f" and {in_gb(plan.beside)} beside them" if plan.beside else ""
    raise RunError(
        f"this run does not fit: its arrays take {in_gb(plan.least)} at once ({parts}){beside}, and {machine.name} has "
        f"{in_gb(machine.usable)} for them",
        remedy(spec, machine),
    )


def remedy(spec: RunSpec, machine: Machine) -> str:
    """What to change so that a run fits: with the same mathematics if that can be, else what comes nearest."""
    config = spec.config
    if found := fit(spec, machine, [config, *alternatives(config)]):
        changed, plan = found
        return f"{said(changed.config, config)} needs {in_gb(plan.least)} and computes the same; --auto chooses that"
    if found := fit(spec, machine, lesser(config)):
        changed, plan = found
        return f"it takes less to train: {said(changed.config, config)} needs {in_gb(plan.least)}"
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


def in_gb(size: float) -> str:
    """Bytes in words."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _changed(spec: RunSpec, config: RunConfig) -> RunSpec:
    """The spec with other settings, and with the rows that they leave."""
    length = config.data.max_length
    if length == spec.config.data.max_length:
        return replace(spec, config=config)
    cut = [truncate(row, length, "keep_start") for row in spec.rows]
    kept = [[row for row in part if row] for part in (cut[: spec.train_rows], cut[spec.train_rows :])]
    return replace(spec, config=config, rows=[*kept[0], *kept[1]], train_rows=len(kept[0]))


@contextmanager
def _adapted(spec: RunSpec) -> Iterator[None]:
    """Trains no more than the top blocks that the spec's settings ask for."""
    count = spec.config.lora.num_layers
    lower = [] if count == -1 else spec.model.layers[:-count]
    for block in lower:
        block.freeze()
    try:
        yield
    finally:
        for block in lower:
            block.unfreeze(keys=list(LEAVES), strict=False)
