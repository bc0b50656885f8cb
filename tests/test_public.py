"""The names that a script imports from the package: all there, none loaded before it is asked for."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

import mlx_dpo


@pytest.mark.parametrize("name", mlx_dpo.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert not isinstance(getattr(mlx_dpo, name), ModuleType)
    assert name in dir(mlx_dpo)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        mlx_dpo.trian  # type: ignore[attr-defined]  # noqa: B018


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, mlx_dpo; print(sorted({'mlx', 'mlx_lm', 'numpy', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
