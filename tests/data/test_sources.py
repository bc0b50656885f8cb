"""Files, folders, standard input and the Hub give the same rows, and what cannot be read says why."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mlx_dpo.data.load import load_records, load_splits
from mlx_dpo.errors import DataError
from support.rows import ROWS

Write = Callable[..., Path]


def refusal(source: Path | str, kind: str | None = None) -> str:
    with pytest.raises(DataError) as caught:
        load_records(source, kind)
    return str(caught.value)


@pytest.mark.parametrize("name", ["data.jsonl", "data.ndjson", "data.json", "data.txt"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n  \n"])
def test_lines_are_rows_whatever_the_file_is_called_and_however_they_end(write: Write, name: str, ending: str) -> None:
    text = "".join(json.dumps(row) + ending for row in ROWS)
    assert [record.prompt for record in load_records(write(b"\xef\xbb\xbf" + text.encode(), name))] == [
        row["prompt"] for row in ROWS
    ]


def test_line_separators_inside_strings_end_no_line(write: Write) -> None:
    row = {"prompt": "p", "chosen": "one\u2028two\u2029three\x85four", "rejected": "r"}
    (record,) = load_records(write(json.dumps(row, ensure_ascii=False).encode()))
    assert record.completions[0] == row["chosen"]


@pytest.mark.parametrize(
    ("document", "name"),
    [
        (ROWS, "data.json"),
        (ROWS, "data.jsonl"),
        ({"data": ROWS}, "data.json"),
        ({"train": ROWS, "version": 1}, "data.json"),
    ],
)
def test_one_json_document_is_read_as_rows(write: Write, document: Any, name: str) -> None:
    path = write(json.dumps(document, indent=2).encode(), name)
    assert [record.prompt for record in load_records(path)] == [row["prompt"] for row in ROWS]


def test_a_json_document_may_hold_all_splits(write: Write) -> None:
    document = {"train": ROWS[:10], "validation": ROWS[10:14], "test": ROWS[14:]}
    path = write(json.dumps(document).encode(), "data.json")
    assert [len(split) for split in load_splits(path)] == [10, 4, 6]
    assert len(load_records(path, split="valid")) == 4


def test_packed_files_and_standard_input_are_read(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = write(ROWS).read_bytes()
    assert len(load_records(write(gzip.compress(raw), "data.jsonl.gz"))) == len(ROWS)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(raw)))
    assert len(load_records("-")) == len(ROWS)


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (b"", "data.jsonl", "is empty"),
        (b"\n \n", "data.jsonl", "is empty"),
        (b"[]", "data.json", "holds no rows"),
        (b'{"train": [], "valid": [{}]}', "data.json", "holds no rows for train"),
        (b'[\n{"prompt": "p"},\n]', "data.json", "line 3: broken JSON"),
        (b'{"prompt":\n "p"', "data.json", "line 2: broken JSON"),
        (b"[\n\xff]", "data.json", "line 2: not UTF-8"),
        (b"3", "data.json", "holds a number, not rows"),
        ("{}".encode("utf-16"), "data.jsonl", "is UTF-16"),
        (b"no gzip", "data.jsonl.gz", "cannot be read"),
    ],
)
def test_a_file_that_is_no_data_says_why(write: Write, content: bytes, name: str, words: str) -> None:
    message = refusal(write(content, name))
    assert words in message
    assert name in message


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    assert f"there is no file or folder {tmp_path / 'nothing.jsonl'}" in refusal(tmp_path / "nothing.jsonl")
    assert "there is no file or folder data/nothing.jsonl" in refusal("data/nothing.jsonl")
    assert "there: no data file" in refusal(tmp_path)


def test_a_folder_without_a_train_file_says_what_is_there(write: Write) -> None:
    folder = write(ROWS, "set/mine.jsonl").parent
    assert "there: mine.jsonl" in refusal(folder)
    write(ROWS, "set/test.jsonl")
    with pytest.raises(DataError, match=r"has no train split \(there: test\)"):
        load_splits(folder)


@pytest.mark.parametrize("valid", ["valid", "validation", "val", "dev", "eval", "heldout"])
def test_a_folder_gives_its_splits_as_they_are(write: Write, valid: str) -> None:
    write(ROWS[:10], "set/train.jsonl")
    write(ROWS[10:], "set/test.json")
    folder = write(ROWS[5:8], f"set/{valid}.jsonl").parent
    assert [len(split) for split in load_splits(folder, valid_fraction=0.5)] == [10, 3, 10]


def test_numbered_files_in_a_data_folder_are_one_split(write: Write) -> None:
    write(ROWS[:5], "set/data/train-00000-of-00002.jsonl")
    write(ROWS[5:9], "set/data/train-00001-of-00002.jsonl")
    folder = write(ROWS[9:], "set/data/test-00000-of-00001.jsonl").parents[1]
    train, valid, test = load_splits(folder, valid_fraction=0.2)
    assert [len(train), len(valid), len(test)] == [7, 2, 11]
    assert [record.prompt for record in load_records(folder)] == [row["prompt"] for row in ROWS[:9]]


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("absent")
def test_without_the_extra_its_name_is_in_the_error(write: Write) -> None:
    assert "pip install 'mlx-dpo[hub]'" in refusal("owner/name")
    assert "pip install 'mlx-dpo[hub]'" in refusal(write(b"PAR1", "data.parquet"))


def test_a_name_that_is_no_path_is_looked_up_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*arguments: Any) -> dict[str, list[Any]]:
        asked.append(arguments)
        if arguments[0] == "owner/nothing":
            raise FileNotFoundError("no such data set")
        return {
            "train_prefs": ROWS[:8],
            "train_sft": [{"text": "t"}],
            "test_prefs": ROWS[8:10],
            "validation": ROWS[10:],
        }

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert [len(split) for split in load_splits("owner/name:en")] == [8, 10, 2]
    assert asked == [("owner/name", "en")]
    assert "the Hub gave no data set: no such data set" in refusal("owner/nothing")


def test_parquet_rows_are_read_and_named_by_number(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = ModuleType("pyarrow.parquet")
    parquet.read_table = lambda path: SimpleNamespace(to_pylist=lambda: [ROWS[0], {"prompt": None}])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    assert "row 2: no known shape (keys: prompt)" in refusal(write(b"PAR1", "data.parquet"))
