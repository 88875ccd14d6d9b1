"""The job scripts, as pure functions of settings: one array for the teachers, one job per stage, one caretaker.

submitit writes them; what they run is a plain command. Nothing is pickled: a job finds its state in the run
folder, so any job can be run again by anybody.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_cpd.errors import UserError
from hpc_cpd.run.paths import Run
from hpc_cpd.settings import ClusterSettings, Config

CARETAKER_MINUTES = 15
HAND_OVERS = 3


@dataclass(frozen=True)
class Script:
    """A job to submit: submitit's parameters, and the command (of every rank, where srun starts it)."""

    name: str
    command: str
    parameters: Mapping[str, Any]

    def text(self, folder: Path, dependency: str = "", avoid: Sequence[str] = ()) -> str:
        """The batch script, which keeps its logs in `folder` and shuns the nodes `avoid`. Reads and submits nothing."""
        from submitit.slurm.slurm import _make_sbatch_string

        parameters = dict(self.parameters)
        if dependency:
            parameters["dependency"] = dependency
        if avoid:
            parameters["exclude"] = ",".join(avoid)
        return str(_make_sbatch_string(command=self.command, folder=folder, **parameters))


def teachers_script(
    run: Run, config: Config, plan: Path, count: int, at_once: int, python: str = sys.executable
) -> Script:
    """An array of `count` teachers, `at_once` at a time; element i trains the i-th task of the file `plan`."""
    command = f"{_worker(python)} teacher --run {_quote(run.folder)} --index $SLURM_ARRAY_TASK_ID --plan {_quote(plan)}"
    cpus = config.cluster.cpus_per_rank
    parameters = _parameters(config, f"{config.name}-teachers", config.teachers.ranks, nodes=1, cpus=cpus)
    parameters["srun_args"] = [f"--mpi={config.cluster.mpi_plugin}", *parameters["srun_args"]]
    parameters["map_count"] = count
    parameters["array_parallelism"] = at_once
    return Script("1 teacher" if count == 1 else f"{count} teachers", command, parameters)


def stage_script(
    run: Run, config: Config, stage: int, allow_missing: bool = False, python: str = sys.executable
) -> Script:
    """The job of one stage. Raises UserError when its ranks do not fit its nodes or GPUs."""
    cluster, ranks = config.cluster, config.distill.ranks
    nodes, gpus = cluster.nodes_per_stage, cluster.gpus_per_node
    if ranks % nodes:
        raise UserError(
            f"distill.ranks is {ranks}, which {nodes} nodes (cluster.nodes_per_stage) cannot share evenly; "
            "make it a multiple"
        )
    if gpus and ranks != nodes * gpus:
        raise UserError(
            f"distill.ranks is {ranks}, but {nodes} nodes with {gpus} GPUs each (cluster.nodes_per_stage, "
            f"cluster.gpus_per_node) take {nodes * gpus}, one rank per GPU; set distill.ranks={nodes * gpus}"
        )
    command = f"{_worker(python)} stage --run {_quote(run.folder)} --stage {stage}"
    parameters = _parameters(config, f"{config.name}-stage-{stage}", ranks, nodes, cluster.cpus_of_stage_rank)
    special = {
        "partition": cluster.stage_partition,
        "constraint": cluster.constraint,
        "gres": cluster.gres,
        "gpus_per_node": gpus or None,
    }
    parameters |= {key: value for key, value in special.items() if value is not None}
    return Script(f"stage {stage}", command + (" --allow-missing" if allow_missing else ""), parameters)


def caretaker_script(run: Run, config: Config, allow_missing: bool = False, python: str = sys.executable) -> Script:
    """The small job that starts when another one ended unfinished, and launches what is left again.

    A node whose disk is broken swallows every job, this one too: where its log cannot be written, or the launch fails,
    it hands over to a copy of itself on another node, a few times.
    """
    launch = f"{_quote(python)} -u -m hpc_cpd.launch --stage all --run {_quote(run.folder)} --cluster slurm --retry"
    launch += " --allow-missing" if allow_missing else ""
    command = (
        f"{launch} >> {_quote(run.logs / 'caretaker.log')} 2>&1 && exit\n"
        f'[ "${{HPC_CPD_HANDED_OVER:=0}}" -lt {HAND_OVERS} ] || exit 1\n'
        "export HPC_CPD_HANDED_OVER=$((HPC_CPD_HANDED_OVER + 1))\n"
        "export HPC_CPD_AVOID=${HPC_CPD_AVOID:+$HPC_CPD_AVOID,}$SLURMD_NODENAME\n"
        'exec sbatch --dependency=afterany:$SLURM_JOB_ID --exclude="$HPC_CPD_AVOID" "$0"'
    )
    parameters = _common(config.cluster, f"{config.name}-caretaker") | {
        "time": CARETAKER_MINUTES,
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": 1,
        "use_srun": False,
        "setup": list(config.cluster.setup),
    }
    parameters["additional_parameters"]["output"] = "/dev/null"  # a log that cannot be opened would fail the job
    return Script("caretaker", command, parameters)


def _common(cluster: ClusterSettings, name: str) -> dict[str, Any]:
    wanted = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "mem_per_cpu": cluster.memory_per_cpu,
    }
    requeue = {"requeue": True} if cluster.continuation == "requeue" else {"no-requeue": True}
    return {key: value for key, value in wanted.items() if value is not None} | {
        "job_name": name,
        "stderr_to_stdout": True,
        # a job whose needs failed would wait for ever; its caretaker submits it again
        "additional_parameters": {**requeue, "kill-on-invalid-dep": "yes"},
    }


def _parameters(config: Config, name: str, ranks: int, nodes: int, cpus: int) -> dict[str, Any]:
    cluster = config.cluster
    if cluster.signal_seconds_before_end >= 60 * cluster.time_limit_minutes:
        raise UserError(
            f"cluster.signal_seconds_before_end is {cluster.signal_seconds_before_end}, which leaves nothing of "
            f"cluster.time_limit_minutes ({cluster.time_limit_minutes} min); make it smaller"
        )
    exports = [f"OMP_NUM_THREADS={cpus}", "OMP_WAIT_POLICY=passive", "HDF5_USE_FILE_LOCKING=FALSE"]
    if cluster.network_interface is not None:
        exports += [f"{name}_SOCKET_IFNAME={cluster.network_interface}" for name in ("GLOO", "NCCL")]
    common = _common(cluster, name)
    common["additional_parameters"] |= cluster.options
    return common | {
        "time": cluster.time_limit_minutes,
        "nodes": nodes,
        "ntasks_per_node": ranks // nodes,
        "cpus_per_task": cpus,
        "signal_delay_s": cluster.signal_seconds_before_end,
        "setup": [f"export {' '.join(exports)}", *cluster.setup],
        # srun does not inherit the cores; its logs must outlive a requeue; a rank that fails must end the others
        "srun_args": [f"--cpus-per-task={cpus}", "--open-mode=append", "--kill-on-bad-exit=1"],
    }


def _worker(python: str) -> str:
    return f"{_quote(python)} -u -m hpc_cpd.worker"


def _quote(path: str | Path) -> str:
    return shlex.quote(str(path))
