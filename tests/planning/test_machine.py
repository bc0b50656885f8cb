"""The memory of a machine: of a Mac by its size, of a container, and what MLX is told of it and asked to forget."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from mlx_dpo.errors import UsageError
from mlx_dpo.planning import machine
from mlx_dpo.planning.machine import PROCESS_BYTES, Machine, apple_machine, in_gb, limit_memory, own_limits

GB = 2**30


@pytest.mark.parametrize(
    ("memory", "total", "usable"),
    [("16GB", 16, 16 * 2 / 3), ("32 GiB", 32, 32 * 2 / 3), ("64g", 64, 48), ("0.5T", 512, 384)],
)
def test_on_a_mac_arrays_may_take_two_thirds_or_from_above_32_gb_three_quarters(
    memory: str, total: float, usable: float
) -> None:
    found = apple_machine(memory)
    assert (found.total, found.usable) == (total * GB, int(usable * GB))


@pytest.mark.parametrize("memory", ["", "much", "16 apples", "-1GB"])
def test_what_is_no_size_is_refused(memory: str) -> None:
    with pytest.raises(UsageError, match="no size"):
        apple_machine(memory)


def test_arrays_need_room_among_arrays_and_everything_together_in_the_machine() -> None:
    here = Machine(total=10 * PROCESS_BYTES, usable=8 * PROCESS_BYTES, name="here")
    assert here.fits(8 * PROCESS_BYTES, PROCESS_BYTES)
    assert not here.fits(8 * PROCESS_BYTES + 1, 0), "more arrays than MLX may have"
    assert not here.fits(8 * PROCESS_BYTES, PROCESS_BYTES + 1), "no room for the process itself"


def test_mlx_may_keep_freed_memory_only_where_there_is_room() -> None:
    here = Machine(total=10 * PROCESS_BYTES, usable=8 * PROCESS_BYTES, name="here")
    assert here.room(3 * PROCESS_BYTES, 0) == 5 * PROCESS_BYTES
    assert here.room(3 * PROCESS_BYTES, 2 * PROCESS_BYTES) == 4 * PROCESS_BYTES, "the activation cache is beside it"
    assert here.room(9 * PROCESS_BYTES, 0) == 0


def test_in_a_container_its_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if mx.default_device() != mx.cpu:
        pytest.skip("a GPU has memory of its own")
    limit, unlimited = tmp_path / "limit", tmp_path / "unlimited"
    limit.write_text(f"{GB}\n")
    unlimited.write_text("max\n")
    monkeypatch.setattr(machine, "CGROUPS", (unlimited, tmp_path / "none", limit))
    assert machine.this_machine().total == GB
    monkeypatch.setattr(machine, "CGROUPS", (unlimited,))
    assert machine.this_machine().total > GB


def test_what_mlx_was_told_for_a_run_is_forgotten_after_it() -> None:
    before = mx.get_memory_limit()
    with own_limits():
        limit_memory(3 * GB, GB)
        assert mx.get_memory_limit() == 3 * GB
    assert mx.get_memory_limit() == before


def test_bytes_for_people() -> None:
    assert [in_gb(size) for size in (0, 34_400_000, 999_000_000, 1_249_000_000)] == [
        "0 MB",
        "34 MB",
        "999 MB",
        "1.2 GB",
    ]
