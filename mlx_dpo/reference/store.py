"""log π_ref: computed once, kept on disk by content, shared between runs, epochs and sweeps."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dpo.data.batching import Batch, by_length, make_batch
from mlx_dpo.data.tokenize import TokenizedRow
from mlx_dpo.errors import RunError
from mlx_dpo.events import OnEvent, Progressed, Warned, ignore
from mlx_dpo.files import cache_folder
from mlx_dpo.logprobs.scorer import Scorer
from mlx_dpo.models.load import LoadedModel
from mlx_dpo.models.lora import parameters

RefLogps = Sequence[list[np.ndarray]]
"""For each row, for each answer: log π_ref of every completion token, float32."""


def model_digest(loaded: LoadedModel, *, with_adapter: bool) -> str:
    """A name for the function that `loaded` computes: weights, configuration, form, device, and its adapter if asked.

    Files are hashed by content. A digest is remembered by path, size and time of change, so a large model is read once.
    """
    whole = hashlib.blake2b(digest_size=20)
    files = sorted([*loaded.path.glob("model*.safetensors"), loaded.path / "config.json", *loaded.path.glob("*.py")])
    for file in files:
        whole.update(f"{file.name}:{_file_digest(file)};".encode())
    whole.update(f"{loaded.form};{mx.default_device()};".encode())
    if with_adapter:
        for name, value in sorted(parameters(loaded.model).items()):
            module: Any = loaded.model
            for part in name.split(".")[:-1]:
                module = module[int(part)] if part.isdigit() else module[part]
            whole.update(f"{name}:{module.scale};".encode() + np.array(value.astype(mx.float32)).tobytes())
    return whole.hexdigest()


def store_file(digest: str) -> Path:
    """Where log-probs of the function with this digest are kept."""
    return cache_folder() / "reference" / f"{digest}.sqlite"


def compute_reference(
    scorer: Scorer,
    rows: Sequence[TokenizedRow],
    digest: str,
    *,
    batch_size: int,
    row_indices: Sequence[int] | None = None,
    on_event: OnEvent = ignore,
) -> RefLogps:
    """Reference log-probs of `rows`, from the store or else computed and stored, batch by batch.

    With `row_indices` only of those rows; the others stay empty.

    The caller has put the model in the reference's state (adapter off, or the starting adapter) and in evaluation mode.
    An interruption loses at most one batch.
    """
    wanted = range(len(rows)) if row_indices is None else row_indices
    keys: list[list[bytes]] = [[] for _ in rows]
    for i in wanted:
        keys[i] = [_sequence_key(rows[i].context(k), ids) for k, ids in enumerate(rows[i].completions)]
    file = store_file(digest)
    known = _stored(file, {key for row in keys for key in row}, on_event)
    with _open_store(file) as store:
        missing = by_length(rows, (i for i, row in enumerate(keys) if any(key not in known for key in row)))
        for start in range(0, len(missing), batch_size):
            on_event(Progressed("reference log-probs", start, len(missing), "rows"))
            part = missing[start : start + batch_size]
            batch = make_batch([rows[i] for i in part], part)
            fresh = score_batch(scorer, batch)
            pairs = [(keys[i][k], fresh[r][k]) for r, i in enumerate(part) for k in range(len(keys[i]))]
            # an answer that is known stays to the last bit, though its row is computed again for another one's sake
            pairs = [(key, value) for key, value in pairs if key not in known]
            known.update(pairs)
            store.executemany("INSERT OR IGNORE INTO logps VALUES (?, ?)", [(k, v.tobytes()) for k, v in pairs])
            store.commit()
        on_event(Progressed("reference log-probs", len(missing), len(missing), "rows"))
    return [[known[key] for key in row] for row in keys]


def score_batch(scorer: Scorer, batch: Batch) -> RefLogps:
    """Token log-probs of a batch as arrays on the host, one a completion."""
    values = np.array(scorer(batch, gradient=False).logps)
    return [
        [values[r, k, : batch.completion_length[r, k]].copy() for k in range(values.shape[1])]
        for r in range(values.shape[0])
    ]


def batch_ref_logps(ref_logps: RefLogps, batch: Batch) -> mx.array:
    """The rows of a batch, padded like it: `[R, K, C]` float32."""
    padded = np.zeros(batch.mask.shape, np.float32)
    for r, row in enumerate(batch.index):
        for k, values in enumerate(ref_logps[row]):
            padded[r, k, : len(values)] = values
    return mx.array(padded)


@contextmanager
def _open_store(file: Path) -> Iterator[sqlite3.Connection]:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(file, timeout=60)) as store:
            store.execute("CREATE TABLE IF NOT EXISTS logps (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID")
            yield store
    except (sqlite3.OperationalError, PermissionError) as error:
        raise RunError(
            f"reference log-probs cannot be kept in {file}: {error}",
            "make room there, or name another folder by the environment variable MLX_DPO_CACHE",
        ) from error


def _stored(file: Path, keys: Iterable[bytes], on_event: OnEvent) -> dict[bytes, np.ndarray]:
    """What the store has of `keys`; a damaged one is removed, since all of it can be computed again."""
    try:
        with _open_store(file) as store:
            return _fetch(store, keys)
    except sqlite3.DatabaseError as error:
        on_event(Warned(f"the stored reference log-probs in {file} were damaged ({error}) and are computed again"))
        for damaged in (file, file.with_name(file.name + "-journal")):
            damaged.unlink(missing_ok=True)
        return {}


def _fetch(store: sqlite3.Connection, keys: Iterable[bytes]) -> dict[bytes, np.ndarray]:
    found: dict[bytes, np.ndarray] = {}
    wanted = list(keys)
    for start in range(0, len(wanted), 500):
        part = wanted[start : start + 500]
        marks = ",".join("?" * len(part))
        for key, value in store.execute(f"SELECT key, value FROM logps WHERE key IN ({marks})", part):
            found[key] = np.frombuffer(value, np.float32)
    return found


def _sequence_key(context: Sequence[int], completion: Sequence[int]) -> bytes:
    ids = np.array([len(context), *context, *completion], np.int32)
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


def _file_digest(file: Path) -> str:
    real = file.resolve()
    facts = real.stat()
    name = hashlib.blake2b(f"{real}:{facts.st_size}:{facts.st_mtime_ns}".encode(), digest_size=16).hexdigest()
    memory = cache_folder() / "digests" / name
    if memory.is_file() and len(known := memory.read_text()) == 40:
        return known
    with real.open("rb") as stream:
        digest = hashlib.blake2b(digest_size=20)
        while block := stream.read(1 << 22):
            digest.update(block)
    memory.parent.mkdir(parents=True, exist_ok=True)
    beside = memory.with_suffix(f".{os.getpid()}")
    beside.write_text(digest.hexdigest())
    beside.replace(memory)
    return digest.hexdigest()
