"""Which job works on which teacher or stage of a run: ``logs/submitted.json``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hpc_cpd.cluster.units import Unit
from hpc_cpd.errors import UserError
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import read_json, write_json


@dataclass(frozen=True)
class Submission:
    """The newest job of a unit. `failures`: how many before it failed in a row; `avoid`: nodes on which they died."""

    job: str
    failures: int = 0
    avoid: tuple[str, ...] = ()


@dataclass
class Submissions:
    """What was submitted for `run`, by the names of units. Every change is on disk before the next job is submitted.

    `scheduler`: whose jobs they are; `resubmitter`: the job that launches again what ends unfinished.
    """

    run: Run
    scheduler: str | None = None
    units: dict[str, Submission] = field(default_factory=dict)
    resubmitter: str | None = None

    @classmethod
    def read(cls, run: Run) -> Submissions:
        """Those of `run`, empty if nothing was submitted yet. Raises UserError when the file is damaged."""
        path = run.logs / "submitted.json"
        if not path.is_file():
            return cls(run)
        values: dict[str, Any] = read_json(path)
        try:
            units = {
                name: Submission(one["job"], one["failures"], tuple(one["avoid"]))
                for name, one in values["units"].items()
            }
            return cls(run, values["scheduler"], units, values["resubmitter"])
        except (AttributeError, KeyError, TypeError):
            raise UserError(f"{path} is damaged; delete it when no job of the run is in the queue") from None

    @classmethod
    def of(cls, run: Run, scheduler: str) -> Submissions:
        """Those that `scheduler` knows: empty where the last ones went to another. Raises UserError: damaged."""
        found = cls.read(run)
        return found if found.scheduler == scheduler else cls(run, scheduler)

    def write(self) -> None:
        values = {
            "scheduler": self.scheduler,
            "units": {name: asdict(submission) for name, submission in self.units.items()},
            "resubmitter": self.resubmitter,
        }
        write_json(self.run.logs / "submitted.json", values)

    def add(self, units: Mapping[str, Submission]) -> None:
        """Note `units` and write."""
        self.units |= units
        self.write()

    def jobs(self, units: Iterable[Unit] | None = None) -> list[str]:
        """The jobs of `units` (all), and the resubmitter."""
        names = self.units if units is None else [unit.name for unit in units if unit.name in self.units]
        return [self.units[name].job for name in names] + ([self.resubmitter] if self.resubmitter else [])
