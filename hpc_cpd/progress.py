"""How far a piece of work is: lines for a log, and a small file that others read."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

NEWS_FILE = "progress.json"


def say(text: str) -> None:
    """Show a person one line."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # whoever read along has gone (head, a lost terminal): the work goes on unheard
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


@dataclass(frozen=True)
class News:
    """What ``progress.json`` holds. `step` of `total` counts within `phase`; `seconds`: since the epoch.

    `counted`: what a step is, in the plural: rounds of a teacher's algorithm, episodes that are recorded.
    """

    name: str
    text: str
    phase: str
    step: int | None = None
    total: int | None = None
    loss: float | None = None
    steps_per_second: float | None = None
    seconds: float = 0.0
    counted: str = "steps"

    @property
    def line(self) -> str:
        """The line of the log."""
        return f"{self.name}: {self.text}"

    @property
    def place(self) -> str:
        """``phase 2: 900/2000, loss 0.1``, or the phase alone, such as ``evaluating 10 tasks``."""
        of = "" if self.total is None else f"/{self.total}"
        step = "" if self.step is None else f": {self.step}{of}"
        return f"{self.phase}{step}" + ("" if self.loss is None else f", loss {self.loss:.3g}")


def latest_news(folder: Path) -> News | None:
    """The last news from `folder`; None where there are none, or none that can be read."""
    with suppress(OSError, ValueError, TypeError):
        return News(**json.loads((folder / NEWS_FILE).read_bytes()))
    return None


class Reader:
    """Tells each piece of news from `folder` once, and nothing of what was there before."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last = latest_news(folder)

    def read(self) -> News | None:
        """The newest, if it has not been told yet."""
        before, self._last = self._last, latest_news(self._folder) or self._last
        return None if self._last == before else self._last


@dataclass
class Progress:
    """Prints ``name: text`` when `every_seconds` have passed, and always the last line.

    With a `folder`, every line also replaces ``progress.json`` there (:class:`News`). It is news and no state: nobody
    waits for the disk, and a file that cannot be written is no error.
    """

    name: str
    every_seconds: float = 30.0
    enabled: bool = True
    folder: Path | None = None
    _last: float = field(default=float("-inf"), init=False)
    _place: tuple[str | None, int] | None = field(default=None, init=False)

    def update(
        self,
        text: str,
        last: bool = False,
        phase: str | None = None,
        step: int | None = None,
        total: int | None = None,
        loss: float | None = None,
        counted: str = "steps",
    ) -> None:
        """Say `text`. `step` of `total` counts within `phase`, whose speed is told as well: `counted` per second."""
        now = time.monotonic()
        if not self.enabled or not (last or now - self._last >= self.every_seconds):
            return
        rate = None
        if step is not None:
            before = self._place
            if before is not None and before[0] == phase and step > before[1] and now > self._last:
                rate = (step - before[1]) / (now - self._last)
                text += f", {rate:{'.1f' if rate >= 1 else '.2g'}} {counted}/s"
            self._place = (phase, step)
        self._last = now
        news = News(self.name, text, phase or text, step, total, loss, rate, time.time(), counted)
        print(news.line, flush=True)
        if self.folder is not None:
            with suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                temporary = self.folder / f".{NEWS_FILE}.{os.getpid()}.tmp"
                temporary.write_text(json.dumps(asdict(news)) + "\n")
                os.replace(temporary, self.folder / NEWS_FILE)
