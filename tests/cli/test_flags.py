"""Every setting has a flag, which arrives; what is given wrongly is named, all of it at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_dpo.cli.flags import flag_names
from mlx_dpo.config import LoraConfig, RunConfig, TrainConfig
from mlx_dpo.settings import Setting, choices, known_settings, required_type
from support.command_line import call

FLAGS = [setting for key, setting in known_settings().items() if not key.startswith("speed.")]


def sample(setting: Setting) -> tuple[list[str], object]:
    """A command line's words that change `setting` from its default, and the value they stand for."""
    flag, kind = flag_names(setting)[0], required_type(setting.kind)
    special: dict[str, tuple[str, object]] = {
        "model.quantize_bits": ("4", 4),
        "model.quantize_group_size": ("32", 32),
        "optim.name": ("lion", "lion"),
        "train.eval_samples": ("0", 0),
        "data.chat_template_kwargs": ('{"reasoning_effort": "low"}', {"reasoning_effort": "low"}),
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


def test_all_wrong_flags_are_named_at_once() -> None:
    said = call("train", "--rank", "x", "--loss", "sigmoid", "--dropout", "2", "--set", "a.b=1", code=2).stderr
    assert "3 settings cannot be used" in said
    assert "- --rank: must be a whole number, not 'x'" in said
    assert "- --dropout: must be at least 0 and below 1, not 2.0" in said


def test_defaults_stand_in_the_help_as_they_stand_in_the_settings() -> None:
    shown = " ".join(call("train", "--help").stdout.replace("│", " ").split())
    assert f"[default: {TrainConfig().batch_size}]" in shown
    assert f"[default: {LoraConfig().rank}]" in shown


@pytest.mark.parametrize("verb", ["train", "sft", "plan"])
def test_a_router_loss_is_refused_with_the_reason(verb: str) -> None:
    said = call(verb, "--model", "m", "--data", "d", "--router-aux-loss-coef", "0.001", code=2).stderr
    assert "--router-aux-loss-coef: the router's load-balancing loss is not computed here" in said
    assert "unknown" not in said
    assert "--router-aux-loss-coef" not in call(verb, "--help").stdout, "nothing to offer"


def test_thinking_is_one_of_the_chat_templates_arguments(tmp_path: Path, trained: list[tuple[RunConfig, bool]]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: {chat_template_kwargs: {enable_thinking: true, reasoning_effort: low}}\n")
    asked = ("train", "--model", "m", "--data", "d", "--config", file)
    call(*asked, "--thinking", "off")
    call(*asked, "--chat-template-kwargs", '{"enable_thinking": false, "style": null}', "--thinking", "on")
    call("sft", *asked[1:5], "--thinking", "off")
    assert [config.data.chat_template_kwargs for config, _ in trained] == [
        {"enable_thinking": False, "reasoning_effort": "low"},
        {"enable_thinking": True, "reasoning_effort": "low", "style": None},
        {"enable_thinking": False},
    ]
    assert "--thinking" in call(*asked, "--thinking", "maybe", code=2).stderr


@pytest.mark.parametrize("words", ["{'a': 1}", "[1]", "off", '{"messages": []}'])
def test_arguments_of_the_template_that_are_none_are_refused(words: str) -> None:
    said = call("train", "--model", "m", "--data", "d", "--chat-template-kwargs", words, code=2).stderr
    assert "--chat-template-kwargs: must be" in said


@pytest.mark.parametrize(
    "verb", ["check", "plan", "sft", "train", "eval", "score", "generate", "fuse", "export ollama"]
)
def test_every_verb_that_goes_through_the_template_can_be_told(verb: str) -> None:
    shown = call(*verb.split(), "--help").stdout
    assert "--thinking" in shown
    assert "--chat-template-kwargs" in shown
