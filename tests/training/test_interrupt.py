"""The first Ctrl-C is a request that is heard between steps, the second one acts at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from mlx_dpo.training.interrupt import deferred_interrupt


@pytest.fixture(autouse=True)
def python_hears_ctrl_c() -> Iterator[None]:
    """A shell may start this with SIGINT ignored, as it does what runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_nothing_is_broken_off(number: signal.Signals) -> None:
    with deferred_interrupt() as request:
        assert not request.is_set()
        signal.raise_signal(number)
        assert request.is_set()


def test_the_second_signal_acts_as_it_always_does() -> None:
    with pytest.raises(KeyboardInterrupt), deferred_interrupt() as request:
        signal.raise_signal(signal.SIGINT)
        assert request.is_set()
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_after_a_polite_end_acts_at_once_too() -> None:
    """A supervisor's SIGTERM, then an impatient user's SIGINT: of each kind the first is noted, the second acts."""
    with deferred_interrupt() as request:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert request.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("fail", [False, True])
def test_afterwards_the_handlers_are_what_they_were(fail: bool) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with deferred_interrupt():
            signal.raise_signal(signal.SIGINT)
            if fail:
                raise ValueError
    except ValueError:
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_in_another_thread_it_does_nothing_and_harms_nothing() -> None:
    """Python hands signals to the main thread only."""
    found: list[bool] = []

    def work() -> None:
        with deferred_interrupt() as request:
            found.append(request.is_set())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
