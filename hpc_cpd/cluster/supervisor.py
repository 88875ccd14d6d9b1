"""Several pieces of work side by side on this machine, each with processes of its own that end with ours."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from hpc_cpd.cluster.preemption import StopFlag
from hpc_cpd.errors import EXIT_USER_ERROR

LAST_LINES = 15

# The kernel's promise to kill a command with its parent must be asked for before the command replaces this process.
_TETHER = (
    "import os, sys; from hpc_cpd.cluster.preemption import die_with_parent; "
    "die_with_parent(int(sys.argv[1])); os.execvp(sys.argv[2], sys.argv[2:])"
)


@dataclass(frozen=True)
class Outcome:
    """How a piece of work ended: an exit code of the public interface, and one sentence if it was not done."""

    name: str
    code: int
    sentence: str = ""


class Work(Protocol):
    """Work that supervise() starts, once, and looks after."""

    name: str

    def start(self) -> None:
        """Start its processes."""

    def pass_on(self, stop: StopFlag) -> None:
        """A signal came: see `stop.count` and `stop.last`."""

    def poll(self) -> Outcome | None:
        """The outcome, once all of its processes have ended."""

    def news(self) -> list[str]:
        """Lines worth showing since the last call."""

    def kill(self) -> None:
        """End all of its processes now."""


Show = Callable[[str, str], None]
"""(name of the work, one line)"""


def supervise(work: Sequence[Work], at_once: int, stop: StopFlag, show: Show, go_on: bool = True) -> list[Outcome]:
    """Do `work`, at most `at_once` pieces at a time; return the outcomes of those that were started.

    One that fails does not disturb the others. Every signal is passed on to all that run, and no other is started
    then; nor, without `go_on`, after a user's mistake, for the others would make it too.
    """
    waiting, running, outcomes = list(work), list[Work](), list[Outcome]()
    passed_on = 0
    try:
        while running or waiting:
            if stop() or (not go_on and any(outcome.code == EXIT_USER_ERROR for outcome in outcomes)):
                waiting.clear()
            while waiting and len(running) < at_once:
                waiting[0].start()
                running.append(waiting.pop(0))
            heard = stop.count
            for begun in list(running):
                if heard > passed_on:
                    begun.pass_on(stop)
                outcome = begun.poll()
                for line in begun.news():
                    show(begun.name, line)
                if outcome is not None:
                    running.remove(begun)
                    outcomes.append(outcome)
            passed_on = heard
            if running:
                time.sleep(0.1)
    finally:
        for begun in running:
            begun.kill()
    return outcomes


def tethered(command: Sequence[str]) -> list[str]:
    """`command` such that the kernel kills it when this process ends."""
    return [sys.executable, "-c", _TETHER, str(os.getpid()), *command]


def end_in_words(code: int) -> str:
    """``was killed by SIGKILL`` or ``ended with exit code 1``."""
    names = {number.value: number.name for number in signal.Signals}
    return f"ended with exit code {code}" if code >= 0 else f"was killed by {names.get(-code, f'signal {-code}')}"
