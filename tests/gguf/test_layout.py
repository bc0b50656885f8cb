"""Rows and columns go where ggml looks for them, and come back; test_llamacpp.py does so with whole models."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("gguf", reason="GGUF files need the gguf package")

from mlx_dpo.gguf.architectures import ARCHITECTURES
from mlx_dpo.gguf.layout import (
    column_order,
    groups_stay_whole,
    interleave_rope,
    row_order,
    to_ggml_form,
    to_mlx_form,
)

QWEN = ARCHITECTURES["qwen3_5"]
# two key heads, each with three value heads of two: one row of queries and one of keys for each key head's dimension
HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_value_head_dim": 2}
TILED = [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]  # the first value head of each key head, then the second, the third


def test_rows_of_a_head_alternate_between_its_halves_in_ggml() -> None:
    rows = np.arange(8)[:, None]  # two heads of four: halves 0 1 | 2 3 and 4 5 | 6 7
    assert interleave_rope(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_value_heads_of_gated_delta_attention_are_tiled_over_the_key_heads() -> None:
    at = "model.layers.0.linear_attn."
    order = row_order(QWEN, HEADS.get, at + "in_proj_z.weight", 12)
    assert order is not None
    assert order.tolist() == TILED
    behind = row_order(QWEN, HEADS.get, at + "in_proj_qkv.weight", 20)  # eight rows of queries and keys stay
    assert behind is not None
    assert behind.tolist() == [*range(8), *(8 + i for i in TILED)]
    rates = row_order(QWEN, HEADS.get, at + "A_log", 6)
    assert rates is not None
    assert rates.tolist() == [0, 3, 1, 4, 2, 5]
    columns = column_order(HEADS.get, at + "out_proj.weight", 12)
    assert columns is not None
    assert columns.tolist() == TILED


def test_nothing_else_moves() -> None:
    assert row_order(QWEN, HEADS.get, "model.layers.0.self_attn.q_proj.weight", 12) is None
    assert row_order(QWEN, HEADS.get, "model.layers.0.linear_attn.out_proj.weight", 12) is None
    assert column_order(HEADS.get, "model.layers.0.self_attn.o_proj.weight", 12) is None
    alike = HEADS | {"linear_num_key_heads": 6}
    assert row_order(QWEN, alike.get, "model.layers.0.linear_attn.in_proj_z.weight", 12) is None


def test_groups_of_columns_move_where_none_has_to_be_cut() -> None:
    name = "model.layers.0.linear_attn.out_proj.weight"
    heads = HEADS | {"linear_value_head_dim": 96}
    assert groups_stay_whole(heads.get, name, 32)
    assert not groups_stay_whole(heads.get, name, 64)
    assert groups_stay_whole(heads.get, "model.layers.0.mlp.down_proj.weight", 64)


@pytest.mark.parametrize(
    ("model_type", "name", "shape", "theirs"),
    [
        ("gemma", "model.norm.weight", (4,), (4,)),
        ("qwen3_5", "model.layers.0.linear_attn.A_log", (4,), (4,)),
        ("qwen3_5", "model.layers.0.linear_attn.conv1d.weight", (8, 4, 1), (8, 4)),
        ("qwen3_5_moe", "model.layers.0.mlp.shared_expert_gate.weight", (1, 8), (8,)),
        ("lfm2", "model.layers.0.conv.conv.weight", (8, 3, 1), (8, 3)),
        ("llama", "model.layers.0.mlp.up_proj.weight", (8, 4), (8, 4)),
    ],
)
def test_a_form_of_its_own_and_back(
    model_type: str, name: str, shape: tuple[int, ...], theirs: tuple[int, ...]
) -> None:
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = to_ggml_form(ARCHITECTURES[model_type], name, values)
    assert found.shape == theirs
    back = to_mlx_form(ARCHITECTURES[model_type], name, found, shape)
    np.testing.assert_allclose(back, values, atol=1e-6)


def test_norms_of_gemma_and_decay_rates_are_other_numbers() -> None:
    one = np.ones(1, np.float32)
    assert to_ggml_form(ARCHITECTURES["gemma"], "model.norm.weight", one).item() == 2.0
    assert to_ggml_form(QWEN, "model.layers.0.linear_attn.A_log", one).item() == pytest.approx(-np.e)
