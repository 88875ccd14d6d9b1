"""How a run stands: what is known of each teacher and stage. Made by `status`, drawn elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from hpc_cpd.cluster.units import Unit
from hpc_cpd.progress import News

State = Literal["done", "running", "waiting", "stopped", "failed", "given up", "not started"]


@dataclass(frozen=True)
class UnitProgress:
    """How far a unit is: `step` of `total` of a phase, or a phase alone, such as ``evaluating 10 tasks``."""

    phase: str
    step: int | None = None
    total: int | None = None
    loss: float | None = None

    @classmethod
    def of(cls, news: News) -> UnitProgress:
        return cls(news.phase, news.step, news.total, news.loss)

    @property
    def text(self) -> str:
        of = "" if self.total is None else f"/{self.total}"
        step = "" if self.step is None else f": {self.step}{of}"
        return f"{self.phase}{step}" + ("" if self.loss is None else f", loss {self.loss:.3g}")


@dataclass(frozen=True)
class UnitStatus:
    """One line of the table; ``hpc-cpd status --help`` tells what the fields mean."""

    unit: Unit
    state: State
    job: str | None = None
    reason: str | None = None
    node: str | None = None
    restarts: int = 0
    failures: int = 0
    progress: UnitProgress | None = None
    steps_per_second: float | None = None
    success: float | None = None
    seconds_left: float | None = None
    error: str | None = None
    log: str | None = None

    def document(self) -> dict[str, Any]:
        """Plain values for JSON, which has no NaN."""
        progress = None if self.progress is None else dict(vars(self.progress))
        if progress is not None and progress["loss"] is not None and not math.isfinite(progress["loss"]):
            progress["loss"] = None
        return vars(self) | {"unit": self.unit.name, "progress": progress}


@dataclass(frozen=True)
class RunStatus:
    """A run at one moment. `scheduler`: who was asked about jobs; `notes`: sentences for below the table."""

    run: str
    scheduler: str | None
    units: list[UnitStatus]
    done: dict[str, int]
    total: dict[str, int]
    next: str | None
    notes: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return all(unit.state == "done" for unit in self.units)

    def document(self) -> dict[str, Any]:
        """What ``hpc-cpd status --json`` prints; ``hpc-cpd status --help`` tells what the keys mean."""
        return vars(self) | {"units": [unit.document() for unit in self.units]}
