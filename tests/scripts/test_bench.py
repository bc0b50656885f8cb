"""The measurements: the same rows for everyone, what is counted, and what a table is made of."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from benchmarks import __main__ as bench  # noqa: E402
from benchmarks import page, rounds  # noqa: E402
from benchmarks.contenders import OURS, PEERS  # noqa: E402
from benchmarks.limit import Matrices, step_flops  # noqa: E402
from benchmarks.ratios import ratios  # noqa: E402
from benchmarks.workloads import batches, workloads  # noqa: E402

from mlx_dpo.errors import UsageError  # noqa: E402
from mlx_dpo.logprobs.scorer import OPTIMIZATIONS  # noqa: E402
from mlx_dpo.planning.machine import Machine  # noqa: E402

DEMO = ROOT / "mlx_dpo" / "demo" / "data"


def seen(*walls: float, memory: float = 100, **stages: float) -> dict[str, Any]:
    """What a pass of a worker gives, with twice as many CPU as wall seconds."""
    taken = {name: {"wall": wall, "cpu": 2 * wall} for name, wall in stages.items()}
    steps = [{"wall": wall, "cpu": 2 * wall, "loss": 0.6931} for wall in walls]
    return {"steps": steps, "stages": taken, "peak_mlx_mb": memory, "peak_rss_mb": 2 * memory}


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


def test_the_demo_rows_give_every_workload_and_the_same_batches_each_time(tokenizer: Any) -> None:
    found = workloads(DEMO)
    assert set(found) == {"short", "medium", "prompt-heavy"}
    for workload in found.values():
        first = batches(workload, DEMO, tokenizer, 3)
        assert [len(batch) for batch in first] == [workload.batch] * 3
        assert batches(workload, DEMO, tokenizer, 3) == first
        for pair in (pair for batch in first for pair in batch):
            assert workload.prompt[0] <= len(pair["prompt_ids"]) <= workload.prompt[1]
            whole = tokenizer.apply_chat_template(pair["prompt"] + pair["chosen"], return_dict=True)["input_ids"]
            assert pair["prompt_ids"] + pair["chosen_ids"] == whole


def test_rows_that_are_not_there_are_said_to_be_missing(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="no rows for any workload"):
        workloads(tmp_path)
    with pytest.raises(UsageError, match="9999996 are wanted"):
        batches(workloads(DEMO)["short"], DEMO, tokenizer, 2499999)


def test_an_ideal_step_is_counted_by_hand() -> None:
    """One pair, 3 prompt tokens, answers of 2 and 1: 3 + 1 + 0 tokens are read, 3 are scored.

    Four blocks of 10 weights, 4 of them at the entry; two adapted, at 5 features, rank 2; head 7 × 11; 6 features of
    queries.
    Query-key pairs: 3·4/2 in the prompt, 3·1 + 1 for the first answer's read token: 10.
    """
    m = Matrices(blocks=4, adapted=2, block=10, entry=4, query=6, hidden=7, vocabulary=11, adapter=5)
    counted = step_flops([(3, 2, 1)], m, rank=2, activations_known=False)
    assert counted == {
        "forward": 4 * 2 * 4 * 10,
        "attention": (4 + 2 * 2) * 4 * 6 * 10,
        "backward": 2 * 4 * (2 * 10 - 4),
        "head": 4 * 3 * 7 * 11,
        "adapter": 2 * 6 * 4 * 2 * 5,
    }
    known = step_flops([(3, 2, 1)], m, rank=2, activations_known=True)
    assert known == counted | {"forward": 2 * 2 * 4 * 10, "attention": (2 + 2 * 2) * 4 * 6 * 10}


def test_first_steps_do_not_count() -> None:
    found = rounds.summary(
        [seen(9, 1, 2, reference=6, frozen_blocks=2), seen(9, 3, 4, reference=8, frozen_blocks=4)], warmup=1
    )
    assert found["step"] == {"wall": 2.5, "cpu": 5}
    assert found["reference"] == {"wall": 7, "cpu": 14} and found["frozen_blocks"] == {"wall": 3, "cpu": 6}
    assert rounds.summary([{"error": "gone"}, seen(9, 1, 1)], 1)["step"]["wall"] == 1
    assert rounds.summary([{"error": "gone"}], 1) == {"error": "gone"}


def test_ratios_are_to_the_best_rival_and_a_missing_one_is_left_out() -> None:
    measured = {
        "mlx_dpo": rounds.summary([seen(9, 1, 1, frozen_blocks=3, reference=2, memory=50)], 1),
        "soup": rounds.summary([seen(9, 4, 4, reference=10, memory=100)], 1),
        "mlx-lm-lora": rounds.summary([seen(9, 8, 8, memory=80)], 1),
        "mlx-lm-sft": rounds.summary([seen(9, 2, 2, memory=10)], 1),
        "trl": {"error": "no torch"},
    }
    found = ratios(measured, steps=3)
    assert found["a step with its share of the frozen blocks / best MLX peer"] == {
        "wall": (1 + 3 / 3) / 4,
        "cpu": 0.5,
    }
    assert found["a step by the clock / best MLX peer"] == {"wall": 0.25, "cpu": 0.25}
    assert found["a step with its share of the frozen blocks / mlx-lm's SFT step"] == {
        "wall": 1,
        "cpu": 1,
    }
    assert found["frozen blocks and reference pass / best MLX peer's reference pass"] == {"wall": 0.5, "cpu": 0.5}
    assert found["peak_mlx_mb / best MLX peer"] == {"memory": 50 / 80}
    assert not any("TRL" in name for name in found)


def test_a_length_that_may_not_fit_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "this_machine", lambda: Machine(20 * 2**30, 20 * 2**30, "20 GB"))
    point = {"sweep": "prompt", "prompt": 100, "peak_mlx_mb": 5 * 1024, "model_mb": 1024}
    assert bench.too_large([], 10**6) == {}
    assert bench.too_large([point], 200) == {}, "1 GB of weights, and 4 GB that grow to 16"
    assert bench.too_large([point], 300) == {"error": "not run: it may take 37 GB"}


def test_every_optimization_has_a_run_without_it() -> None:
    without = [name for name, contender in OURS.items() if len(contender.options["speed"]) == 1]
    assert without == [f"mlx_dpo without {optimization}" for optimization in OPTIMIZATIONS]
    for contender in (OURS | PEERS).values():
        assert (ROOT / "scripts" / "benchmarks" / "workers" / f"{contender.worker}.py").is_file()


def test_a_short_run_trains_and_fills_the_page(tiny_llama: Path, tmp_path: Path, tokenizer: Any) -> None:
    """mlx_dpo on a tiny model: a step a batch, loss ln 2 at the start, figures between the marks."""
    workload = workloads(DEMO)["short"]
    spec = {
        "model": str(tiny_llama), "batches": batches(workload, DEMO, tokenizer, 2), "batch": workload.batch,
        "max_length": workload.max_length, "keys": ["q_proj", "v_proj"], "top_layers": 2, "blocks": 4, "rank": 2,
        "scale": 2.0, "beta": 0.1, "learning_rate": 1e-4, "seed": 0, "warmup": 1, "checkpoint": False,
    }  # fmt: skip
    said: list[str] = []
    contender = {"mlx_dpo": OURS["mlx_dpo"]}
    found = rounds.measure(contender, spec, lambda _: sys.executable, rounds=1, logs=tmp_path / "logs", say=said.append)
    ours = found["mlx_dpo"]
    assert "error" not in ours, ours
    assert len(ours["passes"][0]["steps"]) == 2
    assert ours["first_loss"] == pytest.approx(0.6931, abs=1e-4)
    assert ours["warnings"] == [] and ours["reference"]["wall"] > 0 and ours["frozen_blocks"]["wall"] > 0

    limit = rounds.run_worker("limit", spec | {"options": {}}, sys.executable, tmp_path / "limit.log")["limit"]
    section = {"lengths": [(3, 2, 1)], "contenders": found, "ratios": ratios(found, 2), "limit": limit}
    machine = {
        "processor": "a chip", "cores": 2, "memory_gb": 8, "system": "Linux", "device": "cpu", "blas": "MLX's own",
        "python": "3", "versions": {"mlx": "0"},
    }  # fmt: skip
    results = {
        "machine": machine,
        "steps": {"short/top": section},
        "settings": {"short/top": spec | {"rounds": 1, "steps": 2}},
    }
    written = tmp_path / "page.md"
    written.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    page.write_page(written, json.loads(json.dumps(results)))
    text = written.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| mlx_dpo | " in text and "0.6931" in text and "counted limit" in text
