"""What is measured. Each section is run in a process of its own: where MLX aborts, that is an answer too."""

from __future__ import annotations

import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from mlx_dpo.macos import TF32, WATCHDOG, set_environment

set_environment()  # before MLX is loaded, as the command line does

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from benchmarks.machine import describe  # noqa: E402

from mlx_dpo.cli.demo import DATA  # noqa: E402
from mlx_dpo.config import (  # noqa: E402
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SpeedConfig,
    TrainConfig,
)
from mlx_dpo.data.batching import make_batch  # noqa: E402
from mlx_dpo.data.tokenize import TokenizedRow  # noqa: E402
from mlx_dpo.events import Event, Started, Stepped, Warned  # noqa: E402
from mlx_dpo.logprobs import head  # noqa: E402
from mlx_dpo.logprobs.activation_cache import ActivationCache  # noqa: E402
from mlx_dpo.logprobs.check import Measured, measure, plain_score, relative_difference  # noqa: E402
from mlx_dpo.logprobs.precision import cut, in_float32, rounding_noise, without_dropout  # noqa: E402
from mlx_dpo.logprobs.scorer import OPTIMIZATIONS, Scorer  # noqa: E402
from mlx_dpo.models import adapted_layers, lora  # noqa: E402
from mlx_dpo.models.gated_delta import trainable_gated_delta  # noqa: E402
from mlx_dpo.models.load import load  # noqa: E402
from mlx_dpo.models.trees import flat  # noqa: E402
from mlx_dpo.training.loop import train  # noqa: E402
from mlx_dpo.training.optim import make_optimizer, make_update  # noqa: E402
from mlx_dpo.training.setup import begin, plan_run  # noqa: E402

OLD_TOLERANCE = {"bfloat16": 0.15, "float16": 0.03}
"""Of a token's log-prob, in nats: what a check in the model's own dtype once allowed, and rounding alone breaks."""

CHUNKS = (32, 64, 96, 128, 256)
BLOCKS, BATCH, STEPS, ROWS = 16, 4, 6, 4
Result = dict[str, Any]


class Job(NamedTuple):
    """What a section is told: a model's folder or name, the dtype that it is to compute in, and minutes."""

    model: str
    dtype: str
    minutes: float


def machine(job: Job) -> Result:
    """Processor, system, versions, power, and what was set before MLX was loaded."""
    found = describe()
    found |= {f"version of {name}": number for name, number in found.pop("versions").items()}
    found |= {name: os.environ.get(name, "not set") for name in (TF32, WATCHDOG)}
    found |= {f"device: {name}": str(value) for name, value in mx.device_info().items()}
    if platform.system() == "Darwin":
        found["macOS"] = platform.mac_ver()[0]
        found["power"] = _output("pmset", "-g", "batt").splitlines()[:1]
        found["low power mode"] = [line.strip() for line in _output("pmset", "-g").splitlines() if "lowpower" in line]
    return found


def exactness(job: Job) -> Result:
    """Each optimization against the plain path, in the model's own dtype and in float32; rows alone and together."""
    spec, loaded, _ = begin(_config(job, "unused"), load)
    model: Any = loaded.model
    _fill(model)
    rows = [cut(row, 48, 24) for row in spec.rows[:ROWS]]
    batch = make_batch(rows, range(len(rows)))
    variants = {name: replace(PLAIN, **{name: getattr(SpeedConfig(), name)}) for name in OPTIMIZATIONS}
    variants["prefill_step_size"] = replace(variants["shared_prompt"], prefill_step_size=16)
    variants["all"] = replace(SpeedConfig(), prefill_step_size=16)
    found: Result = {}
    with trainable_gated_delta(model), without_dropout(model):
        for dtype in dict.fromkeys((job.dtype, "float32")):
            with in_float32(model) if dtype == "float32" else nullcontext():
                plain = plain_score(model, mx.checkpoint)
                expected = measure(model, batch, lambda batch, grad: plain(batch))  # noqa: B023
                found[dtype] = {name: _compared(model, rows, speed, expected) for name, speed in variants.items()}
        own = Scorer(model, SpeedConfig(activation_cache=False))
        found["rounding noise, nats"] = rounding_noise(lambda batch, grad: own(batch, gradient=grad).logps, spec.rows)
    if job.dtype in OLD_TOLERANCE:
        worst = [max(row) for row in zip(*(of["largest by row"] for of in found[job.dtype].values()), strict=True)]
        failing = sum(value > OLD_TOLERANCE[job.dtype] for value in worst)
        found["rows that a check in this dtype would have failed"] = f"{failing} of {len(worst)}"
    return found


