"""The job scripts, as pure functions of settings: an array for the teachers, a job per stage, and the resubmitter.

What they run is a plain command. Nothing is pickled: a job finds its state in the run folder, so any job can be run
again by anybody. The names of Slurm's variables come from whoever calls.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_cpd.cluster.units import LaunchRequest, Unit
from hpc_cpd.errors import UserError

if TYPE_CHECKING:
    from hpc_cpd.cluster.schedulers.slurm import SlurmSettings


@dataclass(frozen=True)
class Script:
    """A job to submit: submitit's parameters, and the command (of every rank, where srun starts it)."""

    command: str
    parameters: Mapping[str, Any]

    def text(self, folder: Path, dependency: str = "", avoid: Sequence[str] = ()) -> str:
        """The batch script, which keeps its logs in `folder` and shuns the nodes `avoid`. Reads and submits nothing."""
        parameters = {**self.parameters, **_given(dependency=dependency, exclude=",".join(avoid))}
        try:  # submitit's function for it is private: no other place calls it
            from submitit.slurm.slurm import _make_sbatch_string

            return str(_make_sbatch_string(command=self.command, folder=folder, **parameters))
        except (ImportError, TypeError) as error:
            raise UserError(
                f"submitit {metadata.version('submitit')} writes job scripts in another way than the tested 1.5 "
                f"({error}); install it with: pip install 'submitit>=1.5.3,<1.6'"
            ) from None


@dataclass(frozen=True)
class Scripts:
    """The scripts of one launch. `index`, `job`, `node`: what Slurm's shell puts in for the element of the array, the
    job's id and the name of its node.
    """

    request: LaunchRequest
    settings: SlurmSettings
    index: str
    job: str
    node: str

    def teachers(self, plan: Path, count: int, at_once: int) -> Script:
        """An array of `count` teachers, `at_once` at a time; element i trains the i-th task of the file `plan`."""
        ranks, cpus = self.request.config.teachers.ranks, self.settings.cpus_per_rank
        where = f"--run {_quote(self.request.run.folder.absolute())} --index {self.index} --plan {_quote(plan)}"
        parameters = self._parameters("teachers", ranks, 1, cpus)
        parameters |= {"map_count": count, "array_parallelism": at_once}
        parameters["srun_args"].insert(0, f"--mpi={self.settings.mpi_plugin}")
        return Script(f"{self._worker} teacher {where}", parameters)

    def stage(self, unit: Unit) -> Script:
        """The job of one stage. Raises UserError when its ranks do not fit its nodes or GPUs."""
        settings, ranks = self.settings, unit.ranks(self.request.config)
        nodes, gpus = settings.nodes_per_stage, settings.gpus_per_node
        if ranks % nodes:
            raise UserError(
                f"distill.ranks is {ranks}, which {nodes} nodes (cluster.scheduler.nodes_per_stage) cannot share "
                "evenly; make it a multiple"
            )
        if gpus and ranks != nodes * gpus:
            raise UserError(
                f"distill.ranks is {ranks}, but {nodes} nodes with {gpus} GPUs each "
                f"(cluster.scheduler.nodes_per_stage, cluster.scheduler.gpus_per_node) take {nodes * gpus}, one rank "
                f"per GPU; set distill.ranks={nodes * gpus}"
            )
        cpus = settings.stage_cpus_per_rank or settings.cpus_per_rank
        parameters = self._parameters(unit.name.replace(" ", "-"), ranks, nodes, cpus)
        parameters |= _given(partition=settings.stage_partition, constraint=settings.constraint)
        parameters |= _given(gres=settings.gres, gpus_per_node=gpus)
        return Script(f"{self._worker} {shlex.join(self.request.arguments(unit))}", parameters)

    def resubmitter(self) -> Script:
        """The small job that starts when another one ended unfinished, and launches what is left again.

        A node whose disk is broken swallows every job, this one too: where its log cannot be written, or the launch
        fails, it hands over to a copy of itself on another node, a few times.
        """
        folder, log = self.request.run.folder.absolute(), self.request.run.logs.absolute() / "resubmitter.log"
        launch = f"{_quote(sys.executable)} -u -m hpc_cpd.launch --stage all --run {_quote(folder)}"
        launch += f" --cluster {self.settings.name} --retry" + " --allow-missing" * self.request.allow_missing
        command = (
            f"{launch} >> {_quote(log)} 2>&1 && exit\n"
            f'[ "${{HPC_CPD_HANDED_OVER:=0}}" -lt 3 ] || exit 1\n'
            "export HPC_CPD_HANDED_OVER=$((HPC_CPD_HANDED_OVER + 1))\n"
            f"export HPC_CPD_AVOID=${{HPC_CPD_AVOID:+$HPC_CPD_AVOID,}}{self.node}\n"
            f'exec sbatch --dependency=afterany:{self.job} --exclude="$HPC_CPD_AVOID" "$0"'
        )
        parameters = self._common("resubmitter", minutes=15, nodes=1, ranks_per_node=1, cpus=1)
        parameters["additional_parameters"]["output"] = "/dev/null"  # a log that cannot be opened would fail the job
        return Script(command, parameters | {"use_srun": False, "setup": list(self.settings.setup)})

    @property
    def _worker(self) -> str:
        return f"{_quote(sys.executable)} -u -m hpc_cpd.worker"

    def _common(self, name: str, minutes: int, nodes: int, ranks_per_node: int, cpus: int) -> dict[str, Any]:
        settings = self.settings
        requeue = "requeue" if settings.continuation == "requeue" else "no-requeue"
        return {
            **_given(partition=settings.partition, account=settings.account, qos=settings.qos),
            **_given(mem_per_cpu=settings.memory_per_cpu),
            "job_name": f"{self.request.config.name}-{name}",
            "time": minutes,
            "nodes": nodes,
            "ntasks_per_node": ranks_per_node,
            "cpus_per_task": cpus,
            "stderr_to_stdout": True,
            # a job whose needs failed would wait for ever; the resubmitter submits it again
            "additional_parameters": {requeue: True, "kill-on-invalid-dep": "yes"},
        }

    def _parameters(self, name: str, ranks: int, nodes: int, cpus: int) -> dict[str, Any]:
        settings = self.settings
        if settings.signal_seconds_before_end >= 60 * settings.time_limit_minutes:
            raise UserError(
                f"cluster.scheduler.signal_seconds_before_end is {settings.signal_seconds_before_end}, which leaves "
                f"nothing of cluster.scheduler.time_limit_minutes ({settings.time_limit_minutes} min); make it smaller"
            )
        exports = [f"OMP_NUM_THREADS={cpus}", "OMP_WAIT_POLICY=passive", "HDF5_USE_FILE_LOCKING=FALSE"]
        if settings.network_interface is not None:
            exports += [f"{name}_SOCKET_IFNAME={settings.network_interface}" for name in ("GLOO", "NCCL")]
        common = self._common(name, settings.time_limit_minutes, nodes, ranks // nodes, cpus)
        common["additional_parameters"] |= settings.options
        return common | {
            "signal_delay_s": settings.signal_seconds_before_end,
            "setup": [f"export {' '.join(exports)}", *settings.setup],
            # srun does not inherit the cores; its logs must outlive a requeue; a rank that fails must end the others
            "srun_args": [f"--cpus-per-task={cpus}", "--open-mode=append", "--kill-on-bad-exit=1"],
        }


def _given(**options: Any) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value}


def _quote(path: str | Path) -> str:
    return shlex.quote(str(path))
