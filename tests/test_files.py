"""Nothing is ever seen half written, and what can be computed again lies where the environment says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlx_dpo.files import cache_folder, written_whole


def test_a_file_becomes_visible_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "config.yaml"
    target.write_text("old")
    with written_whole(target) as beside:
        beside.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_an_error_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "config.yaml"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), written_whole(target) as beside:
        beside.write_text("ne")
        _ = 1 / 0
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_replaces_the_one_that_was_there(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    for content in ("first", "second"):
        with written_whole(target, folder=True) as beside:
            (beside / f"{content}.txt").write_text(content)
    assert [file.name for file in target.iterdir()] == ["second.txt"]
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_a_name_with_dots_may_be_a_folder_and_one_without_a_file(tmp_path: Path) -> None:
    with written_whole(tmp_path / "tuned-0.5", folder=True) as beside:
        (beside / "weights").write_text("1")
    with written_whole(tmp_path / "tuned") as beside:
        beside.write_text("2")
    assert (tmp_path / "tuned-0.5" / "weights").read_text() == "1"
    assert (tmp_path / "tuned").read_text() == "2"


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_DPO_CACHE", str(tmp_path / "elsewhere"))
    assert cache_folder() == tmp_path / "elsewhere"
    monkeypatch.delenv("MLX_DPO_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "mlx_dpo"
