"""Writing that is never seen half done, and the folder for what can be computed again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PART = ".part"
"""How the name ends of what is being written; what is left of it after a kill can go."""


def cache_folder() -> Path:
    """Where what can be computed again is kept: `MLX_DPO_CACHE`, or `~/.cache/mlx_dpo`."""
    return Path(os.environ.get("MLX_DPO_CACHE") or "~/.cache/mlx_dpo").expanduser()


@contextmanager
def written_whole(target: Path, *, folder: bool = False) -> Iterator[Path]:
    """A path to write a file or a folder to; it becomes `target` by a rename once the `with` ends well.

    With `folder` an empty folder is there to write into; else the caller makes file or folder. On an error nothing of
    it is left, and `target` is as it was.
    """
    beside = target.with_name(f".{target.name}.{os.getpid()}{PART}")
    target.parent.mkdir(parents=True, exist_ok=True)
    if folder:
        beside.mkdir()
    try:
        yield beside
        # on the disk before the rename, and the rename after it: else a power cut may leave a name without its content
        for written in [beside, *beside.rglob("*")]:
            _sync(written)
        if target.is_dir():
            remove(target)  # a folder cannot be renamed over one that holds something
        beside.replace(target)
        _sync(target.parent)
    finally:
        remove(beside)


def remove(path: Path) -> None:
    """Removes a file or a whole folder, or nothing where there is none."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Sees to it that a file or a folder's list of names is on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
