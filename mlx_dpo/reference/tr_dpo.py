"""TR-DPO: a reference that follows the policy (Gorbatovski et al., 2024, arXiv 2404.09656).

Every so many steps the reference becomes α · policy + (1 − α) · reference, in weights. Of adapters that is exact by
concatenation: α·B₁A₁ + (1 − α)·B₂A₂ is one product whose rank is the sum of both. What is known of the reference's
log-probs is then stale and forgotten; rows are scored anew when they are next asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from mlx_dpo.data.batching import make_batch
from mlx_dpo.data.tokenize import TokenizedRow
from mlx_dpo.errors import UsageError
from mlx_dpo.logprobs.scorer import Scorer
from mlx_dpo.models.lora import Adapter, parameters
from mlx_dpo.models.trees import read_arrays
from mlx_dpo.reference.store import RefLogps, score_batch

NEGLIGIBLE = 1e-6
"""Share of the reference below which an old policy's part of it is dropped, so that its rank stays bounded."""


class MovingReference(Sequence[list[np.ndarray]]):
    """Reference log-probs by row, like a stored `RefLogps`; `follow` moves it to the policy.

    Rows are scored one at a time: what a row gets does not depend on the batch that asked, so a resumed run sees the
    same numbers.
    """

    def __init__(
        self,
        scorer: Scorer,
        rows: Sequence[TokenizedRow],
        adapter: Adapter,
        start: RefLogps,
        alpha: float,
        *,
        from_base: bool,
    ) -> None:
        if adapter.fine_tune_type != "lora":
            raise UsageError("loss.ref_model_sync_steps: a reference that follows the policy needs LoRA, not DoRA")
        self._scorer, self._rows, self._alpha = scorer, rows, alpha
        self._known: list[list[np.ndarray] | None] = list(start)
        self._parts: list[tuple[float, dict[str, mx.array]]] = [] if from_base else [(1.0, self._copy())]
        self._moved = False

    def __len__(self) -> int:
        return len(self._known)

    def __getitem__(self, row: int) -> list[np.ndarray]:  # type: ignore[override]
        found = self._known[row]
        if found is None:
            with self._as_reference():
                found = score_batch(self._scorer, make_batch([self._rows[row]], [row]))[0]
            self._known[row] = found
        return found

    def follow(self) -> None:
        """Moves the reference: α of the policy as it is now, 1 − α of what the reference was."""
        older = [(weight * (1 - self._alpha), part) for weight, part in self._parts]
        self._parts = [(self._alpha, self._copy()), *(old for old in older if old[0] > NEGLIGIBLE)]
        self._known, self._moved = [None] * len(self._known), True

    def save(self, folder: Path) -> None:
        """Writes what it is made of beside a checkpoint; nothing before its first move."""
        if self._moved:
            arrays = {f"{i}/{name}": value for i, (_, part) in enumerate(self._parts) for name, value in part.items()}
            weights = {f"{i}/weight": mx.array(weight) for i, (weight, _) in enumerate(self._parts)}
            mx.save_safetensors(str(folder / "reference.safetensors"), arrays | weights)

    def restore(self, folder: Path) -> None:
        """Takes up what `save` wrote there."""
        file = folder / "reference.safetensors"
        if not file.is_file():
            return
        parts: dict[int, dict[str, mx.array]] = {}
        for name, value in read_arrays(file).items():
            index, _, rest = name.partition("/")
            parts.setdefault(int(index), {})[rest] = value
        self._parts = [(float(part.pop("weight")), part) for _, part in sorted(parts.items())]
        self._known, self._moved = [None] * len(self._known), True

    def _copy(self) -> dict[str, mx.array]:
        copied = {name: mx.array(value) for name, value in parameters(self._scorer.model).items()}
        mx.eval(copied)
        return copied

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        """The reference's adapter in place of the policy's, and no dropout."""
        model = self._scorer.model
        policy, training = parameters(model), model.training
        model.update(tree_unflatten([(name, self._mixed(name)) for name in policy]))
        model.eval()
        try:
            yield
        finally:
            model.update(tree_unflatten(list(policy.items())))
            model.train(training)

    def _mixed(self, name: str) -> mx.array:
        """The parts' factors side by side along the rank; the weights go into B."""
        is_a = name.endswith("lora_a")
        values = [part[name] if is_a else weight * part[name] for weight, part in self._parts]
        experts = values[0].ndim == 3  # A is [experts, rank, in] there and [in, rank] elsewhere
        return mx.concatenate(values, axis=(1 if is_a else 2) if experts else (1 if is_a else 0))
