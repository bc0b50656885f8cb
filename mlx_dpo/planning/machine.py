"""How much memory this machine has, or a Mac of a given size, and how much of it MLX is told to use."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from mlx_dpo.errors import UsageError

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux says what a container may use."""

PROCESS_BYTES = 500_000_000
"""Bytes of the Python process beside MLX's arrays: interpreter, libraries, tokenizer (350 to 450 MB measured)."""

CPU_CACHE = 32 * 2**20
"""Bytes of freed memory that MLX keeps on a CPU (mlx/backend/no_gpu/allocator.cpp)."""


class Machine(NamedTuple):
    """`total` bytes of memory, of which MLX's arrays may take `usable`; `name` for people."""

    total: int
    usable: int
    name: str

    def fits(self, arrays: int, cache: int) -> bool:
        """Whether there is room for MLX's arrays and for the activation cache, which lies outside MLX."""
        return arrays <= self.usable and arrays + cache + PROCESS_BYTES <= self.total

    def room(self, arrays: int, cache: int) -> int:
        """Bytes that are left beside both."""
        return max(0, min(self.usable - arrays, self.total - arrays - cache - PROCESS_BYTES))


def this_machine() -> Machine:
    """What this machine has; on Apple silicon arrays may take what macOS recommends for the GPU."""
    info = mx.device_info()
    total = int(info.get("memory_size") or info.get("total_memory") or _physical())
    if mx.default_device() == mx.cpu:
        total = min([total, *_container_limits()])
    usable = int(info.get("max_recommended_working_set_size") or total - PROCESS_BYTES)
    return Machine(total, usable, "this machine")


def apple_machine(memory: str) -> Machine:
    """A Mac with so much memory (`16GB`), of which arrays may take at least two thirds, above 32 GB three quarters.

    Raises:
        UsageError: `memory` is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", memory.strip(), re.IGNORECASE)
    if not found:
        raise UsageError(f"--memory {memory}: this is no size", "write it like 16GB")
    total = int(float(found[1]) * UNITS[found[2].upper()])
    return Machine(total, int(total * (2 / 3 if total <= 32 * UNITS["G"] else 3 / 4)), f"a Mac with {memory}")


def in_gb(size: float) -> str:
    """Bytes for people: `1.2 GB`, `34 MB`."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def limit_memory(limit: int, cache: int) -> None:
    """Tells MLX to wait for results beyond `limit` bytes, and on a GPU to keep at most `cache` bytes of freed memory.

    On Metal what may stay resident is raised to what macOS recommends. (On a CPU MLX keeps `CPU_CACHE`; more gained
    nothing there.)
    """
    from mlx_lm.utils import maybe_set_recommended_wired_limit

    maybe_set_recommended_wired_limit()
    mx.set_memory_limit(limit)
    if mx.default_device() == mx.gpu:
        mx.set_cache_limit(cache)


@contextmanager
def own_limits() -> Iterator[None]:
    """Puts back, at the end, what `limit_memory` told MLX."""
    cache, memory, wired = mx.set_cache_limit(0), mx.get_memory_limit(), mx.set_wired_limit(0)
    mx.set_cache_limit(cache)
    mx.set_wired_limit(wired)
    try:
        yield
    finally:
        mx.set_cache_limit(cache)
        mx.set_memory_limit(memory)
        mx.set_wired_limit(wired)


def _physical() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _container_limits() -> Iterator[int]:
    for file in CGROUPS:
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            yield int(text)