def steps(job: Job) -> Result:
    """Seconds of a step, and memory, with all optimizations and with each left out; forecast beside measured peak."""
    plan, _ = plan_run(_config(job, "unused"))
    found: Result = {"forecast peak, MB": plan.peak / 1e6}
    for name in ("none", *OPTIMIZATIONS):
        speed = SpeedConfig() if name == "none" else replace(SpeedConfig(), **{name: OPTIMIZATIONS[name]})
        found[f"without {name}"] = _run(replace(_config(job, name), speed=speed))
    found["process at most, MB"] = _footprint()
    return found


def sft(job: Job) -> Result:
    """mlx-lm's own supervised step over the same rows, chosen and rejected answers, prompts masked."""
    from benchmarks.workers import mlx_lm_sft

    with tempfile.TemporaryDirectory() as folder:
        spec, loaded, adapter = begin(_config(job, "unused"), load)
        rows = [spec.rows[i] for batch in spec.batches[:STEPS] for i in batch]
        pairs = [
            {"prompt_ids": list(row.prompt), "chosen_ids": row.completions[0], "rejected_ids": row.completions[1]}
            for row in rows
        ]
        keys = [key.rsplit(".", 1)[-1] for key in adapter.keys]
        settings = {
            "model": str(loaded.path), "seed": 0, "folder": folder, "batch": BATCH, "max_length": 512,
            "learning_rate": 1e-4, "checkpoint": False, "rank": 8, "scale": 2.0, "top_layers": BLOCKS, "keys": keys,
            "batches": [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)], "options": {},
        }  # fmt: skip
        del loaded
        sys.argv = ["", "", str(Path(folder) / "result.json")]
        mx.reset_peak_memory()
        began = time.perf_counter()
        mlx_lm_sft.run(settings)
        seen = json.loads((Path(folder) / "result.json").read_text())
    walls = [step["wall"] for step in seen["steps"]]
    return {"seconds a step": median(walls[2:]), "first step": walls[0], "peak, MB": seen["peak_mlx_mb"],
            "all": time.perf_counter() - began}  # fmt: skip


def head_chunks(job: Job) -> Result:
    """The head with its gradient, by the tokens that it makes logits of at a time."""
    loaded = load(ModelConfig(path=job.model, compute_dtype=job.dtype))  # type: ignore[arg-type]
    split = Scorer(loaded.model, SpeedConfig()).split
    assert split is not None
    target = mx.arange(512) % len(loaded.tokenizer)
    hidden = split.hidden(target[None])[0]
    mx.eval(hidden)
    usual, found = head.chunk_tokens, {}
    for size in CHUNKS:
        head.chunk_tokens = lambda vocabulary, device, size=size: size  # type: ignore[misc]
        mx.reset_peak_memory()

        def measured() -> Any:
            return mx.grad(lambda h: head.head_logps(split.logits, h, target, gradient=True).sum())(hidden)

        found[f"{size} tokens"] = {"ms": 1e3 * _seconds(measured), "peak, MB": mx.get_peak_memory() / 1e6}
    head.chunk_tokens = usual
    return found


