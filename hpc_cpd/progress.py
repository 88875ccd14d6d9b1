"""Progress of long work: at most one line every few seconds, so that a log file stays readable."""

from __future__ import annotations

import sys
import time


class Progress:
    """Prints ``name: text`` when `every_seconds` have passed, and always the last line.

    Lines that count a `step` also say how many there were a second since the line before: ``, 8.4 steps/s``. Only the
    log can tell, for metrics hold no times. The launcher shows these lines live on a terminal and writes them to the
    job's log.
    """

    def __init__(self, name: str, every_seconds: float = 30.0, enabled: bool = True) -> None:
        self.name = name
        self.every_seconds = every_seconds
        self.enabled = enabled
        self._last = float("-inf")
        self._step: int | None = None

    def update(self, text: str, last: bool = False, step: int | None = None) -> None:
        now = time.monotonic()
        if self.enabled and (last or now - self._last >= self.every_seconds):
            if step is not None and self._step is not None and step > self._step and now > self._last:
                rate = (step - self._step) / (now - self._last)
                text += f", {rate:.1f} steps/s" if rate >= 1 else f", {rate:.2g} steps/s"
            self._last, self._step = now, step
            print(f"{self.name}: {text}", file=sys.stdout, flush=True)
