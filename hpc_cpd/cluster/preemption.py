"""What asks a job to stop: signals, which set a flag and nothing else; a file; the time limit coming near.

The training loops agree on the flag over all ranks at a step boundary, save together and raise
StopRequested. A handler that did more would interrupt a collective or a half-written file.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_PR_SET_PDEATHSIG = 1


class StopFlag:
    """Calling it tells whether a stop was asked for; `count` tells how often, `last` by which signal."""

    def __init__(self) -> None:
        self.count = 0
        self.last: int | None = None

    def install(self) -> StopFlag:
        """Catch SIGTERM, SIGUSR1, SIGUSR2 and SIGINT (main thread only)."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.last = number

    def __call__(self) -> bool:
        return self.count > 0

    def wait(self, seconds: float) -> None:
        """Return at the next signal, or when the time is over."""
        heard, end = self.count, time.monotonic() + seconds
        while self.count == heard and time.monotonic() < end:
            time.sleep(0.1)


class Watch:
    """Calling it tells whether this rank was asked to stop: by a signal, by the run's file STOP, or by the clock.

    The clock: a job that nears its time limit. The scheduler is asked how long is left, again just before the end, for
    an administrator may have moved it. Files and clock are looked at once a second; one rank that does is enough.
    """

    LOOK_EVERY_SECONDS = 1.0

    def __init__(
        self,
        flag: StopFlag,
        stop_file: Path,
        seconds_left: Callable[[], float | None] = lambda: None,
        lead_seconds: float = 0.0,
    ) -> None:
        """`seconds_left`: asks the scheduler; None: no limit. `lead_seconds`: how long before the limit to stop."""
        self.flag = flag
        self.why = ""
        self._file = stop_file
        self._seconds_left = seconds_left
        self._lead = lead_seconds
        self._looked_at = float("-inf")
        self._end = self._ask()

    def __call__(self) -> bool:
        if self.flag():
            self.why = self.why or "a signal"
        now = time.monotonic()
        if not self.why and now - self._looked_at >= self.LOOK_EVERY_SECONDS:
            self._looked_at = now
            if self._file.exists():
                self.why = f"the file {self._file}"
            elif now >= self._end - self._lead:
                self._end = self._ask()
                if now >= self._end - self._lead:
                    self.why = "the job's time limit"
        return bool(self.why)

    def _ask(self) -> float:
        left = self._seconds_left()
        return float("inf") if left is None else time.monotonic() + left


def die_with_parent(parent: int | None = None) -> None:
    """Let the kernel kill this process when its parent ends, so that nothing outlives a killed launcher.

    With `parent`, leave at once when that process is gone already. Linux only; elsewhere nothing happens.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(1)
