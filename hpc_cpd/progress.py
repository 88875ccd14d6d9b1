"""How far a piece of work is: lines for a log, and a small file that others read."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

FILE = "progress.json"


class Progress:
    """Prints ``name: text`` when `every_seconds` have passed, and always the last line.

    With a `folder`, every line also replaces ``progress.json`` there, one object with the keys `phase`, `step`,
    `total`, `loss`, `steps_per_second` (each may be null) and `seconds`, the time since the epoch. It is news and no
    state: nobody waits for the disk, and a file that cannot be written is no error.
    """

    def __init__(
        self, name: str, every_seconds: float = 30.0, enabled: bool = True, folder: Path | None = None
    ) -> None:
        self.name = name
        self.every_seconds = every_seconds
        self.enabled = enabled
        self.folder = folder
        self._last = float("-inf")
        self._place: tuple[str | None, int] | None = None

    def update(
        self,
        text: str,
        last: bool = False,
        phase: str | None = None,
        step: int | None = None,
        total: int | None = None,
        loss: float | None = None,
    ) -> None:
        """Say `text`. `step` of `total` counts within `phase`, of which the steps per second are told as well."""
        now = time.monotonic()
        if not self.enabled or not (last or now - self._last >= self.every_seconds):
            return
        rate = None
        if step is not None:
            before = self._place
            if before is not None and before[0] == phase and step > before[1] and now > self._last:
                rate = (step - before[1]) / (now - self._last)
                text += f", {rate:.1f} steps/s" if rate >= 1 else f", {rate:.2g} steps/s"
            self._place = (phase, step)
        self._last = now
        print(f"{self.name}: {text}", file=sys.stdout, flush=True)
        if self.folder is not None:
            news = {"phase": phase if phase is not None else text, "step": step, "total": total, "loss": loss}
            self._write(self.folder, {**news, "steps_per_second": rate, "seconds": time.time()})

    @staticmethod
    def _write(folder: Path, news: dict[str, object]) -> None:
        temporary = folder / f".{FILE}.{os.getpid()}.tmp"
        with suppress(OSError):
            temporary.write_text(json.dumps(news) + "\n")
            os.replace(temporary, folder / FILE)
