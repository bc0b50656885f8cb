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


ORDERS = (
    "from mlx_dpo import train, evaluate",
    "from mlx_dpo import evaluate, train",
    "import mlx_dpo.train, mlx_dpo.evaluate; from mlx_dpo import train, evaluate",
    "from mlx_dpo.train import train as one; from mlx_dpo import train, evaluate; assert one is train",
)


@pytest.mark.parametrize("imports", ORDERS)
def test_train_and_evaluate_are_functions_whatever_was_imported_before(imports: str) -> None:
    code = f"{imports}; print(train.__name__, evaluate.__name__, type(train) is type(evaluate) is type(lambda: 0))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "train evaluate True\n"


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, mlx_dpo; print(sorted({'mlx', 'mlx_lm', 'numpy', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
