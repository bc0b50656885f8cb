"""The frozen blocks once: what the blocks below the first adapted one give for a row never changes during a run.

Their output is computed before the first step and kept within a stated budget of memory, or else of disk. From then on
a step begins at the first adapted block. Exact: the same numbers, read instead of computed. It works where a prompt's
states do not depend on the answer behind it, which causal blocks see to.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dpo.data.batching import Batch
from mlx_dpo.data.tokenize import TokenizedRow
from mlx_dpo.logprobs.buckets import Bucket
from mlx_dpo.models.trees import flat

BITS = {2: mx.uint16, 4: mx.uint32}
"""How half and single precision are kept on the host, whose numpy has no bfloat16."""


def first_adapted(model: nn.Module) -> int:
    """The index of the lowest block with a trainable parameter: as many frozen ones lie below it."""
    blocks = list(model.layers)
    return next((i for i, block in enumerate(blocks) if flat(block.trainable_parameters())), len(blocks))


def cached_tokens(row: TokenizedRow) -> int:
    """Tokens of a row whose states are kept: the prompt once, and each answer without its last token."""
    return len(row.prompt) + sum(len(ids) - 1 for ids in row.completions)


class ActivationCache:
    """Hidden states at the first adapted block, for the rows of a data set (of those at `row_indices`).

    They are kept in `memory` bytes where they fit, else in a temporary file of `disk` bytes, else not at all. A batch's
    `index` names its rows.
    """

    def __init__(
        self, rows: Sequence[TokenizedRow], memory: float, disk: float, row_indices: Sequence[int] | None = None
    ) -> None:
        self._rows = rows
        self._budget = (memory, disk)
        self._missing = np.zeros(len(rows), bool)
        self._missing[range(len(rows)) if row_indices is None else row_indices] = True
        self._known = np.zeros(len(rows), bool)
        tokens = [cached_tokens(row) if wanted else 0 for row, wanted in zip(rows, self._missing, strict=True)]
        self._start = np.concatenate([[0], np.cumsum(tokens)])
        self._states: np.ndarray | None = None  # [tokens, hidden], bits of the model's dtype
        self._dtype = mx.float32
        self.nbytes = 0  # of all that is kept, or that there was no room for
        self.no_room = False

    def knows(self, batch: Batch) -> bool:
        """Whether the states of all of a batch's rows are there."""
        return bool(self._known[batch.index].all())

    def wants(self, batch: Batch) -> bool:
        """Whether a batch has rows that are to be kept and are not known yet."""
        return not self.no_room and bool(self._missing[batch.index].any())

    def get(self, batch: Batch, buckets: Sequence[Bucket]) -> list[mx.array]:
        """The states of a batch as it is read in `buckets`, one array for each, padded with zeros."""
        assert self._states is not None
        arrays = []
        for bucket in buckets:
            array = np.zeros((*bucket.tokens.shape, self._states.shape[1]), self._states.dtype)
            for line, spans in enumerate(bucket.spans):
                for column, row, offset, count in spans:
                    at = self._start[batch.index[row]] + offset
                    array[line, column : column + count] = self._states[at : at + count]
            arrays.append(mx.array(array).view(self._dtype))
        return arrays

    def put(self, batch: Batch, buckets: Sequence[Bucket], arrays: Sequence[mx.array]) -> None:
        """Keeps the states that `arrays` hold; nothing where the budget has no room for all rows."""
        if self._states is None and not self.no_room:
            self._allocate(arrays[0])
        if self._states is None:
            return
        for bucket, states in zip(buckets, arrays, strict=True):
            host = np.array(states.view(BITS[states.dtype.size]))
            for line, spans in enumerate(bucket.spans):
                for column, row, offset, count in spans:
                    # a row that is known keeps its first bits, in whatever batch it comes again
                    if self._missing[batch.index[row]]:
                        at = self._start[batch.index[row]] + offset
                        self._states[at : at + count] = host[line, column : column + count]
        self._known[batch.index] |= self._missing[batch.index]
        self._missing[batch.index] = False

    def _allocate(self, sample: mx.array) -> None:
        """All or nothing: a batch begins at the first adapted block only if all its rows are known."""
        memory, disk = self._budget
        hidden, size = sample.shape[-1], sample.dtype.size
        shape, bits = (int(self._start[-1]), hidden), np.uint16 if size == 2 else np.uint32
        self._dtype, self.nbytes = sample.dtype, shape[0] * hidden * size
        if self.nbytes <= memory:
            self._states = np.empty(shape, bits)
        elif self.nbytes <= disk:
            with tempfile.TemporaryFile(prefix="mlx_dpo-activations-") as file:  # the map outlives it
                self._states = np.memmap(file, bits, "w+", shape=shape)
        else:
            self.no_room = True
