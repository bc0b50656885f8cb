"""What macOS and MLX are told before MLX is loaded: patience with long computations, whole float32, no sleep."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

WATCHDOG = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"
"""Read by the GPU's driver: at 1 it lets a computation keep the display waiting for longer before it ends it."""

TF32 = "MLX_ENABLE_TF32"
"""Read by MLX at the first float32 product and never again: at 0 an M5 or an NVIDIA GPU keeps all 24 bits of float32
there, of which it drops 13 by default. Products of 16-bit arrays, which most runs are made of, are the same with it."""


def set_environment(environ: MutableMapping[str, str] = os.environ, platform: str = sys.platform) -> None:
    """Sets both, where the user has not; the driver's only on macOS. Of use before MLX is first imported."""
    environ.setdefault(TF32, "0")  # what is computed in float32 is so for its precision, and checked to 1e-3
    if platform == "darwin":
        environ.setdefault(WATCHDOG, "1")


@contextmanager
def kept_awake(wanted: bool, platform: str = sys.platform) -> Iterator[None]:
    """macOS does not go to sleep inside the `with`, though its display may; nothing elsewhere."""
    if not wanted or platform != "darwin":
        yield
        return
    with subprocess.Popen(["/usr/bin/caffeinate", "-i", "-w", str(os.getpid())]) as caffeinate:
        try:
            yield
        finally:
            caffeinate.terminate()


def told(awake: bool, environ: MutableMapping[str, str] = os.environ, platform: str = sys.platform) -> str:
    """In a few words, what of it is so; empty but on macOS."""
    if platform != "darwin":
        return ""
    said = [
        ("display may wait for the GPU", environ.get(WATCHDOG) == "1"),
        ("TF32 off", environ.get(TF32) == "0"),
        ("kept awake (caffeinate)", awake),
    ]
    return ", ".join(words for words, so in said if so)
