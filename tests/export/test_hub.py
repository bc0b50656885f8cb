"""What goes to the Hub: private, only what belongs there, and nothing at all in a dry run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_dpo.errors import ModelError, UsageError
from mlx_dpo.export.hub import push


class Hub:
    """Stands where huggingface_hub's API stands, and writes down what it is asked."""

    calls: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012
    refusal: Exception | None = None

    def create_repo(self, repo: str, **settings: Any) -> str:
        if self.refusal:
            raise self.refusal
        self.calls.append(("create", {"repo": repo} | settings))
        return f"https://hub/{repo}"

    def upload_folder(self, **settings: Any) -> None:
        self.calls.append(("upload", settings))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setattr(Hub, "refusal", None)
    return Hub


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name in ("adapters.safetensors", "adapter_config.json", "README.md", "config.yaml", "metrics.jsonl", ".lock"):
        (tmp_path / name).write_text(name)
    (tmp_path / "checkpoints" / "step-0000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-0000001" / "adapters.safetensors").write_text("")
    return tmp_path


def test_a_dry_run_shows_what_would_go_and_asks_the_hub_nothing(run: Path, hub: type[Hub]) -> None:
    report = push(run, "me/tuned", dry_run=True)
    assert report.files == (("README.md", 9), ("adapter_config.json", 19), ("adapters.safetensors", 20))
    assert report.private
    assert report.url is None
    assert hub.calls == []


def test_an_adapter_goes_private_without_settings_metrics_and_checkpoints(run: Path, hub: type[Hub]) -> None:
    report = push(run, "me/tuned")
    (_, created), (_, uploaded) = hub.calls
    assert created == {"repo": "me/tuned", "private": True, "exist_ok": True}
    assert uploaded["repo_id"] == "me/tuned"
    assert sorted(uploaded["allow_patterns"]) == ["README.md", "adapter_config.json", "adapters.safetensors"]
    assert report.url == "https://hub/me/tuned"
    push(run, "me/tuned", private=False)
    assert hub.calls[2][1]["private"] is False


def test_a_model_goes_with_all_that_it_needs(tmp_path: Path, hub: type[Hub]) -> None:
    files = {
        "model.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
    }
    for name in files | {".hidden", "notes.md"}:
        (tmp_path / name).write_text("x")
    assert {name for name, _ in push(tmp_path, "me/tuned").files} == files


def test_a_refusal_of_the_hub_is_told_with_what_to_do(run: Path, hub: type[Hub]) -> None:
    hub.refusal = OSError("401 Client Error\nlong")
    with pytest.raises(ModelError, match=r"did not take .* as me/tuned: 401 Client Error\n") as refusal:
        push(run, "me/tuned")
    assert "hf auth login" in refusal.value.remedy


def test_what_is_no_repository_and_no_model_is_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(UsageError, match="no name of a repository"):
        push(run, "tuned")
    with pytest.raises(ModelError, match="neither adapter nor model"):
        push(run / "checkpoints", "me/tuned")
