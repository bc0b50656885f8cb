"""Files, folders, standard input and the Hub to rows: what stands where, and what could not be read."""

from __future__ import annotations

import gzip
import json
import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from mlx_dpo.data.formats import accepted_shapes
from mlx_dpo.errors import DataError

SPLITS = {
    "train": ("train", "train_prefs"),
    "valid": ("valid", "validation", "val", "dev", "eval", "heldout"),
    "test": ("test", "test_prefs"),
}
"""The three splits and the names that files, JSON keys and Hub splits give them."""

SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".json", ".json.gz", ".parquet")

_FILE_NAME = re.compile(r"(?P<name>.+?)(-\d+-of-\d+)?(\.jsonl|\.ndjson|\.json|\.parquet)(\.gz)?")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


class Row(NamedTuple):
    """One row as it was read: where it stands, its number there from 1, and its value or why it cannot be read.

    A row that cannot be read is kept with its error rather than raised, so that one error can name all of a file.
    """

    file: str
    place: str  # line 3, item 3, row 3
    number: int
    value: Any = None
    error: str = ""


def one_split(source: str | Path, rows: Mapping[str, list[Row]], split: str) -> list[Row]:
    """The rows of one split, out of those that `read_splits` gave for the source; a DataError where it has no such."""
    if split not in rows:
        raise DataError(
            f"{source} has no {split} split (there: {', '.join(rows) or 'none'})",
            f"Call it {' or '.join(SPLITS.get(split, (split,)))}: a file of that name with {', '.join(SUFFIXES)}, "
            "or a key of that name in a JSON file.",
        )
    return rows[split]


def read_splits(source: str | Path) -> dict[str, list[Row]]:
    """Rows by split (a name in `SPLITS`); a source without splits is all `train`.

    Call it once for a source: standard input is empty afterwards, and a Hub data set is large.

    Raises:
        DataError: there is no such source, it is empty, or nothing of it can be read.
    """
    path = Path(source)
    if str(source) == "-":
        rows = _json_rows(sys.stdin.buffer.read(), "standard input")
    elif path.is_dir():
        rows = _folder_rows(path)
    elif path.exists():
        rows = _file_rows(path)
    elif _HUB_NAME.fullmatch(str(source)) and not str(source).endswith(SUFFIXES):
        rows = _hub_rows(str(source))
    else:
        raise DataError(
            f"there is no file or folder {source}", f"Check the path; a relative one starts at {Path.cwd()}."
        )
    for name, there in rows.items():
        if not there:
            raise DataError(f"{source} holds no rows{'' if len(rows) == 1 else f' for {name}'}", accepted_shapes())
    return rows


def _split_of(name: str) -> str | None:
    return next((split for split, names in SPLITS.items() if name.lower() in names), None)


def _folder_rows(folder: Path) -> dict[str, list[Row]]:
    """The rows of the train, valid and test files in a folder, or in its folder `data` as clones from the Hub have it.

    A split may come in numbered files (`train-00000-of-00002.parquet`).
    """
    files = sorted(path for path in [*folder.iterdir(), *folder.glob("data/*")] if path.name.endswith(SUFFIXES))
    rows: dict[str, list[Row]] = {}
    for path in files:
        named = _FILE_NAME.fullmatch(path.name)
        split = _split_of(named["name"]) if named else None
        if split:
            rows.setdefault(split, []).extend(row for part in _file_rows(path).values() for row in part)
    if not rows:
        there = ", ".join(str(path.relative_to(folder)) for path in files) or "no data file"
        raise DataError(
            f"{folder} has neither a train file nor a valid or test one (there: {there})",
            f"Call one of them train, with {', '.join(SUFFIXES)}, or give the file itself instead of the folder.",
        )
    return rows


def _file_rows(path: Path) -> dict[str, list[Row]]:
    if path.name.endswith(".parquet"):
        return {"train": _parquet_rows(path)}
    try:
        raw = path.read_bytes()
        if path.name.endswith(".gz"):
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    return _json_rows(raw, str(path))


def _json_rows(raw: bytes, file: str) -> dict[str, list[Row]]:
    """The rows of JSON lines or of one JSON document, told apart by their beginning and by the file's name."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{file} is UTF-16", "Save it as UTF-8.")
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    if not raw.strip():
        raise DataError(f"{file} is empty", accepted_shapes())
    if raw.lstrip().startswith(b"[") or file.endswith((".json", ".json.gz")):
        return _document_rows(raw, file)
    return {"train": _line_rows(raw, file)}


def _line_rows(raw: bytes, file: str) -> list[Row]:
    """The rows of JSON lines. Lines end at LF alone: strings may hold other separators, U+2028 for one."""
    rows = []
    for number, line in enumerate(raw.split(b"\n"), 1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            rows.append(Row(file, place, number, json.loads(line.decode())))
        except UnicodeDecodeError as error:
            rows.append(Row(file, place, number, error=_not_utf8(error)))
        except json.JSONDecodeError as error:
            rows.append(Row(file, place, number, error=f"broken JSON: {error.msg} (column {error.colno})"))
    return rows


def _document_rows(raw: bytes, file: str) -> dict[str, list[Row]]:
    """The rows of one JSON document: a list, or an object with a list for each split or one under `data`.

    Many a `.json` file holds JSON lines; it is read as such.
    """
    try:
        document = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}, line {line}: {_not_utf8(error)}", "Save it as UTF-8.") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and raw.lstrip().startswith(b"{"):
            return {"train": _line_rows(raw, file)}
        raise DataError(f"{file}, line {error.lineno}: broken JSON: {error.msg} (column {error.colno})") from None
    if isinstance(document, dict):
        splits = {split: key for key in document if (split := _split_of(key)) and isinstance(document[key], list)}
        if splits:
            return {split: _items(document[key], f"{file}, {key}") for split, key in splits.items()}
        document = document["data"] if isinstance(document.get("data"), list) else [document]
    if isinstance(document, list):
        return {"train": _items(document, file)}
    raise DataError(f"{file} holds {json_type(document)}, not rows", accepted_shapes())


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte {error.start + 1} is 0x{error.object[error.start]:02x}"


def _items(items: Sequence[Any], file: str, word: str = "item") -> list[Row]:
    return [Row(file, f"{word} {number}", number, value) for number, value in enumerate(items, 1)]


def _parquet_rows(path: Path) -> list[Row]:
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError:
        raise DataError(f"{path} needs pyarrow", "pip install 'mlx-dpo[hub]'") from None
    try:
        return _items(parquet.read_table(path).to_pylist(), str(path), "row")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _hub_rows(name: str) -> dict[str, list[Row]]:
    """The rows of a Hub data set, `owner/name` or `owner/name:configuration`."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(
            f"there is no file or folder {name}",
            "Check the path; or, if it names a data set on the Hub: pip install 'mlx-dpo[hub]'",
        ) from None
    repository, _, configuration = name.partition(":")
    try:
        splits = load_dataset(repository, configuration or None)
    except (OSError, ValueError) as error:  # not found, no network, no such configuration
        raise DataError(f"there is no file or folder {name}, and the Hub gave no data set: {error}") from None
    return {
        split: _items(list(rows), f"{name}, {key}", "row") for key, rows in splits.items() if (split := _split_of(key))
    }


def json_type(value: Any) -> str:
    """What a JSON value is, in words for an error."""
    names = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "true or false"}
    return names.get(type(value), "null")
