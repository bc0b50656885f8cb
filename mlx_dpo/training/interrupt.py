"""Ctrl-C as a request that is heard between steps, so that nothing is left half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class StopRequest:
    """Whether somebody has asked to stop."""

    def __init__(self) -> None:
        self.stop = False


@contextmanager
def deferred_interrupt() -> Iterator[StopRequest]:
    """Inside the `with`, the first SIGINT or SIGTERM sets `stop`; the second one acts at once, as it always does.

    Outside the main thread, where Python takes no signals, the request is never made.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous: dict[int, Any] = {}

    def on_signal(number: int, frame: FrameType | None) -> None:
        request.stop = True
        signal.signal(number, previous[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, on_signal)
    try:
        yield request
    finally:
        for code, handler in previous.items():
            signal.signal(code, handler)
