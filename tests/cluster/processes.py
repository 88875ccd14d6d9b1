"""The processes of this machine, as /proc has them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A living process; one that only waits to be reaped counts as gone."""

    pid: int
    parent: int
    program: str

    def text(self, name: str) -> bytes:
        """A file of /proc for it; empty when it has gone or belongs to somebody else."""
        try:
            return Path(f"/proc/{self.pid}/{name}").read_bytes()
        except OSError:
            return b""


def processes() -> Iterator[Process]:
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with suppress(OSError):
                head, _, tail = Path(entry.path, "stat").read_text(errors="replace").rpartition(")")
                state, parent = tail.split()[:2]
                if state not in "ZX":
                    yield Process(int(entry.name), int(parent), head.partition("(")[2])


def started_at(pid: int) -> str:
    """When a process started, in the kernel's ticks; with the pid it names the process for ever."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
