"""A scheduler that keeps its jobs as files in a folder: for a few machines that share a disk and no real scheduler.

    cluster: {scheduler: {name: folder, folder: /disk/queue}}     # in a config; then launch as ever
    python -m folder_scheduler /disk/queue                        # on a machine that sees it: runs what waits

A job is ``N.json``: its command, the jobs that it waits for, and its state. The class below is all that hpc_cpd needs
to know; what is not overridden (one job per teacher or stage, no time limit, nobody who launches again) is inherited.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from hpc_cpd.cluster.ranks import find_mpiexec, free_port
from hpc_cpd.cluster.schedulers.base import Job, JobState, Phase, RankInfo, Scheduler
from hpc_cpd.cluster.units import Unit
from hpc_cpd.run.job import JobStart
from hpc_cpd.run.publish import read_json, write_json
from hpc_cpd.settings import PluginSettings

PHASES: dict[str, Phase] = {"WAITING": "waiting", "RUNNING": "running", "DONE": "done", "FAILED": "failed"}
PHASES |= {"STOPPED": "interrupted", "CANCELLED": "cancelled", "UNMET": "unmet"}


class FolderSettings(PluginSettings):
    """The settings stand beside what they are for; `name` is what a config says."""

    name: Literal["folder"] = "folder"
    folder: str = Field("queue", description="where the jobs wait")


class Folder(Scheduler):
    """Asked by the launcher (submit, states, cancel) and, inside a job, by every rank (rank, rendezvous, requeue)."""

    Settings = FolderSettings
    variables = ("FOLDER_",)  # of a job around us: they must not reach the ranks of another
    requeues = True  # a stopped job goes back into the queue, by `requeue`

    def available(self) -> bool:
        return True

    def submit(self, job: Job, after: Mapping[Unit, str], avoid: Sequence[str]) -> Iterator[Sequence[str]]:
        (unit,) = job.units
        queue = Path(self.settings.folder).absolute()
        number = 1 + max((int(path.stem) for path in queue.glob("*.json")), default=0)
        words = {
            "argv": [sys.executable, "-u", "-m", "hpc_cpd.worker", *job.request.arguments(unit)],
            "ranks": unit.ranks(job.request.config),
            "mpi": unit.uses_mpi,  # else its ranks meet at the place that `rendezvous` names
            "logs": [str(self.log(job.request.run, str(number), rank).absolute()) for rank in range(64)],
        }
        write_json(queue / f"{number}.json", {**words, "after": list(after.values()), "state": "WAITING", "restart": 0})
        yield [str(number)]

    def states(self, jobs: Sequence[str]) -> dict[str, JobState]:
        found = {job: Path(self.settings.folder, f"{job}.json") for job in jobs}
        words = {job: read_json(path)["state"] for job, path in found.items() if path.is_file()}
        return {job: JobState(word, PHASES[word]) for job, word in words.items()}

    def cancel(self, jobs: Sequence[str]) -> None:
        for job, state in self.states(jobs).items():
            if state.phase == "waiting":
                change(Path(self.settings.folder, f"{job}.json"), state="CANCELLED")

    @classmethod
    def rank(cls, environment: Mapping[str, str]) -> RankInfo | None:
        if "FOLDER_JOB" not in environment:
            return None
        rank = int(environment.get("FOLDER_RANK", environment.get("PMI_RANK", "0")))
        job = JobStart(environment["FOLDER_JOB"], int(environment["FOLDER_RESTART"]))
        return RankInfo(rank, int(environment["FOLDER_SIZE"]), rank, scheduler="folder", job=job)

    def rendezvous(self, info: RankInfo, environment: Mapping[str, str]) -> tuple[str, int]:
        return "127.0.0.1", int(environment["FOLDER_PORT"])

    def requeue(self, job: JobStart) -> None:
        Path(self.settings.folder, f"{job.id}.again").touch()  # the runner looks for it when all ranks have ended


def change(path: Path, **values: Any) -> dict[str, Any]:
    job: dict[str, Any] = read_json(path) | values
    write_json(path, job)
    return job


def run_one(path: Path) -> None:
    """Run the ranks of one job, each with a log of its own, and note how it ended."""
    job, again = change(path, state="RUNNING"), path.with_suffix(".again")
    size, by_mpi = job["ranks"], job["mpi"] and job["ranks"] > 1
    names = {"JOB": path.stem, "RESTART": job["restart"], "SIZE": size, "PORT": free_port()}
    foreign = ("FOLDER_", "HPC_CPD_", "PMI_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    environment |= {f"FOLDER_{name}": str(value) for name, value in names.items()}
    # one thread per rank: sums of another number of threads are rounded otherwise, and ranks share these cores
    environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HDF5_USE_FILE_LOCKING": "FALSE"}
    commands = [[find_mpiexec(), "-n", str(size), *job["argv"]]] if by_mpi else [job["argv"]] * size
    with ExitStack() as logs:
        ranks = []
        for rank, command in enumerate(commands):
            Path(job["logs"][rank]).parent.mkdir(parents=True, exist_ok=True)
            log = logs.enter_context(open(job["logs"][rank], "ab"))
            own = {} if by_mpi else {"FOLDER_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=environment | own, stdout=log, stderr=log))
        while None in [one.poll() for one in ranks]:
            if again.exists() or any(one.returncode not in (None, 0, 3) for one in ranks):
                for one in ranks:  # the job goes back into the queue, or a rank failed: the others wait for nobody
                    one.kill()
            time.sleep(0.1)
        code = max(one.returncode if one.returncode >= 0 else 1 for one in ranks)
    if again.exists():
        change(path, state="WAITING", restart=job["restart"] + 1)
        again.unlink()
    else:
        change(path, state={0: "DONE", 3: "STOPPED"}.get(code, "FAILED"))


def run_all(queue: Path) -> None:
    """Run what may begin, oldest first, until nothing waits."""
    while waiting := [
        path for path in sorted(queue.glob("*.json"), key=lambda p: int(p.stem)) if _state(path) == "WAITING"
    ]:
        for path in waiting:
            needs = [_state(queue / f"{job}.json") for job in read_json(path)["after"]]
            if all(state == "DONE" for state in needs):
                run_one(path)
                break
            if any(PHASES[state] in ("failed", "cancelled", "interrupted", "unmet") for state in needs):
                change(path, state="UNMET")
        else:
            time.sleep(0.1)


def _state(path: Path) -> str:
    return str(read_json(path)["state"])


if __name__ == "__main__":
    os.makedirs(sys.argv[1], exist_ok=True)
    run_all(Path(sys.argv[1]).absolute())
