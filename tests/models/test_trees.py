"""Trees by dotted name, and files of a model's folder that cannot be read say so."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from mlx_dpo.errors import ModelError
from mlx_dpo.models.trees import flat, read_json, read_weights


def test_a_tree_is_flat_by_dotted_names() -> None:
    one = mx.ones(1)
    assert list(flat({"layers": [{"weight": one}, {"weight": one}]})) == ["layers.0.weight", "layers.1.weight"]


def test_a_file_that_is_missing_or_broken_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "broken.safetensors").write_bytes(b"cut")
    for name, read in (("json", read_json), ("safetensors", read_weights)):
        with pytest.raises(ModelError, match=rf"broken\.{name}") as broken:
            read(tmp_path / f"broken.{name}", "fetch it")
        assert broken.value.remedy == "fetch it"
        with pytest.raises(ModelError, match=rf"none\.{name} is missing"):
            read(tmp_path / f"none.{name}", "fetch it")
