"""`mlx-dpo train`: what it prints where, how a run goes on, and what is said of data and models that cannot be used."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_dpo.config import RunConfig
from mlx_dpo.settings import resolve, to_yaml
from support.command_line import call, pairs
from support.templates import stand_in
from support.tiny_models import tiny_model_folder


def test_a_run_that_was_stopped_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(config: RunConfig, **_: object) -> SimpleNamespace:
        return SimpleNamespace(output=tmp_path, steps=3, total_steps=9, interrupted=True, evaluations=[], best_step=0)

    monkeypatch.setattr(import_module("mlx_dpo.training.loop"), "train", train)
    result = call("train", "--model", "m", "--data", "d", "--output", tmp_path, code=130)
    assert "stopped after step 3 of 9" in result.stderr
    assert f"mlx-dpo train --output {tmp_path} --resume" in result.stderr


def test_a_run_that_stopped_early_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(config: RunConfig, **_: object) -> SimpleNamespace:
        return SimpleNamespace(
            output=tmp_path, steps=40, total_steps=90, interrupted=False, evaluations=[], best_step=20,
            stopped_early=True,
        )  # fmt: skip

    monkeypatch.setattr(import_module("mlx_dpo.training.loop"), "train", train)
    result = call("train", "--model", "m", "--data", "d", "--early-stopping-patience", "2")
    said = " ".join(result.stderr.split())
    assert "stopped early, after step 40 of 90: no better held-out loss than step 20's in 2 evaluations" in said


def test_resume_takes_the_settings_that_the_run_was_started_with(
    tmp_path: Path, trained: list[tuple[RunConfig, bool]]
) -> None:
    begun = resolve(assignments=["model.path=m", "data.path=d", "loss.beta=0.7", f"train.output={tmp_path}"])
    (tmp_path / "config.yaml").write_text(to_yaml(begun))
    call("train", "--output", tmp_path, "--resume")
    assert trained == [(begun, True)]


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


def test_rows_that_are_piped_in_are_trained_on(run: Path, tiny_llama: Path, tmp_path: Path) -> None:
    asked = ("train", "--model", tiny_llama, "--data", "-", "--output", tmp_path / "run", "--num-layers", "-1")
    said = call(*asked, "--batch-size", "2", piped=(run.parent / "pairs.jsonl").read_text()).stderr
    assert "step 1 of 3: loss 0.6931" in said
    assert (tmp_path / "run" / "adapters.safetensors").is_file()


def test_a_setting_of_an_earlier_version_is_refused_with_its_name_of_today() -> None:
    said = call("train", "--model", "m", "--data", "d", "--set", "speed.trunk=false", code=2).stderr
    wanted = "--set speed.trunk=false: unknown setting; did you mean speed.activation_cache?"
    assert said == f"error: {wanted}\n"


def test_a_run_and_what_is_done_with_it_later_think_or_do_not(tmp_path: Path) -> None:
    """One setting for the run; its adapter answers and is judged with the same, unless told otherwise."""
    model = tiny_model_folder(tmp_path / "model", num_hidden_layers=1)
    settings = model / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": stand_in("qwen3")}))
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Is it {n}?"}],
            "chosen": [{"role": "assistant", "content": "Yes."}],
            "rejected": [{"role": "assistant", "content": "No way."}],
        }
        for n in range(4)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = ("--model", model, "--data", tmp_path / "pairs.jsonl")
    train = ("train", *asked, "--iters", 1, "--batch-size", 2, "--num-layers", -1, "--output")
    told = " ".join(call(*train, tmp_path / "unsaid").stderr.split())
    assert told.count("4 of 4 rows are answered without reasoning where a runtime lets the model think first") == 1
    assert "--thinking off, which the run folder remembers" in told
    run = tmp_path / "off"
    assert "are answered without reasoning" not in call(*train, run, "--thinking", "off").stderr
    assert "chat_template_kwargs: {enable_thinking: false}" in (run / "config.yaml").read_text()

    def prompt_tokens(*words: object) -> int:
        answered = call("generate", "--model", model, "--json", "--max-tokens", 1, *words, "Hi").stdout
        return int(json.loads(answered)["prompt_tokens"])

    block = prompt_tokens("--thinking", "off") - prompt_tokens()
    assert block > 0
    assert prompt_tokens("--adapter", run) == prompt_tokens("--thinking", "off")
    assert prompt_tokens("--adapter", run, "--thinking", "on") == prompt_tokens()
    judged = json.loads(call("eval", *asked, "--adapter", run, "--json").stdout)
    assert judged["rows"] == 4
    said = call("eval", *asked, "--adapter", run, "--thinking", "on", "--quiet").stderr
    assert "are answered without reasoning" in " ".join(said.split())
