"""A checkpoint holds the whole state, is whole or not there, and is refused where it does not belong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import pytest
from mlx.utils import tree_flatten

from mlx_dpo.config import LoraConfig, ModelConfig, OptimConfig
from mlx_dpo.errors import RunError
from mlx_dpo.models import lora
from mlx_dpo.models.load import load
from mlx_dpo.run.folder import RunFolder
from mlx_dpo.training.checkpoint import TrainerState, restore_checkpoint, save_checkpoint
from mlx_dpo.training.optim import OPTIMIZERS, make_optimizer

TOKENS = mx.array([[5, 9, 40, 41, 7, 100, 200, 3]])
FINGERPRINT = {"rows": "abc", "order": [0, True, 4, 1], "lora": {"rank": 4}}


def fresh(folder: Path, name: Any = "adamw", **adapter: Any) -> tuple[nn.Module, lora.Adapter, optimizers.Optimizer]:
    """A model with an adapter with dropout on its two upper blocks, in training."""
    model = load(ModelConfig(path=str(folder))).model
    attached = lora.attach(model, LoraConfig(**{"num_layers": 2, "rank": 4, "dropout": 0.3} | adapter), seed=0)
    model.train()
    optimizer = make_optimizer(OptimConfig(name=name, learning_rate=1e-2, momentum=0.9, weight_decay=0.01))
    optimizer.init(model.trainable_parameters())
    mx.random.seed(0)
    return model, attached, optimizer


def take_steps(model: nn.Module, optimizer: optimizers.Optimizer, count: int) -> None:
    def loss(model: nn.Module) -> mx.array:
        return nn.losses.cross_entropy(model(TOKENS)[:, :-1], TOKENS[:, 1:]).mean()

    for _ in range(count):
        optimizer.update(model, nn.value_and_grad(model, loss)(model)[1])
        mx.eval(model.parameters(), optimizer.state)


def state(model: nn.Module, optimizer: optimizers.Optimizer) -> dict[str, mx.array]:
    return lora.parameters(model) | {f"optimizer {n}": v for n, v in tree_flatten(optimizer.state)}


def save(run: RunFolder, model: nn.Module, adapter: lora.Adapter, optimizer: optimizers.Optimizer, step: int) -> Path:
    state = TrainerState(step=step, fingerprint=FINGERPRINT)
    return save_checkpoint(run, model, adapter, optimizer, state, base="base", keep=2)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_whoever_goes_on_ends_where_a_straight_run_does(name: str, tiny_llama: Path, run: RunFolder) -> None:
    """Four steps; or two, a checkpoint, and two in a process that knows nothing else: every bit, dropout's too."""
    model, adapter, optimizer = fresh(tiny_llama, name)
    take_steps(model, optimizer, 2)
    folder = save(run, model, adapter, optimizer, 2)
    take_steps(model, optimizer, 2)
    expected, next_draw = state(model, optimizer), mx.random.normal((3,))

    again, _, other = fresh(tiny_llama, name)
    mx.random.seed(99)
    restore_checkpoint(folder, again, other, FINGERPRINT)
    take_steps(again, other, 2)
    found = state(again, other)
    assert found.keys() == expected.keys()
    assert [part for part in found if not mx.array_equal(found[part], expected[part])] == []
    assert mx.array_equal(mx.random.normal((3,)), next_draw)


def test_where_a_run_stands_comes_back_as_it_was(tiny_llama: Path, run: RunFolder) -> None:
    model, adapter, optimizer = fresh(tiny_llama)
    state = TrainerState(
        step=7,
        epoch=2,
        position=3,
        tokens=12345,
        seconds=1.5,
        best={"loss": 0.1 + 0.2, "rewards/accuracies": 1.0},
        best_step=5,
        evaluations=[{"step": 0.0, "loss": 0.6931471805599453}],
        fingerprint=FINGERPRINT,
    )
    folder = save_checkpoint(run, model, adapter, optimizer, state, base="base", keep=2)
    assert restore_checkpoint(folder, model, optimizer, FINGERPRINT) == state


def test_a_checkpoint_is_an_adapter_that_mlx_lm_loads(tiny_llama: Path, run: RunFolder) -> None:
    import mlx_lm

    model, adapter, optimizer = fresh(tiny_llama)
    take_steps(model, optimizer, 2)
    folder = save(run, model, adapter, optimizer, 2)
    model.eval()
    theirs, _ = mlx_lm.load(str(tiny_llama), adapter_path=str(folder))
    assert mx.abs(theirs(TOKENS) - model(TOKENS)).max() < 1e-5


