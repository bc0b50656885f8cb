"""Ctrl-C as a request that is heard between steps, so that nothing is left half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Inside the `with`, the first SIGINT or SIGTERM sets the event; the second one acts at once, as it always does.

    Outside the main thread, where Python takes no signals, it is never set.
    """
    request = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous: dict[int, Any] = {}

    def on_signal(number: int, frame: FrameType | None) -> None:
        request.set()
        signal.signal(number, previous[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, on_signal)
    try:
        yield request
    finally:
        for code, handler in previous.items():
            signal.signal(code, handler)
