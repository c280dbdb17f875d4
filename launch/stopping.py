"""Being asked to stop: by Ctrl-C, or by a scheduler some time before it takes the machine away."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
INTERRUPTED = 128 + signal.SIGINT
SAME_INTERRUPT = 1.0  # seconds: a launcher hands on the Ctrl-C that the terminal has sent to its ranks as well


class StopRequest:
    """Notes SIGTERM, SIGUSR1 and SIGINT while it is entered, for the training loop to look at between steps.

    A second SIGINT ends the process at once, with exit code 130.

    Attributes:
        signal: the number of the last one that came; 0 before.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._interrupted_at: float | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted_at is not None and now - self._interrupted_at > SAME_INTERRUPT:
                os.write(2, b"\nerror: interrupted again: ended without a checkpoint of this step\n")
                os._exit(INTERRUPTED)
            if self._interrupted_at is None:
                os.write(2, b"\ninterrupted: finishing the step and saving; Ctrl-C again ends at once\n")
                self._interrupted_at = now