def update(job: Job) -> Result:
    """AdamW's update with clipping, its operations one by one and compiled."""
    loaded = load(ModelConfig(path=job.model, compute_dtype=job.dtype))  # type: ignore[arg-type]
    lora.attach(loaded.model, LoraConfig(num_layers=BLOCKS), seed=0)
    parameters = loaded.model.trainable_parameters()
    optimizer = make_optimizer(OptimConfig())
    optimizer.init(parameters)
    state, found = optimizer.state, {"arrays": len(flat(parameters))}
    for name, switch in (("one by one", mx.disable_compile), ("compiled", mx.enable_compile)):
        switch()
        step = make_update(optimizer, 1.0)
        found[f"{name}, ms"] = 1e3 * _seconds(lambda: step(parameters, parameters, state))  # noqa: B023
    return found


def layers(job: Job) -> Result:
    """A gradient through mlx-lm's adapted layers, whose factors are float32 products, and through ours."""
    spec, loaded, _ = begin(_config(job, "unused"), load)
    model: Any = loaded.model
    _fill(model)
    batch = make_batch(spec.rows[:BATCH], range(BATCH))
    model.train()
    scorer = Scorer(model, SpeedConfig(activation_cache=False))
    found = {}
    theirs = {ours: base for base, ours in adapted_layers.OURS.items()}
    with trainable_gated_delta(model):
        for name, classes in (("ours", {}), ("mlx-lm's", theirs)):
            for _, module in model.named_modules():
                module.__class__ = classes.get(type(module), type(module))
            mx.clear_cache()
            mx.reset_peak_memory()
            gradient = nn.value_and_grad(model, lambda model: scorer(batch, gradient=True).logps.sum())
            found[name] = {"ms": 1e3 * _seconds(lambda: gradient(model)), "peak, MB": mx.get_peak_memory() / 1e6}  # noqa: B023
    return found


def hybrid(job: Job) -> Result:
    """Three steps of a small Qwen3.5, whose usual kernel has no gradient."""
    from support.tiny_models import tiny_model_folder

    with tempfile.TemporaryDirectory() as folder:
        path = tiny_model_folder(Path(folder) / "model", "qwen3_5")
        return _run(_config(job._replace(model=str(path)), "hybrid", steps=3))


def resume(job: Job) -> Result:
    """A run that is interrupted and goes on, beside a straight one: are the adapters the same to the last bit?"""
    from support.tiny_models import tiny_model_folder

    found = {}
    for arch in ("llama", "qwen3_moe"):
        with tempfile.TemporaryDirectory() as folder:
            path = str(tiny_model_folder(Path(folder) / "model", arch))
            config = _config(job._replace(model=path), "", steps=6)
            straight, cut_short = (
                replace(config, train=replace(config.train, output=f"{folder}/{name}")) for name in ("a", "b")
            )
            train(straight)
            train(cut_short, on_event=_interrupt_after(3))
            train(cut_short, resume=True)
            a, b = (flat(mx.load(f"{folder}/{name}/adapters.safetensors")) for name in ("a", "b"))
            worst = max(float(mx.abs(a[name] - b[name]).max()) for name in a)
            found[arch] = {"the same bits": worst == 0, "largest difference": worst}
    return found


def display(job: Job) -> Result:
    """Steps for some minutes with the display on: does the system end a computation?"""
    until = time.monotonic() + 60 * job.minutes

    def stop_in_time(event: Event) -> None:
        if isinstance(event, Stepped) and time.monotonic() >= until:
            os.kill(os.getpid(), signal.SIGINT)

    return _run(_config(job, "display", steps=10**6), stop_in_time)


SECTIONS: dict[str, Callable[[Job], Result]] = {
    "machine": machine,
    "hybrid": hybrid,
    "resume": resume,
    "exactness": exactness,
    "head": head_chunks,
    "update": update,
    "layers": layers,
    "sft": sft,
    "steps": steps,
    "display": display,
}
ONCE = ("machine", "hybrid", "resume")
"""What does not depend on the model."""

PLAIN = SpeedConfig(**OPTIMIZATIONS)


