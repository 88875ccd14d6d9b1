"""Slurm: arrays of teachers, stages chained by dependencies, and a resubmitter. No other file names its variables."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from hpc_cpd.cluster.schedulers import _slurm_commands as commands
from hpc_cpd.cluster.schedulers._slurm_scripts import Script, Scripts
from hpc_cpd.cluster.schedulers.base import Job, JobState, RankInfo, Scheduler, Starter
from hpc_cpd.cluster.units import LaunchRequest, TeacherUnit, Unit
from hpc_cpd.errors import UserError
from hpc_cpd.run.job import JobStart
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import write_json
from hpc_cpd.settings import Config, PluginSettings

_MEMORY = re.compile(r"(?i:oom[-_ ]kill|exceeded (job )?memory limit)|: Out Of Memory")  # not: CUDA out of memory
# What Slurm alone knows about the end of a job, and what to do about it.
_ADVICE = {
    "OUT_OF_MEMORY": "raise cluster.scheduler.memory_per_cpu",
    "TIMEOUT": "raise cluster.scheduler.time_limit_minutes",
    "DEADLINE": "raise cluster.scheduler.time_limit_minutes",
    "NODE_FAIL": "its node was lost; launch again",
    "BOOT_FAIL": "its node did not start; launch again",
    "CANCELLED": "somebody cancelled it; launch again when it is wanted",
}


class SlurmSettings(PluginSettings):
    """What a site wants to be told. Site names belong in configs/cluster/*.yaml, never in code."""

    name: Literal["slurm"] = "slurm"
    partition: str | None = Field(None, description="Slurm partition")
    stage_partition: str | None = Field(None, description="partition of the stages, where it is another (GPUs)")
    account: str | None = Field(None, description="Slurm account")
    qos: str | None = Field(None, description="Slurm quality of service")
    constraint: str | None = Field(None, description="node feature of the stages")
    gres: str | None = Field(None, description="generic resource of the stages, where GPUs are asked for so")
    nodes_per_stage: int = Field(1, ge=1, description="nodes of a stage's job")
    gpus_per_node: int = Field(0, ge=0, description="GPUs per node, one rank each")
    cpus_per_rank: int = Field(1, ge=1, description="cores per rank")
    stage_cpus_per_rank: int | None = Field(None, ge=1, description="cores per rank of a stage; null: as a teacher's")
    memory_per_cpu: str | None = Field(None, description="for example 4G")
    time_limit_minutes: int = Field(240, ge=1, description="wall clock of one job")
    signal_seconds_before_end: int = Field(
        120, ge=1, description="a job saves and leaves this long before its time limit"
    )
    array_parallelism: int = Field(64, ge=1, description="teachers at once")
    mpi_plugin: str = Field("pmi2", description="srun --mpi plugin of the teachers")
    network_interface: str | None = Field(None, description="network between the nodes of a stage, for example ib0")
    setup: list[str] = Field([], description="shell lines before each job: module load, conda activate")
    options: dict[str, bool | int | str] = Field({}, description="further sbatch options, by their long names")
    continuation: Literal["requeue", "resubmit", "chain"] = Field(
        "requeue",
        description="how stopped work goes on: Slurm requeues its job; a new job is submitted for it; or, where jobs "
        "may do neither, each job is submitted chain_length times, one after the other",
    )
    chain_length: int = Field(4, ge=1, description="links of a chain")


@dataclass(frozen=True)
class SlurmJob(Job):
    """An array of teachers, or one stage. `array`: the file that tells the elements of an array their tasks."""

    script: Script
    array: Path | None = None


class Slurm(Scheduler):
    """Jobs of sbatch, asked after with squeue and sacct."""

    Settings = SlurmSettings
    settings: SlurmSettings
    variables: ClassVar[tuple[str, ...]] = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_")

    def __init__(self, settings: SlurmSettings) -> None:
        super().__init__(settings)
        self.lead_seconds = settings.signal_seconds_before_end
        self.requeues = settings.continuation == "requeue"

    # ---- before and while jobs are submitted

    def available(self) -> bool:
        return commands.slurm_answers()

    @cached_property
    def site(self) -> commands.Site:
        """What the controller says about itself; the usual values where there is no Slurm (``--dry-run``)."""
        return commands.ask_site() if self.available() else commands.Site()

    def scripts(self, request: LaunchRequest) -> Scripts:
        return Scripts(request, self.settings, "$SLURM_ARRAY_TASK_ID", "$SLURM_JOB_ID", "$SLURMD_NODENAME")

    def jobs(self, request: LaunchRequest, units: Sequence[Unit]) -> Sequence[SlurmJob]:
        """The arrays of teachers, no larger than the site allows, then each stage, in order."""
        logs, scripts, size = request.run.logs.absolute(), self.scripts(request), self.site.max_array_size
        teachers = [unit for unit in units if isinstance(unit, TeacherUnit)]
        chunks = [teachers[begin : begin + size] for begin in range(0, len(teachers), size)]
        at_once = max(1, self.settings.array_parallelism // max(1, len(chunks)))
        made = []
        for number, chunk in enumerate(chunks, 1 + len(list(logs.glob("teachers-*.json")))):
            array = logs / f"teachers-{number}.json"
            made.append(SlurmJob(request, chunk, [], scripts.teachers(array, len(chunk), at_once), array))
        stages = [unit for unit in units if not isinstance(unit, TeacherUnit)]
        return made + [SlurmJob(request, [one], one.needs(request.plan), scripts.stage(one)) for one in stages]

    def describe(self, job: Job, after: Mapping[Unit, str]) -> str:
        assert isinstance(job, SlurmJob)
        return job.script.text(job.request.run.logs.absolute() / "slurm", self._dependency(job, after))

    def submit(self, job: Job, after: Mapping[Unit, str], avoid: Sequence[str]) -> Iterator[Sequence[str]]:
        """Submit the job, or the chain of them; every other link waits for the last."""
        assert isinstance(job, SlurmJob)
        logs, waits = job.request.run.logs.absolute() / "slurm", self._dependency(job, after)
        if job.array is not None:
            write_json(job.array, {"tasks": [unit.task for unit in job.units if isinstance(unit, TeacherUnit)]})
        for _ in range(self.settings.chain_length if self.settings.continuation == "chain" else 1):
            made = self._submit(logs, job.name, job.script, waits, avoid)
            yield [made] if job.array is None else [f"{made}_{index}" for index in range(len(job.units))]
            waits = f"afterany:{made}"

    def watch(self, request: LaunchRequest, jobs: Sequence[str]) -> str | None:
        if self.settings.continuation == "chain":
            return None
        script = self.scripts(request).resubmitter()
        waits = "?".join(f"afternotok:{job}" for job in jobs)
        return self._submit(request.run.logs.absolute() / "slurm", "resubmitter", script, waits, [])

    def this_job(self) -> str | None:
        return os.environ.get("SLURM_JOB_ID")

    def cancel(self, jobs: Sequence[str]) -> None:
        commands.cancel(jobs, self._environment())

    def _submit(self, logs: Path, name: str, script: Script, waits: str, avoid: Sequence[str]) -> str:
        try:
            return commands.submit(logs, name, script.text(logs, waits, avoid), self._environment())
        except UserError as error:
            if not avoid or "node configuration is not available" not in str(error):
                raise
            return self._submit(logs, name, script, waits, [])  # every node is avoided: then none

    def _environment(self) -> dict[str, str]:
        """A job submitted from inside a job must not inherit its memory and task settings, only where Slurm is."""
        ours = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "HPC_CPD_JOB")
        names = [name for name in os.environ if name == "SLURM_CONF" or not name.startswith((*self.variables, *ours))]
        return {name: os.environ[name] for name in names}

    def _dependency(self, job: Job, after: Mapping[Unit, str]) -> str:
        """What `job` waits for.

        With --allow-missing, the end of a teacher's chain is its last word. Anywhere else a teacher whose job ended may
        go on in another one: the stage waits for success, and the resubmitter submits it again without those given up.
        """
        teachers = [id for unit, id in after.items() if isinstance(unit, TeacherUnit)]
        stages = [id for unit, id in after.items() if not isinstance(unit, TeacherUnit)]
        return dependency(teachers, stages, job.request.allow_missing and self.settings.continuation == "chain")

    # ---- questions about jobs

    def states(self, jobs: Sequence[str]) -> dict[str, JobState]:
        return commands.job_states(jobs, self.site.accounting) if jobs else {}

    @property
    def source(self) -> str:
        return "sacct" if self.site.accounting else "squeue"

    def explain(self, state: JobState, log: Sequence[str]) -> str:
        word = state.word
        if word == "FAILED" and any(_MEMORY.search(line) for line in log):  # where Slurm has no other word for it
            word = "OUT_OF_MEMORY"
        return f"{word}: {_ADVICE[word]}" if word in _ADVICE else ""

    def log(self, run: Run, job: str, rank: int = 0) -> Path:
        return run.logs / "slurm" / f"{job}_{rank}_log.out"

    # ---- inside a job

    @classmethod
    def rank(cls, environment: Mapping[str, str]) -> RankInfo | None:
        """A batch script is no step: Slurm sets SLURM_PROCID and SLURM_NTASKS there too, but no SLURM_STEP_ID."""
        if "SLURM_STEP_ID" not in environment:
            return None
        size = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
        rank, local_rank = (int(environment.get(name, "0")) for name in ("SLURM_PROCID", "SLURM_LOCALID"))
        # 12, or 12_3 in an array, whose last element has the number of the array itself
        array, element = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
        id = f"{array}_{element}" if array and element else environment.get("SLURM_JOB_ID")
        job = JobStart(id, int(environment.get("SLURM_RESTART_COUNT") or 0))
        return RankInfo(rank, int(size), local_rank, scheduler="slurm", job=job)

    def rendezvous(self, info: RankInfo, environment: Mapping[str, str]) -> tuple[str, int]:
        """The first host of the job, and a port from its number: two jobs on one node must not share it."""
        from submitit.slurm.slurm import SlurmJobEnvironment

        port = 20000 + int(environment["SLURM_JOB_ID"]) % 12000
        return SlurmJobEnvironment().hostnames[0], port

    def seconds_left(self, job: JobStart) -> float | None:
        return None if job.id is None else commands.seconds_left(job.id)

    def requeue(self, job: JobStart) -> None:
        if failure := commands.requeue(str(job.id)):
            message = f"could not requeue job {job.id} ({failure}); the resubmitter submits it anew"
            print(message, file=sys.stderr, flush=True)

    # ---- inside an allocation (salloc), where srun starts the ranks

    def inside(self) -> bool:
        return "SLURM_JOB_ID" in os.environ

    def starter(self, unit: Unit, config: Config) -> Starter | None:
        """A teacher has one node, beside other teachers; a stage has all nodes."""
        nodes, ranks = int(os.environ.get("SLURM_JOB_NUM_NODES", "1")), unit.ranks(config)
        if nodes == 1:
            return None
        end = ("--kill-on-bad-exit=1", "--unbuffered")
        if isinstance(unit, TeacherUnit):
            cpus = self.settings.cpus_per_rank
            counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_JOB_CPUS_PER_NODE", "1"))  # 4(x2),8
            cores = sum(int(number) * int(times or 1) for number, times in counts)
            words = ("srun", "--exact", "--nodes=1", f"--ntasks={ranks}", f"--mpi={self.settings.mpi_plugin}")
            return Starter((*words, f"--cpus-per-task={cpus}", *end), cpus, max(1, cores // (ranks * cpus)))
        cpus = self.settings.stage_cpus_per_rank or self.settings.cpus_per_rank
        return Starter(("srun", f"--nodes={nodes}", f"--ntasks={ranks}", f"--cpus-per-task={cpus}", *end), cpus, 1)


plugin = Slurm


def dependency(teachers: Sequence[str], stages: Sequence[str], any_end: bool) -> str:
    """What sbatch is told to wait for: success of these jobs, or with `any_end` merely the end of the teachers."""
    groups = [("afterany", teachers), ("afterok", stages)] if any_end else [("afterok", [*teachers, *stages])]
    return ",".join(f"{word}:{':'.join(jobs)}" for word, jobs in groups if jobs)
