"""Prompts are answered while a run goes on, as mlx-lm answers them, and the run does not notice."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_dpo.config import DataConfig, LoraConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from mlx_dpo.data.records import Demonstration, PreferencePair
from mlx_dpo.data.tokenize import TokenizedRow
from mlx_dpo.events import Event, Sampled, Started, Stepped
from mlx_dpo.training import samples
from mlx_dpo.training.loop import train
from mlx_dpo.training.samples import choose_samples
from support.adapters import write_pairs
from support.tiny_models import tiny_model_folder

WORDS = ("hello", "short", "clear", "question", "answer", "thank you", "well", "again", "now", "then")


def say(word: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Say {word}."}]


ROWS: list[dict[str, Any]] = [
    {
        "prompt": say(word),
        "chosen": [{"role": "assistant", "content": word}],
        "rejected": [{"role": "assistant", "content": f"I would say {word}, with many more words."}],
    }
    for word in WORDS
]


@pytest.fixture
def settings(tiny_llama: Path, tmp_path: Path) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=str(tiny_llama)),
        data=DataConfig(path=str(write_pairs(tmp_path / "pairs.jsonl", ROWS)), valid_fraction=0.4),
        lora=LoraConfig(num_layers=2, rank=4, dropout=0.2),
        optim=OptimConfig(learning_rate=1e-2),
        train=TrainConfig(output=str(tmp_path / "run"), batch_size=2, iters=5, steps_per_eval=2, save_every=2),
    )


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "LONGEST_ANSWER", 12)


def change(settings: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    return replace(settings, **{name: replace(getattr(settings, name), **values) for name, values in sections.items()})


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").split("\n") if line]


def assert_same_bits(a: Path, b: Path) -> None:
    ours, theirs = mx.load(str(a)), mx.load(str(b))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not mx.array_equal(ours[name], theirs[name])] == []


def mlx_lm_says(model: str, adapter: Path | None, prompt: list[dict[str, str]], tokens: int) -> str:
    import mlx_lm

    loaded, tokenizer = mlx_lm.load(model, adapter_path=str(adapter) if adapter else None)
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    return mlx_lm.generate(loaded, tokenizer, ids, max_tokens=tokens)


@pytest.mark.parametrize("arch", ["llama", "qwen3_5", "qwen3_moe"])
def test_at_each_evaluation_the_answers_are_mlx_lms(
    arch: str, settings: RunConfig, short: None, tmp_path: Path
) -> None:
    """A hybrid too, whose blocks compute in chunks while the run lasts, and whose state is cached between tokens."""
    model = str(tiny_model_folder(tmp_path / "model", arch))
    said: list[Event] = []
    config = change(settings, model={"path": model}, optim={"learning_rate": 0.1})
    train(config, on_event=said.append)
    lines = written(tmp_path / "run")
    assert [line["step"] for line in lines] == [2] * 3 + [4] * 3 + [5] * 3
    assert len({line["prompt"] for line in lines}) == 3
    for line in lines[3:]:
        step = tmp_path / f"run/checkpoints/step-{line['step']:07d}"
        prompt = [{"role": "user", "content": line["prompt"]}]
        assert line["base"] == mlx_lm_says(model, None, prompt, 12)
        assert line["tuned"] == mlx_lm_says(model, step, prompt, 12)
    assert any(line["base"] != line["tuned"] for line in lines)
    events = [event for event in said if isinstance(event, Sampled)]
    assert [(event.step, event.last, event.held_out) for event in events] == [
        (2, False, True), (4, False, True), (5, True, True),
    ]  # fmt: skip
    assert [sample._asdict() | {"step": event.step} for event in events for sample in event.samples] == [
        {name: line[name] for name in ("prompt", "base", "tuned", "step")} for line in lines
    ]


def test_a_run_learns_the_same_with_and_without_answers(settings: RunConfig, short: None, tmp_path: Path) -> None:
    """Dropout draws random numbers: one more or less drawn in between, and the adapters differ."""
    train(settings)
    train(change(settings, train={"eval_samples": 0, "output": str(tmp_path / "without")}))
    assert not (tmp_path / "without/samples.jsonl").exists()
    for file in ("adapters", "optimizer", "random"):
        name = f"checkpoints/step-0000005/{file}.safetensors"
        assert_same_bits(tmp_path / "run" / name, tmp_path / "without" / name)


def break_off(step: int) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == step:
            raise SystemExit

    return listen


def test_a_resumed_run_writes_the_answers_of_a_straight_one(settings: RunConfig, short: None, tmp_path: Path) -> None:
    train(settings)
    pieces = change(settings, train={"output": str(tmp_path / "pieces")})
    with contextlib.suppress(SystemExit):
        train(pieces, on_event=break_off(5))  # after the checkpoint of step 4 and its answers
    train(pieces, resume=True)
    assert written(tmp_path / "pieces") == written(tmp_path / "run")
    assert_same_bits(tmp_path / "run/adapters.safetensors", tmp_path / "pieces/adapters.safetensors")


def test_blocks_that_left_memory_are_read_for_the_answers_and_leave_it_again(
    settings: RunConfig, short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model_folder(tmp_path / "model", num_hidden_layers=12, hidden_size=128, intermediate_size=1024)
    config = change(settings, model={"path": str(model)}, train={"steps_per_eval": 1, "iters": 4})
    blocks = 10 * 4 * (3 * 128 * 1024 + 2 * 128 * 64 + 2 * 128 * 32)  # bytes of ten frozen ones, without their norms
    held: list[int] = []

    def listen(event: Event) -> None:
        if isinstance(event, Started | Sampled):
            mx.clear_cache()
            held.append(mx.get_active_memory())

    train(config, on_event=listen)
    assert len(held) == 5
    assert max(held) - held[0] < 0.1 * blocks, "as much memory as before the first step, optimizer aside"

    def no_unloading(*_: object) -> None: ...

    monkeypatch.setattr(samples, "unload_blocks", no_unloading)
    held.clear()
    train(change(config, train={"output": str(tmp_path / "again")}), on_event=listen)
    assert max(held) - held[0] > 0.9 * blocks, "or the test could not fail"


def test_where_nothing_is_held_out_training_prompts_are_answered_and_it_is_said(
    settings: RunConfig, short: None, tmp_path: Path
) -> None:
    said: list[Event] = []
    train(change(settings, data={"valid_fraction": 0.0}, train={"eval_samples": 2}), on_event=said.append)
    (started,) = [event for event in said if isinstance(event, Started)]
    assert started.facts["samples"] == "2 training prompts (nothing is held out) answered at each evaluation"
    assert {event.held_out for event in said if isinstance(event, Sampled)} == {False}
    assert {line["prompt"] for line in written(tmp_path / "run")} == {"Say hello.", "Say short."}


def row(name: str, prompt: list[int]) -> TokenizedRow:
    return TokenizedRow(name, prompt, ([5],), (0,), (1.0,))


def test_the_prompts_are_unlike_ones_held_out_in_their_own_words() -> None:
    chat = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who wrote Emma?"})
    asked = [("a", "one"), ("b", "two"), ("c", "two"), ("d", chat), ("e", "")]
    records = [PreferencePair(id=name, prompt=prompt, chosen="x", rejected="y") for name, prompt in asked]  # type: ignore[arg-type]
    rows = [row(name, [] if name == "e" else [1, 2]) for name, _ in asked]
    assert choose_samples(records, rows, 1, 9) == {1: "two", 3: "Who wrote Emma?"}
    assert choose_samples(records, rows, 1, 1) == {1: "two"}
    assert choose_samples(records, rows, 5, 2) == {0: "one", 1: "two"}, "none held out"
    assert choose_samples(records, rows, 1, 0) == {}


def test_plain_text_has_no_prompt_to_answer() -> None:
    records = [Demonstration(id="a", prompt="", completion="text")]
    assert choose_samples(records, [row("a", [])], 1, 3) == {}
