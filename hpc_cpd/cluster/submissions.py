"""Which Slurm job works on which teacher or stage of a run: ``logs/submitted.json``.

Units are ``teacher TASK`` and ``stage K``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hpc_cpd.cluster.schedulers.slurm import Site
from hpc_cpd.errors import UserError
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import read_json, write_json


@dataclass(frozen=True)
class Submission:
    """The newest job of a unit. `failures`: how many before it failed in a row; `avoid`: nodes that ate them."""

    job: str
    failures: int = 0
    avoid: tuple[str, ...] = ()


@dataclass
class Submissions:
    """What was submitted for `run`. Every change is on disk before the next job is submitted."""

    run: Run
    site: Site = field(default_factory=Site)
    units: dict[str, Submission] = field(default_factory=dict)
    caretaker: str | None = None

    @classmethod
    def read(cls, run: Run) -> Submissions:
        """The ledger of `run`, empty if nothing was submitted yet. Raises UserError when its file is damaged."""
        path = run.logs / "submitted.json"
        if not path.is_file():
            return cls(run)
        values: dict[str, Any] = read_json(path)
        try:
            units = {
                unit: Submission(one["job"], one["failures"], tuple(one["avoid"]))
                for unit, one in values["units"].items()
            }
            return cls(run, Site(**values["site"]), units, values["caretaker"])
        except (AttributeError, KeyError, TypeError):
            raise UserError(f"{path} is damaged; delete it when no job of the run is in the queue (squeue)") from None

    def write(self) -> None:
        values = {
            "site": asdict(self.site),
            "units": {unit: asdict(submission) for unit, submission in self.units.items()},
            "caretaker": self.caretaker,
        }
        write_json(self.run.logs / "submitted.json", values)

    def add(self, units: Mapping[str, Submission]) -> None:
        """Note `units` and write."""
        self.units |= units
        self.write()

    def jobs(self, units: Iterable[str] | None = None) -> list[str]:
        """The jobs of `units` (all), and the caretaker."""
        chosen = self.units if units is None else [unit for unit in units if unit in self.units]
        return [self.units[unit].job for unit in chosen] + ([self.caretaker] if self.caretaker else [])
