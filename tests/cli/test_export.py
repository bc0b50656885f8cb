"""`mlx-dpo export`: what each verb asks of the library, and what it prints of what comes back."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.command_line import call

VERBS: dict[str, tuple[str, list[str], dict[str, object]]] = {
    "gguf": ("gguf.export_gguf", ["--output", "o", "--outtype", "q8_0"], {"outtype": "q8_0", "rows": 4}),
    "gguf-adapter": ("gguf.export_gguf_adapter", ["--output", "o"], {"dtype": "f32", "rows": 4}),
    "peft": ("peft.export_peft", ["--output", "o", "--base-model", "me/base"], {"base_model": "me/base", "rows": 8}),
    "ollama": ("ollama.export_ollama", ["--output", "o", "--name", "mine"], {"name": "mine", "outtype": "f16"}),
    "lmstudio": ("lmstudio.export_lmstudio", ["--name", "o"], {"publisher": "local", "outtype": "f16"}),
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What the library was asked for, by position and by name, instead of doing it."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def export(*arguments: Any, **options: Any) -> SimpleNamespace:
        calls.append((arguments, options))
        verified = [] if "base_model" in options else None
        there = dict.fromkeys(("path", "output", "gguf"), "there")
        return SimpleNamespace(**there, verified=verified, has_template=False, commands=["ollama create"])

    for function, _, _ in VERBS.values():
        module, name = function.split(".")
        monkeypatch.setattr(import_module(f"mlx_dpo.export.{module}"), name, export)
    return calls


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_asked_for_reaches_the_library(asked: list[tuple[tuple[Any, ...], dict[str, Any]]], verb: str) -> None:
    _, words, expected = VERBS[verb]
    done = call("export", verb, "--model", "m", "--adapter", "a", *words, "--no-verify")
    (model, adapter, where), options = asked[0]
    assert (model.path, model.adapter, adapter, str(where)) == ("m", "a", "a", "o")
    assert options["verify"] is False and options["data"] is None
    assert {name: options[name] for name in expected} == expected
    assert done.stdout == ("ollama create\n" if verb == "ollama" else "there\n")
    call("export", verb, "--model", "m", "--adapter", "a", *words, "--data", "d", "--rows", "3")
    assert asked[1][1]["verify"] is True and asked[1][1]["data"].path == "d" and asked[1][1]["rows"] == 3


@pytest.mark.parametrize("verb", VERBS)
def test_what_was_not_checked_is_said_unless_quiet(
    asked: list[tuple[tuple[Any, ...], dict[str, Any]]], verb: str
) -> None:
    _, words, _ = VERBS[verb]
    loud = call("export", verb, "--model", "m", "--adapter", "a", *words)
    assert ("not checked in llama.cpp" in loud.stderr) is (verb != "peft")
    assert ("the chat template has no known counterpart" in loud.stderr) is (verb == "ollama")
    assert call("export", verb, "--model", "m", "--adapter", "a", *words, "--quiet").stderr == ""


@pytest.mark.parametrize("verb", VERBS)
def test_an_export_needs_a_model_and_an_adapter(verb: str) -> None:
    said = call("export", verb, *VERBS[verb][1], code=2).stderr
    assert "--model and --adapter must be given" in said


def test_what_was_measured_in_the_other_program_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(largest=0.0123, tolerance=0.05, mean=0.001, positions=40, control=1.5)
    report = SimpleNamespace(path=Path("tuned.gguf"), verified=found)
    monkeypatch.setattr(import_module("mlx_dpo.export.gguf"), "export_gguf", lambda *_, **__: report)
    done = call("export", "gguf", "--model", "m", "--adapter", "a", "--output", "o")
    assert done.stdout == "tuned.gguf\n"
    assert "off by 0.012 nats at most (0.05 allowed), 0.001 on average over 40 positions" in done.stderr
    assert "with the adapter off it would differ by 1.5" in done.stderr


def test_a_dry_run_to_the_hub_says_what_would_go_and_where(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def push(folder: Path, repo: str, **options: Any) -> SimpleNamespace:
        asked.update(options, folder=str(folder))
        return SimpleNamespace(files=[("adapters.safetensors", 2_500_000)], url=None, repo=repo, private=True)

    monkeypatch.setattr(import_module("mlx_dpo.export.hub"), "push", push)
    done = call("export", "hub", "--folder", "runs/a", "--repo", "me/tuned", "--dry-run")
    assert (asked["folder"], asked["private"], asked["dry_run"]) == ("runs/a", True, True)
    assert done.stdout.splitlines() == ["      2.50 MB  adapters.safetensors", "me/tuned (private; nothing was sent)"]


def test_an_export_is_made_and_checked_with_the_template_as_it_was_trained(
    asked: list[tuple[tuple[Any, ...], dict[str, Any]]], tmp_path: Path
) -> None:
    """The run folder says it; who runs the result is told to say it too."""
    (tmp_path / "config.yaml").write_text("data: {chat_template_kwargs: {enable_thinking: false}}\n")
    done = call("export", "gguf", "--model", "m", "--adapter", tmp_path, "--output", "o", "--no-verify")
    data = asked[0][1]["data"]
    assert (data.path, data.chat_template_kwargs) == ("", {"enable_thinking": False})
    assert """--chat-template-kwargs '{"enable_thinking": false}'""" in done.stderr
