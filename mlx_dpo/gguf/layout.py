"""The same numbers in another order or form: what MLX's tensors and ggml's differ by, tensor by tensor, both ways.

Rows and columns are moved by lists of indices, so that weights, packed weights, their scales and the two factors of an
adapter all move alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mlx_dpo.gguf.architectures import Architecture

GATED_ROWS = ("in_proj_z", "in_proj_a", "in_proj_b", "A_log", "dt_bias")
GATED_ROWS_OF_VALUES = ("in_proj_qkv", "conv1d")  # values stand behind queries and keys


def row_order(architecture: Architecture, setting: Callable[[str], Any], name: str, rows: int) -> np.ndarray | None:
    """Where each of ggml's rows of the tensor `name` stands in MLX's, int `[rows]`; None where they stand alike."""
    parts = name.split(".")
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    if architecture.interleaved_rope and parts[-2] in heads:
        return interleave_rope(np.arange(rows), setting(heads[parts[-2]]))
    if not _regrouped(setting, name):
        return None
    if set(parts[-2:]).intersection(GATED_ROWS):
        return _tiled(np.arange(rows), setting)
    if parts[-2] in GATED_ROWS_OF_VALUES:
        first = rows - setting("linear_num_value_heads") * setting("linear_value_head_dim")
        return np.concatenate([np.arange(first), _tiled(np.arange(first, rows), setting)])
    return None


def column_order(setting: Callable[[str], Any], name: str, columns: int) -> np.ndarray | None:
    """The same of columns: `columns` of them, or of groups of them."""
    if _regrouped(setting, name) and name.split(".")[-2] == "out_proj":
        return _tiled(np.arange(columns), setting)
    return None


def groups_stay_whole(setting: Callable[[str], Any], name: str, group: int) -> bool:
    """Whether quantized columns can be moved as they are, by groups of so many: else one would have to be cut."""
    return column_order(setting, name, 0) is None or setting("linear_value_head_dim") % group == 0


def _regrouped(setting: Callable[[str], Any], name: str) -> bool:
    """Whether a tensor has value heads of gated delta attention of which several share a key head."""
    return ".linear_attn." in name and setting("linear_num_value_heads") != setting("linear_num_key_heads")


def _tiled(indices: np.ndarray, setting: Callable[[str], Any]) -> np.ndarray:
    """Value heads: those of one key head together (MLX), or the first of each key head, then the second (ggml)."""
    keys, values = setting("linear_num_key_heads"), setting("linear_num_value_heads")
    return indices.reshape(keys, values // keys, -1).swapaxes(0, 1).reshape(-1)


def moved(values: np.ndarray, rows: np.ndarray | None, columns: np.ndarray | None = None) -> np.ndarray:
    """`values` `[rows, ...]` with rows and columns in another order."""
    if rows is not None:
        values = values[rows]
    return values if columns is None else values[..., columns]


def to_ggml_form(architecture: Architecture, name: str, values: np.ndarray) -> np.ndarray:
    """A tensor's numbers as ggml wants them: norms + 1, decay rates themselves, no axes of one."""
    if architecture.norm_offset and name.endswith("norm.weight"):
        return values + np.float32(1)
    if name.endswith(".A_log"):
        return -np.exp(values)
    return values.reshape(ggml_shape(name, values.shape))


def to_mlx_form(architecture: Architecture, name: str, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The reverse of `to_ggml_form`, in the `shape` of mlx-lm's model."""
    if architecture.norm_offset and name.endswith("norm.weight"):
        return values - np.float32(1)
    if name.endswith(".A_log"):
        return np.log(-values)
    return values.reshape(shape)


def ggml_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A tensor's shape in a file: convolutions `[channels, width]`, the gate of a shared expert `[columns]`."""
    if name.endswith(("conv1d.weight", "conv.conv.weight")):
        return shape[:-1]
    if name.endswith("shared_expert_gate.weight"):
        return shape[1:]
    return shape


def interleave_rope(rows: Any, heads: int) -> Any:
    """Rows `[heads · head_dim, ...]` of a query or key matrix from halves (Hugging Face) to neighbours (ggml)."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
