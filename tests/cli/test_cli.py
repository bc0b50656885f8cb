"""The command line as its user meets it: what arrives, what is said, where it is said, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from mlx_dpo.cli import demo as demo_verb
from mlx_dpo.cli.app import VERBS, app
from mlx_dpo.cli.flags import flag_names
from mlx_dpo.config import LoraConfig, RunConfig, TrainConfig
from mlx_dpo.errors import RunError
from mlx_dpo.settings import Setting, choices, known_settings, required_type, resolve, to_yaml
from support.tiny_models import tiny_model_folder

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [setting for key, setting in known_settings().items() if not key.startswith("speed.")]


def call(*arguments: object, code: int = 0) -> Any:
    """Runs a command line in this process; `stdout` and `stderr` of what comes back are kept apart."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def pairs(file: Path, rows: int = 6) -> Path:
    """A small file of preferences, each with a prompt of its own."""
    row = {"prompt": "Question {}?", "chosen": " Yes {}.", "rejected": " No, not {} at all."}
    lines = [json.dumps({key: text.format(n) for key, text in row.items()}) for n in range(rows)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RunConfig, bool]]:
    """What `train` was called with, instead of training."""
    calls = []

    def train(config: RunConfig, *, resume: bool, on_event: object) -> SimpleNamespace:
        calls.append((config, resume))
        return SimpleNamespace(
            output=Path(config.train.output), steps=3, total_steps=3, interrupted=False, evaluations=[], best_step=3
        )

    monkeypatch.setattr(import_module("mlx_dpo.training.loop"), "train", train)
    return calls


# Help and endings


def test_without_arguments_there_is_help_that_opens_with_examples() -> None:
    shown = CliRunner().invoke(app, []).output
    assert 0 < shown.index("Examples") < shown.index("mlx-dpo demo") < shown.index("Commands")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples(verb: str) -> None:
    shown = call(verb, "--help").stdout
    assert "Examples" in shown
    assert f"mlx-dpo {verb}" in shown


def test_the_version_can_be_asked_for() -> None:
    assert call("--version").stdout == "mlx-dpo 0.1.0\n"


def test_a_mistyped_verb_or_flag_is_refused_with_a_suggestion() -> None:
    assert "'train'" in call("trian", code=2).stderr
    assert "--learning-rate" in call("train", "--lerning-rate", "1", code=2).stderr


def test_what_is_missing_is_named() -> None:
    assert "--model and --data must be given" in call("train", code=2).stderr
    assert "--adapter must be given" in call("fuse", "--model", "m", "--output", "o", code=2).stderr


def test_an_error_of_the_users_is_a_message_and_an_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RunError("the disk is [full]", "remove something")

    monkeypatch.setattr(import_module("mlx_dpo.training.loop"), "train", fail)
    result = call("train", "--model", "m", "--data", "d", code=1)
    assert result.stdout == ""
    assert result.stderr.splitlines() == ["error: the disk is [full]", "remove something"]


def test_an_error_of_the_programs_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(import_module("mlx_dpo.training.loop"), "train", fail)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        call("train", "--model", "m", "--data", "d")


