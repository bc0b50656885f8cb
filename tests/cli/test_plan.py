"""`mlx-dpo plan`: what it prints and writes as JSON, and what its exit status says."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from mlx_dpo.cli.app import app
from support.tiny_models import tiny_model_folder


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("plan")
    rows = [{"prompt": f"{i} " * 20, "chosen": "yes " * 30, "rejected": "no " * 9} for i in range(4)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny_model_folder(folder / "model")
    return ["plan", "--model", str(model), "--data", str(folder / "pairs.jsonl"), "--batch-size", "2"]


def test_a_run_that_fits_is_told_by_its_parts(asked: list[str]) -> None:
    result = CliRunner().invoke(app, [*asked, "--memory", "16GB"])
    assert result.exit_code == 0, result.output
    for word in ("weights", "adapter", "optimizer", "activations", "in a step, of 11.5 GB that a Mac with 16GB has"):
        assert word in " ".join(result.output.split())
    assert "does not fit" not in result.output


def test_as_json_with_bytes_that_add_up(asked: list[str]) -> None:
    result = CliRunner().invoke(app, [*asked, "--memory", "16GB", "--json"])
    plan = json.loads(result.stdout)
    assert plan["fits"] and plan["change"] == "" and "timing" not in plan
    assert plan["peak"] == sum(plan["parts"].values()) == max(plan["phases"].values())
    assert plan["largest"]["rows"] == 2 and plan["machine"]["total"] == 16 * 2**30


def test_a_run_that_does_not_fit_says_so_and_ends_with_status_1(asked: list[str]) -> None:
    result = CliRunner().invoke(app, [*asked, "--memory", "1MB"])
    assert result.exit_code == 1
    assert "it does not fit: take a smaller model" in result.output
