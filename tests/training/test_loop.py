"""A run starts at ln 2, learns, visits every row, and ends in the same adapter however it was cut into pieces."""

from __future__ import annotations

import contextlib
import json
import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_dpo.config import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SpeedConfig,
    TrainConfig,
)
from mlx_dpo.errors import DataError, DeviceError, MlxDpoError, RunError
from mlx_dpo.events import Evaluated, Event, Progressed, Saved, Started, Stepped, Warned
from mlx_dpo.files import cache_folder
from mlx_dpo.logprobs.scorer import OPTIMIZATIONS
from mlx_dpo.models import lora
from mlx_dpo.models.load import load
from mlx_dpo.training import loop
from mlx_dpo.training.loop import TrainResult, train
from mlx_dpo.training.step import Steps
from support.tiny_models import tiny_model_folder

WORDS = ("answer", "question", "short", "clear", "says", "many", "words", "prefer", "other", "same", "asks", "needs")


def preferences(count: int) -> list[dict[str, str]]:
    """Pairs of unequal lengths whose chosen answer is the short one."""
    return [
        {
            "prompt": f"the {WORDS[i % 12]} " * (1 + i % 4) + f"{i}?",
            "chosen": f" {WORDS[(i + 1) % 12]}.",
            "rejected": f" {WORDS[(i + 2) % 12]}" * (2 + i % 5) + ".",
        }
        for i in range(count)
    ]


