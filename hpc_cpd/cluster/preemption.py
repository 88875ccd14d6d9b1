"""What asks a job to stop: signals, which set a flag and nothing else; a file; the time limit coming near.

The training loops agree on the flag over all ranks at a step boundary, save together and raise
StopRequested. A handler that did more would interrupt a collective or a half-written file.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
Stop = Callable[[], bool]


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


@dataclass
class Watch:
    """Calling it tells whether this rank was asked to stop: by a signal, by the run's file STOP, or by the clock.

    The clock: a job that nears its time limit. The scheduler is asked how long is left, again just before the end, for
    an administrator may have moved it. Files and clock are looked at once a second; one rank that does is enough.
    `seconds_left`: asks the scheduler; None: no limit. `lead_seconds`: how long before the limit to stop.
    """

    flag: StopFlag
    stop_file: Path
    seconds_left: Callable[[], float | None]
    lead_seconds: float

    def __post_init__(self) -> None:
        self._asked, self._looked_at, self._end = False, float("-inf"), self._ask()

    def __call__(self) -> bool:
        now = time.monotonic()
        self._asked = self._asked or self.flag()
        if not self._asked and now - self._looked_at >= 1.0:
            self._looked_at = now
            if now >= self._end - self.lead_seconds:
                self._end = self._ask()
            self._asked = self.stop_file.exists() or now >= self._end - self.lead_seconds
        return self._asked

    def _ask(self) -> float:
        left = self.seconds_left()
        return float("inf") if left is None else time.monotonic() + left


def die_with_parent(parent: int | None = None) -> None:
    """Let the kernel kill this process when its parent ends, so that nothing outlives a killed launcher.

    With `parent`, leave at once when that process is gone already. Linux only; elsewhere nothing happens.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def hold_lifeline(address: str) -> None:
    """Hold a connection until this process ends: see `hpc_cpd.cluster.ranks.Lifelines`, whose `address` this is."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(b"\0" + address.encode())
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        high = 1000 if limit == resource.RLIM_INFINITY else min(1000, limit - 1)  # above the descriptors in use
        fcntl.fcntl(line, fcntl.F_DUPFD_CLOEXEC, high)
