"""Direct Preference Optimization on MLX.

The public names are listed in __init__.pyi; each is loaded when it is first asked for, so that importing the package
costs nothing.

    from mlx_dpo import DataConfig, ModelConfig, RunConfig, TrainConfig, evaluate, train

    config = RunConfig(model=ModelConfig(path=…), data=DataConfig(path=…), train=TrainConfig(output="runs/a"))
    train(config)
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_LISTED = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
_HOME = {name: home for home, name in re.findall(r"^from (\S+) import (\w+) as \2$", _LISTED, re.MULTILINE)}

__all__ = ["__version__", *_HOME]


class _Package(ModuleType):
    """The package, in which `train` and `evaluate` are the functions even after their modules were loaded."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_HOME[name], __name__), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _HOME.get(name) == f".{name}":
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *_HOME]


sys.modules[__name__].__class__ = _Package
