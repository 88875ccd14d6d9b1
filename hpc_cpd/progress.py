"""How far a piece of work is: lines for a log, and a small file that others read."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "progress.json"


@dataclass(frozen=True)
class News:
    """What ``progress.json`` holds. `step` of `total` counts within `phase`; `seconds`: since the epoch."""

    name: str
    text: str
    phase: str
    step: int | None
    total: int | None
    loss: float | None
    steps_per_second: float | None
    seconds: float

    @property
    def line(self) -> str:
        """The line of the log."""
        return f"{self.name}: {self.text}"


def latest_news(folder: Path) -> News | None:
    """The last news from `folder`; None where there are none, or none that can be read."""
    with suppress(OSError, ValueError, TypeError):
        return News(**json.loads((folder / FILE).read_bytes()))
    return None


class Reader:
    """Tells each piece of news from `folder` once, and nothing of what was there before. None: there is no folder."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._last = None if folder is None else latest_news(folder)

    def read(self) -> News | None:
        """The newest, if it has not been told yet."""
        news = None if self._folder is None else latest_news(self._folder)
        if news is None or news == self._last:
            return None
        self._last = news
        return news


class Progress:
    """Prints ``name: text`` when `every_seconds` have passed, and always the last line.

    With a `folder`, every line also replaces ``progress.json`` there (:class:`News`). It is news and no state: nobody
    waits for the disk, and a file that cannot be written is no error.
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
            self._write(self.folder, News(self.name, text, phase or text, step, total, loss, rate, time.time()))

    @staticmethod
    def _write(folder: Path, news: News) -> None:
        temporary = folder / f".{FILE}.{os.getpid()}.tmp"
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(asdict(news)) + "\n")
            os.replace(temporary, folder / FILE)
