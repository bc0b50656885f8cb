"""Reference log-probs are computed once: kept by content, found by the next run, never taken for another model's."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_dpo.config import LoraConfig, ModelConfig
from mlx_dpo.data.batching import Batch, make_batch
from mlx_dpo.data.tokenize import TokenizedRow
from mlx_dpo.errors import RunError
from mlx_dpo.events import Progressed, Warned
from mlx_dpo.files import cache_folder
from mlx_dpo.logprobs.scorer import Scorer, plain_logps
from mlx_dpo.models import lora
from mlx_dpo.models.load import LoadedModel, load
from mlx_dpo.reference.store import RefLogps, batch_ref_logps, compute_reference, model_digest
from mlx_dpo.types import TokenLogps
from support.adapters import write_adapter
from support.tiny_models import tiny_model_folder


class Counting:
    """A scorer that counts its batches, and fails at the one it is told to."""

    def __init__(self, loaded: LoadedModel, fail_at: int = 0) -> None:
        self.scorer = Scorer(loaded.model)
        self.fail_at = fail_at
        self.batches: list[Batch] = []

    def __call__(self, batch: Batch, stats: tuple[str, ...] = (), *, gradient: bool = False) -> TokenLogps:
        self.batches.append(batch)
        if len(self.batches) == self.fail_at:
            raise KeyboardInterrupt
        return self.scorer(batch, stats, gradient=gradient)

    @property
    def rows(self) -> list[int]:
        return sorted(int(i) for batch in self.batches for i in batch.index)


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> LoadedModel:
    return load(ModelConfig(path=str(tiny_llama)))


def some_rows(count: int = 10, answers: int = 2, seed: int = 0) -> list[TokenizedRow]:
    random = np.random.default_rng(seed)

    def ids(low: int) -> list[int]:
        return [int(token) for token in random.integers(3, 300, random.integers(low, 9))]

    return [
        TokenizedRow(str(i), ids(1), tuple(ids(1) for _ in range(answers)), (0,) * answers, (1.0, 2.0, 3.0)[:answers])
        for i in range(count)
    ]


def assert_equal(a: RefLogps, b: RefLogps) -> None:
    assert [[values.tolist() for values in row] for row in a] == [[values.tolist() for values in row] for row in b]


# what is computed


def test_every_row_has_its_own_log_probs_in_its_own_place(loaded: LoadedModel) -> None:
    rows = some_rows()
    found = compute_reference(Scorer(loaded.model), rows, "digest", batch_size=3)
    assert len(found) == len(rows)
    for row, values in zip(rows, found, strict=True):
        expected = np.array(plain_logps(loaded.model, make_batch([row], [0])).logps)[0]
        for k, ids in enumerate(row.completions):
            assert values[k].shape == (len(ids),)
            np.testing.assert_allclose(values[k], expected[k, : len(ids)], atol=2e-5)


def test_rows_with_different_numbers_of_answers_go_together(loaded: LoadedModel) -> None:
    rows = [*some_rows(4, answers=3), *some_rows(3, answers=2), *some_rows(2, answers=1)]
    found = compute_reference(Scorer(loaded.model), rows, "digest", batch_size=4)
    assert [len(row) for row in found] == [3] * 4 + [2] * 3 + [1] * 2
    alone = np.array(plain_logps(loaded.model, make_batch(rows[:1], [0])).logps)
    np.testing.assert_allclose(found[0][2], alone[0, 2, : len(found[0][2])], atol=2e-5)


def test_the_same_answer_after_a_cut_prompt_is_another_sequence(loaded: LoadedModel) -> None:
    whole = TokenizedRow("", [5, 9, 40, 41], ([7, 8], [9, 2]), (0, 0), (1.0, 2.0))
    cut = whole._replace(starts=(2, 0))
    score = Counting(loaded)
    first = compute_reference(score, [whole], "digest", batch_size=1)
    second = compute_reference(score, [cut], "digest", batch_size=1)
    assert len(score.batches) == 2
    assert np.abs(first[0][0] - second[0][0]).max() > 1e-3
    assert first[0][1].tolist() == second[0][1].tolist(), "what is known stays as it is, to the last bit"
    third = compute_reference(score, [whole], "digest", batch_size=1)
    assert len(score.batches) == 2
    assert_equal(third, first)


def test_a_batch_gets_its_rows_padded_with_zeros() -> None:
    known = [[np.array([-1.0, -2.0], np.float32), np.array([-3.0], np.float32)], [np.array([-4.0], np.float32)] * 2]
    rows = [
        TokenizedRow("", [5], ([6, 7], [8]), (0, 0), (1.0, 2.0)),
        TokenizedRow("", [5], ([6], [8]), (0, 0), (1.0, 2.0)),
    ]
    batch = make_batch([rows[1], rows[0]], [1, 0])
    assert batch_ref_logps(known, batch).tolist() == [[[-4, 0], [-4, 0]], [[-1, -2], [-3, 0]]]


# what is not computed again


def test_a_second_run_computes_nothing_and_has_the_same_bits(loaded: LoadedModel) -> None:
    rows = some_rows()
    first = compute_reference(Counting(loaded), rows, "digest", batch_size=4)
    again = Counting(loaded)
    assert_equal(compute_reference(again, rows, "digest", batch_size=3), first)
    assert again.batches == []


def test_only_new_rows_are_computed(loaded: LoadedModel) -> None:
    rows = some_rows()
    compute_reference(Counting(loaded), rows[2:6], "digest", batch_size=4)
    score = Counting(loaded)
    compute_reference(score, rows, "digest", batch_size=4)
    assert score.rows == [0, 1, 6, 7, 8, 9]


def test_an_interruption_loses_at_most_one_batch(loaded: LoadedModel) -> None:
    rows = some_rows(12)
    with pytest.raises(KeyboardInterrupt):
        compute_reference(Counting(loaded, fail_at=3), rows, "digest", batch_size=3)
    score = Counting(loaded)
    found = compute_reference(score, rows, "digest", batch_size=3)
    assert len(score.rows) == 6, "two batches of three were kept"
    assert_equal(found, compute_reference(Counting(loaded), rows, "digest", batch_size=3))


def test_only_the_rows_that_are_wanted_are_computed(loaded: LoadedModel) -> None:
    score = Counting(loaded)
    found = compute_reference(score, some_rows(6), "digest", batch_size=2, row_indices=[4, 1])
    assert score.rows == [1, 4]
    assert [len(row) for row in found] == [0, 2, 0, 0, 2, 0]


def test_progress_counts_the_rows_that_are_missing(loaded: LoadedModel) -> None:
    said: list[Any] = []
    rows = some_rows(5)
    compute_reference(Scorer(loaded.model), rows[:1], "digest", batch_size=2)
    compute_reference(Scorer(loaded.model), rows, "digest", batch_size=2, on_event=said.append)
    assert [(event.done, event.total) for event in said if isinstance(event, Progressed)] == [(0, 4), (2, 4), (4, 4)]


def test_another_function_has_another_store(loaded: LoadedModel) -> None:
    rows = some_rows(2)
    compute_reference(Counting(loaded), rows, "one", batch_size=2)
    score = Counting(loaded)
    compute_reference(score, rows, "another", batch_size=2)
    assert score.rows == [0, 1]


# a damaged store


def store_file() -> Path:
    (file,) = (cache_folder() / "reference").glob("*.sqlite")
    return file


@pytest.mark.parametrize("damage", ["not a store at all", "pages of noise", "cut short"])
def test_a_damaged_store_is_said_and_made_again(damage: str, loaded: LoadedModel) -> None:
    rows = some_rows(60)
    first = compute_reference(Counting(loaded), rows, "digest", batch_size=20)
    whole = store_file().read_bytes()
    assert len(whole) > 3 * 4096
    broken = {
        "not a store at all": b"no database" * 1000,
        "pages of noise": whole[:4096] + b"\xa5" * (len(whole) - 4096),
        "cut short": whole[:6000],
    }
    store_file().write_bytes(broken[damage])
    said: list[Any] = []
    score = Counting(loaded)
    assert_equal(compute_reference(score, rows, "digest", batch_size=20, on_event=said.append), first)
    assert score.rows == list(range(60))
    (warning,) = [event.text for event in said if isinstance(event, Warned)]
    assert str(store_file()) in warning
    again = Counting(loaded)
    compute_reference(again, rows, "digest", batch_size=20)
    assert again.batches == []


def test_a_store_that_cannot_be_written_names_the_folder_and_the_way_out(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "cache/reference").mkdir(parents=True)
    (tmp_path / "cache/reference/digest.sqlite").mkdir()  # a folder where the file should be
    with pytest.raises(RunError, match="cannot be kept") as caught:
        compute_reference(Scorer(loaded.model), some_rows(1), "digest", batch_size=1)
    assert "MLX_DPO_CACHE" in caught.value.remedy


# the name of a function


def test_the_same_weights_elsewhere_are_the_same(loaded: LoadedModel, tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "copy")
    copy = load(ModelConfig(path=str(tmp_path / "copy")))
    assert model_digest(copy, with_adapter=False) == model_digest(loaded, with_adapter=False)


def test_other_weights_settings_or_forms_are_other_functions(tiny_llama: Path, tmp_path: Path) -> None:
    other_weights = tiny_model_folder(tmp_path / "weights", seed=1)
    other_settings = tmp_path / "settings"
    shutil.copytree(tiny_llama, other_settings)
    settings = json.loads((other_settings / "config.json").read_text()) | {"rope_theta": 5000.0}
    (other_settings / "config.json").write_text(json.dumps(settings))
    digests = {
        model_digest(load(ModelConfig(path=str(folder), **more)), with_adapter=False)
        for folder, more in (
            (tiny_llama, {"compute_dtype": "float32"}),
            (other_weights, {"compute_dtype": "float32"}),
            (other_settings, {"compute_dtype": "float32"}),
            (tiny_llama, {"compute_dtype": "bfloat16"}),
            (tiny_llama, {"compute_dtype": "float32", "quantize_bits": 4}),
        )
    }
    assert len(digests) == 5


def test_a_folder_written_anew_has_a_new_name(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    before = model_digest(load(ModelConfig(path=str(folder))), with_adapter=False)
    tiny_model_folder(tmp_path, seed=1)
    facts = (folder / "model.safetensors").stat()
    os.utime(folder / "model.safetensors", ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    assert model_digest(load(ModelConfig(path=str(folder))), with_adapter=False) != before


def test_a_broken_memory_of_digests_is_read_as_none(loaded: LoadedModel) -> None:
    before = model_digest(loaded, with_adapter=False)
    remembered = list((cache_folder() / "digests").iterdir())
    assert len(remembered) == 2, "weights and settings"
    for file in remembered:
        file.write_text("")
    assert model_digest(loaded, with_adapter=False) == before


def test_the_starting_adapter_is_a_part_of_the_name_where_it_is_the_reference(tiny_llama: Path) -> None:
    model = load(ModelConfig(path=str(tiny_llama)))
    bare = model_digest(model, with_adapter=False)
    lora.attach(model.model, LoraConfig(num_layers=2), seed=0)
    assert model_digest(model, with_adapter=False) == bare
    first = model_digest(model, with_adapter=True)
    name, value = next((n, v) for n, v in lora.parameters(model.model).items() if n.endswith("lora_b"))
    model.model.load_weights([(name, value + mx.array(1e-3))], strict=False)
    second = model_digest(model, with_adapter=True)
    assert len({bare, first, second}) == 3


def test_two_scales_of_one_adapter_are_two_functions(tiny_llama: Path, tmp_path: Path) -> None:
    digests = set()
    for scale in (1.0, 2.0):
        model = load(ModelConfig(path=str(tiny_llama)))
        lora.load(model.model, write_adapter(tiny_llama, tmp_path / str(scale), scale=scale))
        digests.add(model_digest(model, with_adapter=True))
    assert len(digests) == 2
