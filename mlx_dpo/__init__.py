"""Direct Preference Optimization on MLX.

The public names are listed in __init__.pyi; each is loaded when it is first asked for, so that importing the package
costs nothing.

    from mlx_dpo import DataConfig, ModelConfig, RunConfig, TrainConfig, evaluate, train

    config = RunConfig(model=ModelConfig(path=…), data=DataConfig(path=…), train=TrainConfig(output="runs/a"))
    train(config)
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_LISTED = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
_HOME = {name: home for home, name in re.findall(r"^from (\S+) import (\w+) as \2$", _LISTED, re.MULTILINE)}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name], __name__), name)
    globals()[name] = value  # the next time it is found without asking here
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
