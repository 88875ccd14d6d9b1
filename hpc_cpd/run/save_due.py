"""When a checkpoint is due: by the clock, or because somebody touched the run's file SAVE."""

from __future__ import annotations

import time

from hpc_cpd.run.paths import Run


class SaveDue:
    """When to save: every so many seconds, and when somebody touches the run's file SAVE, looked at every second."""

    def __init__(self, run: Run, every_seconds: float) -> None:
        self.every_seconds = every_seconds
        self._file = run.save_file
        self._looked_at = time.monotonic()
        self.saved()

    def __call__(self) -> bool:
        now = time.monotonic()
        if now - self._saved_at < self.every_seconds and now - self._looked_at < 1.0:
            return False
        self._looked_at = now
        return now - self._saved_at >= self.every_seconds or self._touch() != self._touched

    def saved(self) -> None:
        """Begin to count anew."""
        self._touched = self._touch()
        self._saved_at = time.monotonic()

    def _touch(self) -> int | None:
        try:
            return self._file.stat().st_mtime_ns
        except OSError:
            return None
