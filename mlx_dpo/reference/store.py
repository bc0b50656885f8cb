"""log π_ref: computed once, kept on disk by content, shared between runs, epochs and sweeps."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dpo.data.batching import Batch, batches_by_length
from mlx_dpo.data.tokenize import TokenizedRow
from mlx_dpo.errors import RunError
from mlx_dpo.events import OnEvent, Warned, ignore
from mlx_dpo.files import cache_folder, written_whole
from mlx_dpo.logprobs.scorer import Scorer
from mlx_dpo.models.load import LoadedModel
from mlx_dpo.models.lora import parameters

READING = 2
"""How log-probs are read, as part of a function's name; to be raised where the same weights begin to give others (2: by
the kernels of a gradient, and gated-delta rules in chunks)."""

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
    whole.update(f"{loaded.form};{mx.default_device()};{READING};".encode())
    if with_adapter:
        modules: dict[str, Any] = dict(loaded.model.named_modules())
        for name, value in sorted(parameters(loaded.model).items()):
            scale = modules[name.rpartition(".")[0]].scale
            whole.update(f"{name}:{scale};".encode() + np.array(value.astype(mx.float32)).tobytes())
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
    known = _stored(file, list({key for row in keys for key in row}), on_event)
    with _open_store(file) as store:
        missing = [i for i, row in enumerate(keys) if any(key not in known for key in row)]
        work = "reference log-probs"
        for batch in batches_by_length(rows, batch_size, missing, work=work, on_event=on_event):
            fresh = zip(batch.index, score_batch(scorer, batch), strict=True)
            pairs = [pair for i, values in fresh for pair in zip(keys[i], values, strict=False)]
            # an answer that is known stays to the last bit, though its row is computed again for another one's sake
            pairs = [(key, value) for key, value in pairs if key not in known]
            known.update(pairs)
            store.executemany("INSERT OR IGNORE INTO logps VALUES (?, ?)", [(k, v.tobytes()) for k, v in pairs])
            store.commit()
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


def _stored(file: Path, keys: Sequence[bytes], on_event: OnEvent) -> dict[bytes, np.ndarray]:
    """What the store has of `keys`; a damaged one is removed, since all of it can be computed again."""
    found: dict[bytes, np.ndarray] = {}
    try:
        with _open_store(file) as store:
            for start in range(0, len(keys), 500):
                part = keys[start : start + 500]
                marks = ",".join("?" * len(part))
                for key, value in store.execute(f"SELECT key, value FROM logps WHERE key IN ({marks})", part):
                    found[key] = np.frombuffer(value, np.float32)
        return found
    except sqlite3.DatabaseError as error:
        on_event(Warned(f"the stored reference log-probs in {file} were damaged ({error}) and are computed again"))
        for damaged in (file, file.with_name(file.name + "-journal")):
            damaged.unlink(missing_ok=True)
        return {}


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
    with written_whole(memory) as beside:
        beside.write_text(digest.hexdigest())
    return digest.hexdigest()