def written(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def settings(tiny_llama: Path, tmp_path: Path) -> RunConfig:
    """Six steps over 17 pairs, none held out."""
    return RunConfig(
        model=ModelConfig(path=str(tiny_llama)),
        data=DataConfig(path=str(written(tmp_path / "pairs.jsonl", preferences(17))), valid_fraction=0),
        lora=LoraConfig(num_layers=2, rank=4),
        optim=OptimConfig(learning_rate=1e-3, lr_scheduler_type="constant", warmup_ratio=0),
        train=TrainConfig(output=str(tmp_path / "run"), batch_size=3, iters=6, eval_samples=0),
    )


def change(settings: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    return replace(settings, **{name: replace(getattr(settings, name), **values) for name, values in sections.items()})


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def adapters(folder: Path) -> dict[str, mx.array]:
    return mx.load(str(folder / "adapters.safetensors"))


def assert_same_bits(a: Path, b: Path) -> None:
    ours, theirs = mx.load(str(a)), mx.load(str(b))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not mx.array_equal(ours[name], theirs[name])] == []


def furthest(a: Path, b: Path) -> float:
    ours, theirs = adapters(a), adapters(b)
    assert ours.keys() == theirs.keys()
    return max(mx.abs(ours[name] - theirs[name]).max().item() for name in ours)


# the first step


@pytest.mark.parametrize("arch", ["llama", "gemma3", "qwen3_moe", "qwen3_5"])
def test_with_a_fresh_adapter_the_first_loss_is_ln_2(arch: str, settings: RunConfig, tmp_path: Path) -> None:
    """Policy and reference are one function then, dropout or not: B is 0."""
    folder = tiny_model_folder(tmp_path / "model", arch)
    said: list[Event] = []
    train(
        change(settings, model={"path": str(folder)}, lora={"dropout": 0.5}, train={"iters": 1}), on_event=said.append
    )
    (first,) = metrics(tmp_path / "run")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert first["kl/token"] < 1e-8
    assert not [event for event in said if isinstance(event, Warned) and "one function" in event.text]


def test_a_given_adapter_as_its_own_reference_starts_at_ln_2_too(settings: RunConfig, tmp_path: Path) -> None:
    train(settings)
    first = change(settings, model={"adapter": str(tmp_path / "run")}, train={"iters": 1})
    train(change(first, loss={"reference": "start"}, train={"output": str(tmp_path / "start")}))
    train(change(first, loss={"reference": "base"}, train={"output": str(tmp_path / "base")}))
    assert metrics(tmp_path / "start")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics(tmp_path / "base")[0]["loss"] < 0.68, "it has learned to tell these pairs apart already"


def test_a_reference_of_other_weights_is_noticed_at_the_first_step(
    settings: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the store knows under this model's name belongs to another one: the loss is not ln 2, and it is said."""
    monkeypatch.setattr("mlx_dpo.reference.store.model_digest", lambda loaded, with_adapter: "always the same")
    train(change(settings, train={"iters": 1, "output": settings.train.output + "-other"}))
    other = tiny_model_folder(Path(settings.train.output + "-model"), seed=5)
    said: list[Event] = []
    train(change(settings, model={"path": str(other)}, train={"iters": 1}), on_event=said.append)
    (warning,) = [event.text for event in said if isinstance(event, Warned)]
    assert "should be one function, but differ" in warning
    (stored,) = (cache_folder() / "reference").glob("*.sqlite")
    assert f"remove {stored}" in warning


def test_with_dropout_a_starting_adapter_as_reference_does_not_start_at_ln_2_and_it_is_said_why(
    settings: RunConfig, tmp_path: Path
) -> None:
    train(change(settings, optim={"learning_rate": 3e-2}))
    said: list[Event] = []
    again = change(settings, model={"adapter": str(tmp_path / "run")}, loss={"reference": "start"})
    train(
        change(again, lora={"dropout": 0.5}, train={"iters": 1, "output": str(tmp_path / "dropped")}),
        on_event=said.append,
    )
    (warning,) = [event.text for event in said if isinstance(event, Warned)]
    assert "ln 2 = 0.6931" in warning and "lora.dropout 0.5" in warning


# learning


def test_a_run_learns_its_preferences_and_leaves_what_mlx_lm_loads(settings: RunConfig, tmp_path: Path) -> None:
    import mlx_lm

    result = train(change(settings, optim={"learning_rate": 3e-3}, train={"iters": 20, "batch_size": 6}))
    steps = metrics(tmp_path / "run")
    assert steps[-1]["rewards/accuracies"] == 1
    assert steps[-1]["loss"] < 0.3
    assert (result.steps, result.total_steps, result.interrupted) == (20, 20, False)
    assert {"adapters.safetensors", "adapter_config.json", "config.yaml", "metrics.jsonl", "checkpoints"} <= {
        entry.name for entry in (tmp_path / "run").iterdir()
    }
    tokens = mx.array([[5, 9, 40, 41, 7]])
    theirs, _ = mlx_lm.load(settings.model.path, adapter_path=str(tmp_path / "run"))
    ours = load(settings.model).model
    before = ours(tokens)
    lora.load(ours, tmp_path / "run")
    assert mx.abs(ours(tokens) - theirs(tokens)).max() < 1e-5
    assert mx.abs(ours(tokens) - before).max() > 0.01


def test_a_quantized_base_trains_and_its_first_loss_is_ln_2(settings: RunConfig, tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "model", quantize_bits=4)
    train(change(settings, model={"path": str(folder)}, train={"batch_size": 17}))
    steps = metrics(tmp_path / "run")
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[-1]["loss"] < 0.66


@pytest.mark.parametrize(
    ("loss", "rows"),
    [
        ("kto", [{"prompt": "the", "completion": f" {WORDS[i]}", "label": i % 2 == 0} for i in range(6)]),
        ("sft", [{"prompt": "the", "completion": f" {WORDS[i]}"} for i in range(6)]),
        ("orpo", preferences(6)),
        ("sigmoid:0.8,sft:0.2", preferences(6)),
        (
            "plackett_luce",
            [{"prompt": "the", "responses": [" a", " b", " c"][:k], "ranks": [1, 2, 3][:k]} for k in (2, 3, 2, 3)],
        ),
    ],
)
def test_every_kind_of_row_trains(loss: str, rows: list[dict[str, Any]], settings: RunConfig, tmp_path: Path) -> None:
    data = written(tmp_path / "rows.jsonl", rows)
    train(change(settings, data={"path": str(data)}, loss={"type": loss}, train={"batch_size": 6, "iters": 12}))
    steps = metrics(tmp_path / "run")
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_checkpointed_gradients_are_the_same_gradients(settings: RunConfig, tmp_path: Path) -> None:
    train(settings)
    train(change(settings, train={"grad_checkpoint": True, "output": str(tmp_path / "checkpointed")}))
    assert furthest(tmp_path / "run", tmp_path / "checkpointed") < 1e-5


def test_the_optimizations_change_no_result(settings: RunConfig, tmp_path: Path) -> None:
    train(settings)
    off = SpeedConfig(**OPTIMIZATIONS)
    train(replace(change(settings, train={"output": str(tmp_path / "plain")}), speed=off))
    assert furthest(tmp_path / "run", tmp_path / "plain") < 1e-5


# steps, epochs and batches


@pytest.mark.parametrize(
    ("train_settings", "steps"),
    [
        ({"epochs": 1.0}, 6),  # 17 rows in batches of 3
        ({"epochs": 2.0}, 12),
        ({"epochs": 0.5}, 3),
        ({"epochs": 1.0, "grad_accumulation_steps": 4}, 2),
        ({"epochs": 3.0, "iters": 4}, 4),
        ({"epochs": 1.0, "batch_size": 100}, 1),
    ],
)
def test_the_number_of_steps(train_settings: dict[str, Any], steps: int, settings: RunConfig) -> None:
    result = train(change(settings, train={"iters": None} | train_settings))
    assert (result.steps, result.total_steps) == (steps, steps)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_an_epoch_reads_every_row_once(accumulate: int, settings: RunConfig, tmp_path: Path) -> None:
    """Tokens read after one epoch: those of all rows, prompts counted for each answer; after two, twice as many."""
    run = change(settings, train={"iters": None, "epochs": 2.0, "grad_accumulation_steps": accumulate})
    train(run)
    steps = metrics(tmp_path / "run")
    tokenizer = load(settings.model).tokenizer
    tokens = sum(
        len(tokenizer(row["prompt"] + row[side] + "<|im_end|>")["input_ids"])
        for row in preferences(17)
        for side in ("chosen", "rejected")
    )
    by_epoch = {step["epoch"]: step["num_tokens"] for step in steps}
    assert (by_epoch[1.0], by_epoch[2.0]) == (tokens, 2 * tokens)
    assert steps[-1]["epoch"] == 2.0


def test_a_data_set_smaller_than_a_batch_trains_and_says_so(settings: RunConfig, tmp_path: Path) -> None:
    said: list[Event] = []
    few = written(tmp_path / "few.jsonl", preferences(2))
    result = train(
        change(settings, data={"path": str(few)}, train={"batch_size": 8, "epochs": 3.0, "iters": None}),
        on_event=said.append,
    )
    assert result.steps == 3
    assert any("2 rows are fewer than a batch of 8" in event.text for event in said if isinstance(event, Warned))


def test_how_a_batch_is_cut_into_micro_batches_does_not_matter(settings: RunConfig, tmp_path: Path) -> None:
    """8 at a time, 2 x 4 and 1 x 8: the same mean over 8 rows, and over the one row that ends an epoch of 17."""
    folders = []
    for size, accumulate in ((8, 1), (2, 4), (1, 8)):
        folders.append(tmp_path / f"{size}x{accumulate}")
        cut = {"batch_size": size, "grad_accumulation_steps": accumulate, "output": str(folders[-1])}
        train(change(settings, optim={"name": "sgd", "learning_rate": 0.05}, train=cut | {"shuffle": False}))
    assert furthest(folders[0], folders[1]) < 2e-6
    assert furthest(folders[0], folders[2]) < 2e-6
    losses = [[step["loss"] for step in metrics(folder)] for folder in folders]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] == pytest.approx(losses[0], abs=1e-5)


def test_gradients_are_clipped_to_the_norm_asked_for(settings: RunConfig, tmp_path: Path) -> None:
    """A step of SGD moves the weights by lr times the clipped norm; the norm that is logged is the one before."""
    start = change(settings, optim={"name": "sgd", "learning_rate": 1.0}, train={"iters": 1})
    for limit in (0.0, 0.01):
        folder = tmp_path / f"clipped-{limit}"
        train(change(start, optim={"max_grad_norm": limit}, train={"output": str(folder)}))
        model = load(settings.model).model
        lora.attach(model, settings.lora, seed=0)
        fresh = lora.parameters(model)
        moved = math.sqrt(sum(((adapters(folder)[name] - value) ** 2).sum().item() for name, value in fresh.items()))
        norm = metrics(folder)[0]["grad_norm"]
        assert norm > 0.01
        assert moved == pytest.approx(limit or norm, rel=1e-3)


# what is reported and kept


def test_held_out_rows_are_ranked_before_in_between_and_after(settings: RunConfig, tmp_path: Path) -> None:
    said: list[Event] = []
    result = train(
        change(settings, data={"valid_fraction": 0.3}, train={"steps_per_eval": 2, "iters": 5}), on_event=said.append
    )
    assert [evaluation["step"] for evaluation in result.evaluations] == [0, 2, 4, 5]
    assert result.evaluations[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert [event.step for event in said if isinstance(event, Evaluated)] == [0, 2, 4, 5]
    lines = [line for line in metrics(tmp_path / "run") if "eval_loss" in line]
    assert [line["step"] for line in lines] == [0, 2, 4, 5]
    assert [line["eval_loss"] for line in lines] == [evaluation["loss"] for evaluation in result.evaluations]
    best = min(result.evaluations[1:], key=lambda evaluation: evaluation["loss"])
    assert result.best_step == best["step"]


def test_the_best_adapter_is_kept_unless_the_last_is_asked_for(settings: RunConfig, tmp_path: Path) -> None:
    """A rate that grows with the warm-up ruins the held-out loss in the end: the best step is not the last."""
    wild = change(
        settings,
        data={"valid_fraction": 0.3},
        optim={"learning_rate": 0.5, "warmup_steps": 8},
        train={"steps_per_eval": 1, "iters": 6, "save_every": 1, "keep_checkpoints": 9},
    )
    result = train(wild)
    assert 0 < result.best_step < 6
    assert_same_bits(
        tmp_path / "run/adapters.safetensors",
        tmp_path / f"run/checkpoints/step-{result.best_step:07d}/adapters.safetensors",
    )
    train(change(wild, train={"keep_best": False, "output": str(tmp_path / "last")}))
    assert_same_bits(
        tmp_path / "last/adapters.safetensors", tmp_path / "run/checkpoints/step-0000006/adapters.safetensors"
    )


def test_what_is_told_while_it_goes_on(settings: RunConfig) -> None:
    said: list[Event] = []
    train(change(settings, train={"save_every": 4}), on_event=said.append)
    assert [type(event) for event in said if not isinstance(event, Progressed)] == [
        Started, Stepped, Stepped, Stepped, Stepped, Saved, Stepped, Stepped, Saved, Saved,
    ]  # fmt: skip
    assert [event.step for event in said if isinstance(event, Stepped)] == [1, 2, 3, 4, 5, 6]
    (started,) = [event for event in said if isinstance(event, Started)]
    assert (started.total_steps, started.first_step) == (6, 0)
    assert started.facts["reference"] == "base model (adapter off), which a fresh adapter equals"


def test_token_metrics_are_there_when_asked_for(settings: RunConfig, tmp_path: Path) -> None:
    costly = {"entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"}
    train(change(settings, train={"iters": 1}))
    assert not costly & metrics(tmp_path / "run")[0].keys()
    train(change(settings, train={"iters": 1, "token_metrics": True, "output": str(tmp_path / "costly")}))
    assert costly <= metrics(tmp_path / "costly")[0].keys()


def test_only_the_newest_checkpoints_are_kept(settings: RunConfig, tmp_path: Path) -> None:
    train(change(settings, train={"save_every": 1, "keep_checkpoints": 2}))
    assert [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())] == ["step-0000005", "step-0000006"]


# interrupted and resumed


def hard(settings: RunConfig) -> RunConfig:
    """All that a resumed run can get wrong: dropout, Adam's moments, a warm-up, shuffled batches, evaluations, an epoch
    whose end cuts a step of accumulated batches short, and frozen blocks whose output is kept."""
    return change(
        settings,
        data={"valid_fraction": 0.2},
        lora={"dropout": 0.2},
        optim={"lr_scheduler_type": "cosine", "warmup_steps": 3, "weight_decay": 0.01},
        train={"grad_accumulation_steps": 2, "iters": 9, "save_every": 2, "steps_per_eval": 3, "token_metrics": True},
    )


def stop_by_signal(step: int) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == step:
            signal.raise_signal(signal.SIGINT)

    return listen


def break_off(step: int) -> Callable[[Event], None]:
    """As a power cut would, for all that Python can do: nothing after this step is done."""

    def listen(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == step:
            raise SystemExit

    return listen


def in_pieces(config: RunConfig, stops: list[Callable[[Event], None]]) -> TrainResult:
    resume = False
    for stop in stops:
        with contextlib.suppress(SystemExit):
            assert train(config, resume=resume, on_event=stop).interrupted
        resume = True
    return train(config, resume=True)


@pytest.mark.parametrize("arch", ["llama", "mamba2"])
@pytest.mark.parametrize(
    "stops",
    [[stop_by_signal(4)], [stop_by_signal(1), stop_by_signal(5), stop_by_signal(6)], [break_off(5)], [break_off(1)]],
    ids=["ctrl-c", "three ctrl-c", "broken off after a checkpoint", "broken off before any checkpoint"],
)
def test_an_interrupted_run_ends_where_a_straight_one_does_bit_for_bit(
    stops: list[Callable[[Event], None]], arch: str, settings: RunConfig, tmp_path: Path
) -> None:
    folder = tiny_model_folder(tmp_path / "model", arch)
    config = change(hard(settings), model={"path": str(folder)})
    straight = train(config)
    result = in_pieces(change(config, train={"output": str(tmp_path / "pieces")}), stops)
    assert (result.steps, result.interrupted) == (9, False)
    assert (result.evaluations, result.best_step) == (straight.evaluations, straight.best_step)
    for file in (
        "adapters.safetensors",
        *(f"checkpoints/step-0000009/{n}.safetensors" for n in ("adapters", "optimizer", "random")),
    ):
        assert_same_bits(tmp_path / "run" / file, tmp_path / "pieces" / file)
    timing = ("seconds", "peak_memory_gb")
    untimed = [
        [{name: value for name, value in line.items() if name not in timing} for line in metrics(tmp_path / run)]
        for run in ("run", "pieces")
    ]
    assert untimed[0] == untimed[1]


WATCHDOG = (
    "[METAL] Command buffer execution failed: Impacting Interactivity "
    "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)."
)


def fail_at(call: int, function: Callable[..., Any], *, after: bool = False) -> Callable[..., Any]:
    """The function, whose call of this number ends as Metal's watchdog ends it: at once, or after all of it."""
    calls = 0

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            raise RuntimeError(WATCHDOG)
        found = function(*arguments, **options)
        if calls == call:
            raise RuntimeError(WATCHDOG)
        return found

    return failing


@pytest.mark.parametrize(
    ("place", "call", "after", "finished"),
    [
        ("step.Steps._gradient", 9, False, 4),  # the second micro-batch of step 5, with the update of step 4 done
        ("step.Steps._gradient", 8, False, 3),  # step 5 fails while it is described, and 4 is not waited for yet
        ("step.Steps._begin", 5, True, 4),  # parameters and optimizer are replaced already
        ("loop.evaluate_rows", 3, False, 6),  # after the step, which has not been evaluated then
        ("step.Steps._begin", 1, True, 0),
    ],
)
def test_where_the_gpu_gives_up_the_last_finished_step_is_saved_and_the_run_goes_on_bit_for_bit(
    place: str, call: int, after: bool, finished: int, settings: RunConfig, tmp_path: Path
) -> None:
    straight = train(change(hard(settings), train={"save_every": 100}))
    broken = change(hard(settings), train={"save_every": 100, "output": str(tmp_path / "broken")})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DeviceError, match="kept the display waiting") as caught:
        module, _, name = f"mlx_dpo.training.{place}".rpartition(".")
        owner: Any = Steps if module.endswith("Steps") else loop
        patch.setattr(owner, name, fail_at(call, getattr(owner, name), after=after))
        train(broken)
    assert f"after step {finished}: " in caught.value.message
    assert ("--resume goes on" in caught.value.remedy) == (finished > 0)
    assert "AGX_RELAX_CDM_CTXSTORE_TIMEOUT" in caught.value.remedy
    saved = [path.name for path in (tmp_path / "broken").glob("checkpoints/*")]
    assert saved == ([f"step-{finished:07d}"] if finished else [])
    result = train(broken, resume=True)
    assert (result.evaluations, result.best_step) == (straight.evaluations, straight.best_step)
    for file in ("adapters", *(f"checkpoints/step-0000009/{n}" for n in ("adapters", "optimizer", "random"))):
        assert_same_bits(tmp_path / f"run/{file}.safetensors", tmp_path / f"broken/{file}.safetensors")


def test_another_error_is_no_failure_of_the_gpu(settings: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any) -> None:
        raise RuntimeError("[addmm] shapes do not fit")

    monkeypatch.setattr(Steps, "_begin", wrong)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train(settings)


def test_a_checkpoint_comes_after_so_many_minutes_too(settings: RunConfig) -> None:
    """A billionth of one is over at every step; null leaves it to the steps."""
    for minutes, expected in ((1e-9, [1, 2, 3, 4, 5, 6, 6]), (10.0, [4, 6, 6]), (None, [4, 6, 6])):
        said: list[Event] = []
        output = f"{settings.train.output}-{minutes}"
        train(
            change(settings, train={"save_every": 4, "save_every_minutes": minutes, "output": output}),
            on_event=said.append,
        )
        assert [event.step for event in said if isinstance(event, Saved)] == expected


def test_an_interrupt_between_two_checkpoints_saves_first(settings: RunConfig, tmp_path: Path) -> None:
    said: list[Event] = []

    def listen(event: Event) -> None:
        said.append(event)
        stop_by_signal(3)(event)

    result = train(change(settings, train={"save_every": 100}), on_event=listen)
    assert (result.steps, result.interrupted) == (3, True)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-0000003"]
    assert (tmp_path / "run/adapters.safetensors").is_file(), "what was learned so far can be used"
    assert not (tmp_path / "run/.lock").exists()


def test_an_interrupt_while_saving_ends_the_run_with_a_later_checkpoint_or_none_lost(
    settings: RunConfig, tmp_path: Path
) -> None:
    def listen(event: Event) -> None:
        if isinstance(event, Saved) and event.step == 2:
            signal.raise_signal(signal.SIGINT)

    result = train(change(settings, train={"save_every": 2}), on_event=listen)
    assert result.interrupted
    newest = max(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert newest == f"step-{result.steps:07d}"


def test_an_interrupt_before_the_first_step_can_be_resumed(settings: RunConfig, tmp_path: Path) -> None:
    config = change(settings, data={"valid_fraction": 0.3})

    def listen(event: Event) -> None:
        if isinstance(event, Evaluated):
            signal.raise_signal(signal.SIGINT)

    assert train(config, on_event=listen).steps == 0
    train(config, resume=True)
    train(change(config, train={"output": str(tmp_path / "straight")}))
    assert_same_bits(tmp_path / "run/adapters.safetensors", tmp_path / "straight/adapters.safetensors")


def test_a_reference_pass_that_was_interrupted_goes_on_where_it_was(settings: RunConfig, tmp_path: Path) -> None:
    totals: list[int] = []

    def listen(event: Event) -> None:
        if isinstance(event, Progressed) and event.name == "reference log-probs":
            totals.append(event.total)
            if event.done == 9 and event.total == 17:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, on_event=listen)
    assert not (tmp_path / "run").exists(), "nothing came of it yet"
    train(settings, on_event=listen)
    assert set(totals) == {17, 8}


def test_the_next_run_computes_no_reference(settings: RunConfig, tmp_path: Path) -> None:
    said: list[Event] = []
    train(settings)
    other = change(settings, loss={"beta": 0.5}, lora={"rank": 2}, train={"output": str(tmp_path / "other")})
    train(other, on_event=said.append)
    (phase,) = [event for event in said if isinstance(event, Progressed) and event.name == "reference log-probs"]
    assert phase.total == 0


def test_a_run_shorter_than_an_epoch_computes_only_what_it_comes_to(settings: RunConfig) -> None:
    """Two steps of two batches of 3 rows, of 17."""
    said: list[Event] = []
    train(change(settings, train={"iters": 2, "grad_accumulation_steps": 2, "shuffle": False}), on_event=said.append)
    totals = {event.name: event.total for event in said if isinstance(event, Progressed) and event.unit == "rows"}
    assert totals == {"frozen blocks": 12, "reference log-probs": 12}


def test_a_finished_run_has_nothing_left_to_do(settings: RunConfig, tmp_path: Path) -> None:
    train(settings)
    before = (tmp_path / "run/adapters.safetensors").read_bytes(), metrics(tmp_path / "run")
    said: list[Event] = []
    result = train(settings, resume=True, on_event=said.append)
    assert (result.steps, result.interrupted) == (6, False)
    assert not [event for event in said if isinstance(event, Stepped)]
    assert ((tmp_path / "run/adapters.safetensors").read_bytes(), metrics(tmp_path / "run")) == before


def test_a_run_that_changed_cannot_go_on_and_every_change_is_named(settings: RunConfig, tmp_path: Path) -> None:
    train(settings, on_event=stop_by_signal(2))
    changed = change(
        settings,
        data={"path": str(written(tmp_path / "more.jsonl", preferences(18)))},
        lora={"dropout": 0.1},
        loss={"beta": 0.2},
        optim={"learning_rate": 1e-4},
        train={"seed": 7},
    )
    with pytest.raises(RunError) as caught:
        train(changed, resume=True)
    for name in ("rows", "lora", "loss", "optim", "order"):
        assert f"\n  {name}: was " in str(caught.value)
    assert train(settings, resume=True).steps == 6, "the run itself is unharmed"


def test_rows_cut_otherwise_are_other_rows(settings: RunConfig) -> None:
    """keep_end moves the beginning of what is read, while prompt and answers stay."""
    cut = change(settings, data={"max_length": 12, "truncation_mode": "keep_end"})
    train(cut, on_event=stop_by_signal(2))
    with pytest.raises(RunError, match="rows: was"):
        train(change(cut, data={"max_length": 11}), resume=True)


def test_a_dropout_that_changed_is_noticed_for_a_given_adapter_too(settings: RunConfig, tmp_path: Path) -> None:
    train(settings)
    second = change(settings, model={"adapter": str(tmp_path / "run")}, train={"output": str(tmp_path / "second")})
    train(second, on_event=stop_by_signal(2))
    with pytest.raises(RunError, match="lora: was"):
        train(change(second, lora={"dropout": 0.3}), resume=True)


# what goes wrong


def test_a_loss_that_is_no_number_ends_the_run_and_spares_what_was_saved(settings: RunConfig, tmp_path: Path) -> None:
    wild = change(settings, optim={"name": "sgd", "learning_rate": 1e30, "max_grad_norm": 0}, train={"save_every": 1})
    with pytest.raises(RunError, match=r"step \d+: loss") as caught:
        train(wild)
    assert "--learning-rate" in caught.value.remedy
    step = int(str(caught.value).split(":")[0].removeprefix("step "))
    assert max(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == f"step-{step - 1:07d}"


def test_rows_that_are_all_too_long_end_it_before_anything_is_written(settings: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="max_length 2"):
        train(change(settings, data={"max_length": 2}))
    assert not (tmp_path / "run").exists()


def test_an_adapter_for_another_model_ends_it_before_anything_is_written(settings: RunConfig, tmp_path: Path) -> None:
    train(settings)
    other = tiny_model_folder(tmp_path / "other", hidden_size=96)
    config = change(
        settings,
        model={"path": str(other), "adapter": str(tmp_path / "run")},
        train={"output": str(tmp_path / "new")},
    )
    with pytest.raises(MlxDpoError, match="for another model"):
        train(config)
    assert not (tmp_path / "new").exists()


# the real small model


@pytest.mark.real_model
def test_the_real_model_starts_at_ln_2_and_its_adapter_is_mlx_lms(
    demo_model: Path, settings: RunConfig, tmp_path: Path
) -> None:
    import mlx_lm

    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {i} plus {i}?"}],
            "chosen": [{"role": "assistant", "content": f"{2 * i}."}],
            "rejected": [{"role": "assistant", "content": f"Great question! {i} plus {i} is, of course, {2 * i}."}],
        }
        for i in range(2, 8)
    ]
    config = change(
        settings,
        model={"path": str(demo_model)},
        data={"path": str(written(tmp_path / "real.jsonl", rows))},
        lora={"num_layers": 4, "rank": 8},
        train={"batch_size": 6, "iters": 3},
    )
    train(config)
    steps = metrics(tmp_path / "run")
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[-1]["loss"] < steps[0]["loss"]
    tokens = mx.array([[504, 3575, 282, 4649, 314]])
    theirs, _ = mlx_lm.load(str(demo_model), adapter_path=str(tmp_path / "run"))
    theirs.set_dtype(mx.float32)
    ours = load(config.model).model
    lora.load(ours, tmp_path / "run")
    assert mx.abs(ours(tokens) - theirs(tokens)).max() < 1e-3