def test_only_the_newest_are_kept_and_nothing_half_written(tiny_llama: Path, run: RunFolder) -> None:
    model, adapter, optimizer = fresh(tiny_llama)
    for step in (5, 10, 15):
        save(run, model, adapter, optimizer, step)
    assert [path.name for path in run.checkpoints()] == ["step-0000010", "step-0000015"]
    assert len(list((run.path / "checkpoints").iterdir())) == 2


def test_a_checkpoint_that_fails_leaves_the_one_before(
    tiny_llama: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapter, optimizer = fresh(tiny_llama)
    before = save(run, model, adapter, optimizer, 1)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("mlx_dpo.training.checkpoint.json.dumps", full)
    with pytest.raises(OSError, match="no space left"):
        save(run, model, adapter, optimizer, 2)
    assert list((run.path / "checkpoints").iterdir()) == [before]


def test_the_runs_own_adapter_is_replaced_whole(tiny_llama: Path, run: RunFolder) -> None:
    model, adapter, optimizer = fresh(tiny_llama)
    lora.save(model, adapter, run.path, base="base")
    take_steps(model, optimizer, 1)
    lora.save(model, adapter, run.path, base="base")
    assert sorted(path.name for path in run.path.iterdir()) == ["adapter_config.json", "adapters.safetensors"]
    kept = mx.load(str(run.path / "adapters.safetensors"))
    assert all(mx.array_equal(kept[name], value) for name, value in lora.parameters(model).items())


# what is refused


@pytest.mark.parametrize(
    "file", ["progress.json", "adapters.safetensors", "optimizer.safetensors", "random.safetensors"]
)
@pytest.mark.parametrize("damage", ["gone", "empty", "cut short"])
def test_a_damaged_checkpoint_is_named_with_the_way_out(
    file: str, damage: str, tiny_llama: Path, run: RunFolder
) -> None:
    model, adapter, optimizer = fresh(tiny_llama)
    take_steps(model, optimizer, 1)
    folder = save(run, model, adapter, optimizer, 1)
    whole = (folder / file).read_bytes()
    if damage == "gone":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(b"" if damage == "empty" else whole[:-4])
    with pytest.raises(RunError, match="cannot be read") as caught:
        restore_checkpoint(folder, model, optimizer, FINGERPRINT)
    assert str(folder) in caught.value.message
    assert "--resume takes the one before" in caught.value.remedy


def test_everything_that_changed_is_named_with_what_it_was(tiny_llama: Path, run: RunFolder) -> None:
    model, adapter, optimizer = fresh(tiny_llama)
    folder = save(run, model, adapter, optimizer, 1)
    with pytest.raises(RunError) as caught:
        restore_checkpoint(folder, model, optimizer, {"rows": "abd", "order": [0, True, 8, 1], "lora": {"rank": 4}})
    assert "rows: was 'abc', is 'abd'" in caught.value.message
    assert "order: was [0, True, 4, 1], is [0, True, 8, 1]" in caught.value.message
    assert "lora" not in caught.value.message


def test_an_adapter_of_other_layers_is_refused(tiny_llama: Path, run: RunFolder) -> None:
    model, adapter, optimizer = fresh(tiny_llama)
    folder = save(run, model, adapter, optimizer, 1)
    other, _, again = fresh(tiny_llama, num_layers=1)
    before = lora.parameters(other)
    with pytest.raises(RunError, match="another adapter"):
        restore_checkpoint(folder, other, again, FINGERPRINT)
    assert all(mx.array_equal(before[name], value) for name, value in lora.parameters(other).items())


def test_settings_of_a_newer_version_are_not_guessed_at(tiny_llama: Path, run: RunFolder) -> None:
    model, adapter, optimizer = fresh(tiny_llama)
    folder = save(run, model, adapter, optimizer, 1)
    state = json.loads((folder / "progress.json").read_text())
    (folder / "progress.json").write_text(json.dumps(state | {"moon_phase": 3}))
    with pytest.raises(RunError, match="moon_phase"):
        restore_checkpoint(folder, model, optimizer, FINGERPRINT)


def test_a_moved_run_folder_goes_on(tiny_llama: Path, run: RunFolder, tmp_path: Path) -> None:
    model, adapter, optimizer = fresh(tiny_llama)
    save(run, model, adapter, optimizer, 3)
    shutil.move(run.path, tmp_path / "elsewhere")
    (folder,) = RunFolder(tmp_path / "elsewhere").checkpoints()
    assert restore_checkpoint(folder, model, optimizer, FINGERPRINT).step == 3
