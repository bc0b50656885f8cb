"""The phases of a run as graphs: what lies in memory all through them, the bound of the update, and which batches."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import pytest
from mlx.utils import tree_map

from mlx_dpo.config import DataConfig, LoraConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from mlx_dpo.data.batching import visited_batches
from mlx_dpo.models.load import load
from mlx_dpo.models.trees import flat
from mlx_dpo.planning.traced_run import RunSpec, nbytes, persistent_memory, trace_run, update_memory
from mlx_dpo.training.optim import OPTIMIZERS, make_optimizer, make_update
from mlx_dpo.training.setup import begin
from support.tiny_models import tiny_model_folder

LENGTHS = ((2, 1, 1), (3, 5, 2), (4, 30, 3), (20, 4, 2), (1, 1, 2), (6, 2, 2))
"""Words of the prompt, the chosen and the rejected answer."""


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    rows = [
        {"prompt": f"{i} " * prompt, "chosen": "yes " * chosen, "rejected": "no " * rejected}
        for i, (prompt, chosen, rejected) in enumerate(LENGTHS)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunConfig(
        model=ModelConfig(path=str(tiny_model_folder(tmp_path / "model"))),
        data=DataConfig(path=str(file), valid_fraction=0.0, max_length=None),
        lora=LoraConfig(num_layers=2, rank=4, keys=("self_attn.q_proj",)),
        train=TrainConfig(batch_size=2, iters=3),
    )


def begun(config: RunConfig) -> RunSpec:
    return begin(config, partial(load, lazy=True))[0]


def test_what_lies_in_memory_all_the_time_is_known_by_hand(config: RunConfig) -> None:
    spec = begun(config)
    q_proj = spec.model.layers[-1].self_attn.q_proj
    inputs, outputs = q_proj.lora_a.shape[0], q_proj.lora_b.shape[1]
    memory = persistent_memory(spec)
    assert memory["adapter"] == 2 * 4 * 4 * (inputs + outputs), "two blocks, rank 4, float32"
    assert memory["weights"] == nbytes(spec.model.parameters()) - memory["adapter"]
    assert memory["optimizer"] == pytest.approx(2 * memory["adapter"], abs=100), "AdamW: two moments of each"
    sgd = replace(spec, make_optimizer=lambda: optimizers.SGD(0.1, momentum=0.0))
    assert persistent_memory(sgd)["optimizer"] == pytest.approx(memory["adapter"], abs=100), "and SGD one"


def test_tracing_leaves_the_model_as_it_was(config: RunConfig) -> None:
    spec = begun(config)
    before, training = flat(spec.model.parameters()), spec.model.training
    trace_run(spec)
    after = flat(spec.model.parameters())
    assert all(after[name] is value for name, value in before.items()) and after.keys() == before.keys()
    assert spec.model.training == training


def test_the_cache_holds_each_row_that_is_visited_once(config: RunConfig) -> None:
    spec = begun(config)
    hidden = spec.model.args.hidden_size
    tokens = sum(len(row.prompt) + sum(len(ids) - 1 for ids in row.completions) for row in spec.rows)
    cached = trace_run(spec).cached
    assert (cached.nbytes, cached.where) == (4 * hidden * tokens, "memory")
    assert cached.unloaded == sum(nbytes(block.parameters()) for block in spec.model.layers[:2])
    small = replace(config.speed, activation_cache_memory_gb=cached.nbytes / 2e9)
    assert trace_run(replace(spec, config=replace(config, speed=small))).cached.where == "disk"
    none = replace(small, activation_cache_disk_gb=0.0)
    assert not trace_run(replace(spec, config=replace(config, speed=none))).cached.used


def test_gradients_of_earlier_micro_batches_are_counted(config: RunConfig) -> None:
    train = replace(config.train, grad_accumulation_steps=2)
    spec = begun(replace(config, train=train))
    assert trace_run(spec).phases["a step"].parts["gradients so far"] == persistent_memory(spec)["adapter"]


def test_the_largest_micro_batch_is_that_of_most_tokens_that_the_run_comes_to(config: RunConfig) -> None:
    spec = begun(config)
    sizes = [
        sum(len(spec.rows[i].prompt) + sum(map(len, spec.rows[i].completions)) for i in batch)
        for batch in visited_batches(spec.rows, config.train)
    ]
    largest = trace_run(spec).largest
    assert largest is not None and largest.tokens == max(sizes)


@pytest.mark.parametrize(
    ("train", "count"),
    [
        (
            {"iters": 2, "grad_accumulation_steps": 2},
            3,
        ),  # of two steps, the second of which ends the epoch
        ({"iters": None, "epochs": 2.0}, 6),
        ({"iters": None, "epochs": 0.5}, 2),
        ({"iters": 10_000}, 24),  # of eight epochs, and no more
    ],
)
def test_the_micro_batches_that_a_run_comes_to(train: dict[str, Any], count: int, config: RunConfig) -> None:
    config = replace(config, train=replace(config.train, **train))
    assert len(visited_batches(begun(config).rows, config.train)) == count


class Adapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lora = [{"a": mx.zeros((2048, 16)), "b": mx.zeros((16, 2048))} for _ in range(40)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_update_takes_no_more_than_its_bound(name: str) -> None:
    """As the loop does it: what it begins with stays, for the case that it fails. In bytes; the first one compiles."""
    optimizer = make_optimizer(OptimConfig(name=name))
    parameters = Adapter().trainable_parameters()
    optimizer.init(parameters)
    state, update = optimizer.state, make_update(optimizer, 1.0)

    def taken() -> int:
        gradients = tree_map(lambda value: value + 1.0, parameters)
        mx.eval(gradients)
        mx.reset_peak_memory()
        found = update(parameters, gradients, state)
        del gradients
        mx.eval(found)
        return mx.get_peak_memory()

    mx.eval(parameters, state)
    before = mx.set_memory_limit(0)
    try:
        taken()
        gc.collect()
        base = mx.get_active_memory()
        size = {"adapter": nbytes(parameters), "optimizer": nbytes(state)}
        assert 0.3 * update_memory(size) < taken() - base <= 1.05 * update_memory(size)
    finally:
        mx.set_memory_limit(before)
