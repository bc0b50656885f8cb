"""What an owner of a Mac runs and sends: it measures, survives what fails, and says what the figures mean."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from support.tiny_models import tiny_model_folder

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from maccheck import __main__ as mac_check  # noqa: E402
from maccheck.page import is_bad, page, said  # noqa: E402


def test_a_short_check_writes_figures_and_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'scripts'}:{ROOT / 'tests'}")
    model = tiny_model_folder(tmp_path / "llama", "llama")
    wanted = ["--only", "machine", "--only", "exactness", "--only", "head"]
    arguments = ["mac-check", "--model", str(model), "--dtype", "bfloat16", "--output", str(tmp_path / "out"), *wanted]
    monkeypatch.setattr(sys, "argv", arguments)
    mac_check.main()
    results = json.loads((tmp_path / "out" / "mac-check.json").read_text())
    assert [entry["section"] for entry in results] == ["machine", "exactness", "head"]
    assert not [entry for entry in results if "error" in entry], results
    exact = results[1]["found"]
    assert set(exact) >= {"bfloat16", "float32", "rounding noise, nats"}
    assert all(of["largest"] < 1e-3 for of in exact["float32"].values())
    assert "of 4" in exact["rows that a check in this dtype would have failed"]
    assert "in float32 log-probs agree to" in capsys.readouterr().out
    assert "rounding noise" in (tmp_path / "out" / "mac-check.html").read_text()


def test_a_section_that_fails_is_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'scripts'}:{ROOT / 'tests'}")
    arguments = ["mac-check", "--model", str(tmp_path / "none"), "--dtype", "float32", "--only", "update"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--output", str(tmp_path / "out")])
    mac_check.main()
    (entry,) = json.loads((tmp_path / "out" / "mac-check.json").read_text())
    assert "exit status 1" in entry["error"]
    assert is_bad(said([entry])[0])
    assert "class=bad" in page([entry])


def test_the_page_names_what_is_not_as_it_should_be() -> None:
    entry = {"section": "resume", "model": "m/<b>", "dtype": "float16", "seconds": 1.0}
    same = {"llama": {"the same bits": True}, "qwen3_moe": {"the same bits": True}}
    other = same | {"qwen3_moe": {"the same bits": False}}
    assert said([entry | {"found": same}]) == ["a resumed run has the same bits: resume (<b>, float16)"]
    assert is_bad(said([entry | {"found": other}])[0])
    assert "<b>" not in page([entry | {"found": other}]).replace("&lt;b&gt;", "")