def test_ctrl_c_ends_with_130_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("mlx_dpo.training.loop"), "train", interrupt)
    assert call("train", "--model", "m", "--data", "d", code=130).stderr == "interrupted\n"


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    data = pairs(tmp_path / "pairs.jsonl")
    command = [sys.executable, "-m", "mlx_dpo", "check", "--data", str(data)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    os.close(writing)
    assert "Traceback" not in done.stderr


def test_a_run_that_was_stopped_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(config: RunConfig, **_: object) -> SimpleNamespace:
        return SimpleNamespace(output=tmp_path, steps=3, total_steps=9, interrupted=True, evaluations=[], best_step=0)

    monkeypatch.setattr(import_module("mlx_dpo.training.loop"), "train", train)
    result = call("train", "--model", "m", "--data", "d", "--output", tmp_path, code=130)
    assert "stopped after step 3 of 9" in result.stderr
    assert f"mlx-dpo train --output {tmp_path} --resume" in result.stderr


# Flags


def sample(setting: Setting) -> tuple[list[str], object]:
    """A command line's words that change `setting` from its default, and the value they stand for."""
    flag, kind = flag_names(setting)[0], required_type(setting.kind)
    special: dict[str, tuple[str, object]] = {
        "model.quantize_bits": ("4", 4),
        "model.quantize_group_size": ("32", 32),
        "optim.name": ("lion", "lion"),
    }
    if kind is bool:
        return [flag], not setting.default
    if choices(kind):
        word = next(word for word in choices(kind) if word != setting.default)
        return [flag, word], word
    by_kind: dict[Any, tuple[str, object]] = {int: ("3", 3), float: ("0.25", 0.25), str: ("word", "word")}
    word, value = special.get(setting.key) or by_kind.get(kind) or ("a,b", ("a", "b"))
    return [flag, word], value


@pytest.mark.parametrize("setting", FLAGS, ids=[setting.key for setting in FLAGS])
def test_every_flag_of_train_arrives(setting: Setting, trained: list[tuple[RunConfig, bool]]) -> None:
    words, value = sample(setting)
    needs = {"optim.momentum": ["--optimizer", "sgd"]}.get(setting.key, [])
    call("train", "--model", "m", "--data", "d", *words, *needs)
    (config, _), (section, name) = trained[0], setting.key.split(".")
    assert getattr(getattr(config, section), name) == value


def test_flags_not_given_leave_the_file_alone(tmp_path: Path, trained: list[tuple[RunConfig, bool]]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: m}\ndata: {path: d}\nloss: {beta: 0.7}\nlora: {rank: 2}\n")
    result = call("train", "--config", file, "--rank", 4, "--set", "train.epochs=3", "--output", tmp_path / "out")
    config, resume = trained[0]
    assert (config.loss.beta, config.lora.rank, config.train.epochs, resume) == (0.7, 4, 3.0, False)
    assert result.stdout == f"{tmp_path / 'out'}\n"


def test_resume_takes_the_settings_that_the_run_was_started_with(
    tmp_path: Path, trained: list[tuple[RunConfig, bool]]
) -> None:
    begun = resolve(assignments=["model.path=m", "data.path=d", "loss.beta=0.7", f"train.output={tmp_path}"])
    (tmp_path / "config.yaml").write_text(to_yaml(begun))
    call("train", "--output", tmp_path, "--resume")
    assert trained == [(begun, True)]


def test_sft_is_training_with_the_loss_that_imitates(trained: list[tuple[RunConfig, bool]]) -> None:
    call("sft", "--model", "m", "--data", "d", "--rank", "4")
    config, _ = trained[0]
    assert (config.loss.type, config.lora.rank) == ("sft", 4)


def test_all_wrong_flags_are_named_at_once() -> None:
    said = call("train", "--rank", "x", "--loss", "sigmoid", "--dropout", "2", "--set", "a.b=1", code=2).stderr
    assert "3 settings cannot be used" in said
    assert "- --rank: must be a whole number, not 'x'" in said
    assert "- --dropout: must be at least 0 and below 1, not 2.0" in said


# The whole way, on a tiny model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A run folder that `train` made, with what it said."""
    folder = tmp_path_factory.mktemp("way")
    data = pairs(folder / "pairs.jsonl")
    environment = os.environ | {"MLX_DPO_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "mlx_dpo", "train", "--model", tiny_llama, "--data", data]
    command += ["--output", folder / "run", "--num-layers", "-1", "--batch-size", "2", "--learning-rate", "1e-2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder / 'run'}\n"
    assert "step 1 of 3: loss 0.6931" in done.stderr
    assert "held out, after step 3: " in done.stderr
    return folder / "run"


def test_eval_says_how_many_pairs_are_ranked_right(run: Path, tiny_llama: Path) -> None:
    asked = ("eval", "--model", tiny_llama, "--adapter", run, "--data", run.parent / "pairs.jsonl")
    found = json.loads(call(*asked, "--json").stdout)
    assert found["rows"] == 6
    assert found["accuracy_low"] <= found["rewards/accuracies"] <= found["accuracy_high"]
    assert "rewards/accuracies" in call(*asked).stdout


def test_score_gives_a_line_a_row_whose_margin_is_what_it_is_made_of(run: Path, tiny_llama: Path) -> None:
    asked = ("score", "--model", tiny_llama, "--adapter", run, "--data", run.parent / "pairs.jsonl", "--beta", "0.5")
    rows = [json.loads(line) for line in call(*asked, "--json").stdout.splitlines()]
    assert len(rows) == 6
    for row in rows:
        assert row["chosen_reward"] == pytest.approx(0.5 * (row["chosen_logps"] - row["ref_chosen_logps"]), abs=1e-5)
        assert row["margin"] == pytest.approx(row["chosen_reward"] - row["rejected_reward"], abs=1e-5)
    table = call(*asked, "--quiet").stdout.splitlines()
    assert table[0].split("\t") == list(rows[0])
    assert len(table) == 7


def test_generate_streams_an_answer_or_both(run: Path, tiny_llama: Path) -> None:
    asked = ("generate", "--model", tiny_llama, "--adapter", run, "--max-tokens", "5", "Hello", "you")
    plain = call(*asked).stdout
    answers = [json.loads(line) for line in call(*asked, "--json").stdout.splitlines()]
    assert plain == "".join(answer["text"] + "\n" for answer in answers)
    both = [json.loads(line) for line in call(*asked, "--json", "--compare").stdout.splitlines()]
    assert [found["prompt"] for found in both] == ["Hello", "you"]
    assert [found["tuned"]["text"] for found in both] == [answer["text"] for answer in answers]
    assert "before" in call(*asked, "--compare").stdout


def test_fuse_writes_a_folder_that_answers_alike(run: Path, tiny_llama: Path, tmp_path: Path) -> None:
    fused = tmp_path / "fused"
    result = call("fuse", "--model", tiny_llama, "--adapter", run, "--output", fused, "--rows", "4")
    assert result.stdout == f"{fused}\n"
    assert "verified" in result.stderr
    words = ("--max-tokens", "5", "--json", "Hello")
    before = json.loads(call("generate", "--model", tiny_llama, "--adapter", run, *words).stdout)
    assert json.loads(call("generate", "--model", fused, *words).stdout)["text"] == before["text"]


def test_check_shows_what_is_prompt_what_is_scored_and_what_was_cut(tiny_llama: Path, tmp_path: Path) -> None:
    row = {"prompt": "Hello", "chosen": " there, how are you today?", "rejected": " you"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    asked = ("check", "--data", tmp_path / "pairs.jsonl", "--model", tiny_llama)
    whole = call(*asked, "--preview", "1").stdout
    assert "1 pair rows" in whole
    assert "scored" in whole
    assert "cut" not in whole
    assert "today" in whole
    cut = call(*asked, "--preview", "1", "--max-length", "6")
    assert "cut" in cut.stdout
    assert "1 of 1 rows cut to max_length 6" in cut.stderr
    assert (
        "--preview needs a --model" in call("check", "--data", tmp_path / "pairs.jsonl", "--preview", 1, code=2).stderr
    )


def test_the_demo_goes_all_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(model: Path, output: Path) -> RunConfig:
        config = settings(model, output)
        return replace(config, lora=LoraConfig(num_layers=1), train=replace(config.train, iters=2, batch_size=2))

    settings = demo_verb.demo_config
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = tiny_model_folder(tmp_path / "model", **shape, num_key_value_heads=1)
    monkeypatch.setattr(demo_verb, "demo_config", small)
    monkeypatch.setattr(demo_verb, "LONGEST_ANSWER", 4)
    monkeypatch.setattr("mlx_dpo.demo.model.fetch_demo_model", lambda progress: model)
    shown = call("demo", "--output", tmp_path / "run").stdout
    assert "What is the largest ocean on Earth?" in shown
    assert "51 unseen pairs ranked right" in shown
    assert "adapters.safetensors" in shown


def test_a_second_demo_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    assert demo_verb.free_folder(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    assert demo_verb.free_folder(tmp_path / "demo") == tmp_path / "demo-2"


# Bad input: each with what is wrong, where, and no traceback


def train_refusal(model: Path, data: Path, *more: object) -> str:
    command = ("train", "--model", model, "--data", data, "--output", data.parent / "out", "--num-layers", "-1", *more)
    return str(call(*command, code=1).stderr)


def test_a_missing_data_file_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    assert "nowhere.jsonl" in train_refusal(tiny_llama, tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "empty"),
        (['{"prompt": "a", "chosen": "b", "rejected": "c"}', '{"prompt": "a",'], "line 2"),
        (
            ['{"prompt": "a", "chosen": "b", "rejected": "c"}', '{"prompt": "a", "chosen": "b", "rejectd": "c"}'],
            "line 2",
        ),
    ],
    ids=["empty file", "broken JSON", "row without rejected"],
)
def test_bad_rows_are_named_with_their_line(tiny_llama: Path, tmp_path: Path, lines: list[str], said: str) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(lines))
    message = train_refusal(tiny_llama, data)
    assert str(data) in message
    assert said in message


def test_prompts_longer_than_max_length_leave_nothing_to_train_on(tiny_llama: Path, tmp_path: Path) -> None:
    message = train_refusal(tiny_llama, pairs(tmp_path / "pairs.jsonl"), "--max-length", "2")
    assert "max_length 2" in message
    assert "raise --max-length" in message


def test_a_data_set_smaller_than_a_batch_is_trained_on_with_a_warning(tiny_llama: Path, tmp_path: Path) -> None:
    data = pairs(tmp_path / "pairs.jsonl", 3)
    asked = ("train", "--model", tiny_llama, "--data", data, "--output", tmp_path / "run", "--num-layers", "-1")
    assert "warning: 2 rows are fewer than a batch of 4" in call(*asked).stderr


def test_a_model_folder_without_weights_is_refused(tmp_path: Path) -> None:
    model = tiny_model_folder(tmp_path / "model")
    (model / "model.safetensors").unlink()
    message = train_refusal(model, pairs(tmp_path / "pairs.jsonl"))
    assert str(model) in message
    assert "safetensors" in message


def test_an_adapter_for_another_model_is_refused(run: Path, tmp_path: Path) -> None:
    other = tiny_model_folder(tmp_path / "model", hidden_size=32, head_dim=8)
    message = train_refusal(other, pairs(tmp_path / "pairs.jsonl"), "--adapter", run)
    assert str(run) in message


def test_an_output_folder_that_holds_something_is_refused(run: Path, tiny_llama: Path) -> None:
    asked = ("train", "--model", tiny_llama, "--data", run.parent / "pairs.jsonl", "--output", run)
    said = call(*asked, "--num-layers", "-1", code=1).stderr
    assert f"--output {run} exists and holds" in said
    assert "--resume" in said


def test_a_gguf_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "no.gguf" in call("import", tmp_path / "no.gguf", "--output", tmp_path / "model", code=1).stderr


def test_defaults_stand_in_the_help_as_they_stand_in_the_settings() -> None:
    shown = " ".join(call("train", "--help").stdout.replace("│", " ").split())
    assert f"[default: {TrainConfig().batch_size}]" in shown
    assert f"[default: {LoraConfig().rank}]" in shown