def _config(job: Job, name: str, steps: int = STEPS) -> RunConfig:
    """A short run over the demo's pairs."""
    return RunConfig(
        model=ModelConfig(path=job.model, compute_dtype=job.dtype),  # type: ignore[arg-type]
        data=DataConfig(path=str(DATA / "train.jsonl"), valid_fraction=0.0, max_length=512),
        lora=LoraConfig(num_layers=BLOCKS),
        optim=OptimConfig(learning_rate=1e-4, warmup_ratio=0.0),
        train=TrainConfig(
            output=str(Path(tempfile.mkdtemp()) / (name or "run")), batch_size=BATCH, iters=steps, eval_samples=0,
            save_every=10**9,
        ),
    )  # fmt: skip


def _run(config: RunConfig, also: Callable[[Event], None] = lambda event: None) -> Result:
    """A run's steps in seconds, its memory and its warnings; its own cache, so that the reference is computed."""
    walls: list[float] = []
    losses: list[float] = []
    warnings: list[str] = []
    facts: dict[str, str] = {}
    since = time.perf_counter()

    def listen(event: Event) -> None:
        nonlocal since
        if isinstance(event, Warned):
            warnings.append(event.text)
        elif isinstance(event, Started):
            facts.update(event.facts)
            since = time.perf_counter()
        elif isinstance(event, Stepped):
            walls.append(time.perf_counter() - since)
            losses.append(event.metrics["loss"])
            since = time.perf_counter()
        also(event)

    with _own_cache():
        mx.clear_cache()
        mx.reset_peak_memory()
        train(config, on_event=listen)
    found: Result = {
        "seconds a step": median(walls[2:] or walls),
        "slowest": max(walls),
        "steps": len(walls),
        "first loss": losses[0],
        "last loss": losses[-1],
        "peak, MB": mx.get_peak_memory() / 1e6,
        "cache, MB": mx.get_cache_memory() / 1e6,
        "rounding": facts.get("rounding", ""),
    }
    return found | ({"warnings": warnings} if warnings else {})


def _compared(model: nn.Module, rows: list[TokenizedRow], speed: SpeedConfig, expected: Measured) -> Result:
    """How far log-probs (nats a token) and gradient (share of its norm) are from the plain path's."""
    batch = make_batch(rows, range(len(rows)))
    try:
        scorer = Scorer(model, speed, activation_cache=ActivationCache(rows, 1e9, 0), checkpoint=True)
        found = measure(model, batch, lambda batch, grad: scorer(batch, gradient=grad).logps)
    except Exception as error:  # of any kind, from a model's own code: that is what the run would leave out
        return {"fails": f"{type(error).__name__}: {error}", "largest by row": [0.0] * len(rows)}
    difference = mx.abs(found.logps - expected.logps)
    return {
        "rms": float(mx.sqrt(mx.square(difference).sum() / float(batch.mask.sum()))),
        "largest": float(difference.max()),
        "gradient": relative_difference(found.gradient, expected.gradient),
        "largest by row": difference.max(axis=(1, 2)).tolist(),
    }


def _fill(model: nn.Module) -> None:
    """B of a fresh adapter is 0, and so is A's gradient: small random numbers instead."""
    keys = iter(mx.random.split(mx.random.key(1), 10_000))
    filled = [
        (name, mx.random.normal(value.shape, scale=0.01, key=next(keys)))
        for name, value in lora.parameters(model).items()
        if name.endswith("lora_b")
    ]
    model.load_weights(filled, strict=False)


def _seconds(compute: Callable[[], Any], times: int = 5) -> float:
    """The fastest of a few times, after one that does not count."""
    taken = []
    for _ in range(times + 1):
        began = time.perf_counter()
        mx.eval(compute())
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


def _interrupt_after(step: int) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return listen


@contextmanager
def _own_cache() -> Iterator[None]:
    with ExitStack() as stack:
        before = os.environ.get("MLX_DPO_CACHE")
        os.environ["MLX_DPO_CACHE"] = stack.enter_context(tempfile.TemporaryDirectory())
        yield
        os.environ.pop("MLX_DPO_CACHE") if before is None else os.environ.update(MLX_DPO_CACHE=before)


def _footprint() -> float:
    """The most memory that this process has held, MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if platform.system() == "Darwin" else 1e3)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout
