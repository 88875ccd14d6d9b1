"""Launchers as work to supervise: each a process of its own with a log.

A signal to the sweep reaches the sweep alone, which passes it on: every launcher then saves and leaves, as if it had
been asked itself. Launchers of a killed sweep are killed by the kernel, and end their ranks.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen

from hpc_cpd.cluster.preemption import STOP_SIGNALS, StopFlag
from hpc_cpd.cluster.supervisor import LAST_LINES, Outcome, end_in_words, tethered
from hpc_cpd.cluster.units import Unit, not_done
from hpc_cpd.errors import EXIT_DONE, EXIT_FAULT, EXIT_STOPPED
from hpc_cpd.progress import Reader

LOOK_EVERY_SECONDS = 1.0


@dataclass(eq=False)
class Launch:
    """A launcher to start. `argv`: the words after ``python``; `threads`: of each rank, None: the launcher decides.

    `units`: what it works on, whose progress is shown.
    """

    name: str
    argv: Sequence[str]
    log: Path
    threads: int | None = None
    units: Sequence[Unit] = ()

    def start(self) -> None:
        """Start its process."""
        self._began = time.monotonic()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if self.threads is not None:
            environment.setdefault("OMP_NUM_THREADS", str(self.threads))
        with open(self.log, "ab") as log:
            self._from = log.tell()
            command = tethered([sys.executable, *self.argv])
            self._process = Popen(
                command, env=environment, stdin=DEVNULL, stdout=log, stderr=STDOUT, start_new_session=True
            )
        self._lines = [f"begins; its log: {self.log}"]
        self._readers = {unit: Reader(unit.folder) for unit in not_done(self.units)}
        self._phases: dict[Unit, str] = {}
        self._looked_at = float("-inf")
        self._stopped = False

    def pass_on(self, stop: StopFlag) -> None:
        """The same signal: the first makes it save and leave, a second Ctrl-C kills its ranks."""
        self._stopped = True
        if self._process.poll() is None and stop.last is not None:
            self._process.send_signal(stop.last)

    def news(self) -> list[str]:
        """What each unit does, when that is something else than before, and how the launch began and ended."""
        lines, self._lines = self._lines, []
        return lines

    def poll(self) -> Outcome | None:
        code, now = self._process.poll(), time.monotonic()
        if code is not None or now - self._looked_at >= LOOK_EVERY_SECONDS:
            self._looked_at = now
            for unit, reader in self._readers.items():
                news = reader.read()
                if news is not None and news.phase != self._phases.get(unit):
                    self._phases[unit] = news.phase
                    self._lines.append(f"{unit.name}: {news.phase}")
        if code is None:
            return None
        outcome = self._outcome(code)
        word = {EXIT_DONE: "done", EXIT_STOPPED: "stopped, saved"}.get(outcome.code, "failed")
        self._lines.append(f"{word} after {now - self._began:.0f} s")
        return outcome

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _outcome(self, code: int) -> Outcome:
        if code == EXIT_DONE:
            return Outcome(self.name, code)
        if self._stopped and (code == EXIT_STOPPED or -code in STOP_SIGNALS):  # may come before it can catch any
            return Outcome(self.name, EXIT_STOPPED)
        with open(self.log, "rb") as file:
            file.seek(self._from)
            text = "\n" + file.read().decode(errors="replace").strip()
        _, found, sentence = text.rpartition("\nstopped: " if code == EXIT_STOPPED else "\nerror: ")
        if not found:
            shown = "\n".join(f"    {line}" for line in text.splitlines()[-LAST_LINES:])
            sentence = f"its launcher {end_in_words(code)}; its log {self.log} ends with\n{shown}"
        return Outcome(self.name, EXIT_FAULT if code < 0 else code, sentence)
