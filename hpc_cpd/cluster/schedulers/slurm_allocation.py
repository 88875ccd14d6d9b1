"""Inside an allocation of several nodes (salloc), the ranks of a job are started by srun.

salloc --nodes=2 --ntasks-per-node=2
python -m hpc_cpd.launch --stage 1 --run RUN
"""

from __future__ import annotations

import os

from hpc_cpd.settings import Config


def teacher_words(config: Config) -> tuple[str, ...]:
    """How srun starts the ranks of one teacher: on one node, beside other teachers."""
    return (
        "srun",
        "--exact",
        "--nodes=1",
        f"--ntasks={config.teachers.ranks}",
        f"--mpi={config.cluster.mpi_plugin}",
        *_common(config.cluster.cpus_per_rank),
    )


def stage_words(config: Config) -> tuple[str, ...]:
    """How srun starts the ranks of a stage: over all nodes of the allocation."""
    return (
        "srun",
        f"--nodes={nodes()}",
        f"--ntasks={config.distill.ranks}",
        *_common(config.cluster.cpus_of_stage_rank),
    )


def nodes() -> int:
    """Nodes of the allocation around this process; 1 outside of any."""
    return int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))


def teachers_at_once(config: Config) -> int:
    """How many teachers the allocation's cores hold at a time."""
    cores = sum(_expand(os.environ.get("SLURM_JOB_CPUS_PER_NODE", "1")))
    return max(1, cores // (config.teachers.ranks * config.cluster.cpus_per_rank))


def _common(cpus: int) -> tuple[str, ...]:
    return (f"--cpus-per-task={cpus}", "--kill-on-bad-exit=1", "--unbuffered")


def _expand(text: str) -> list[int]:
    """Slurm's ``4(x2),8`` as [4, 4, 8]."""
    counts = []
    for part in text.split(","):
        number, _, times = part.partition("(x")
        counts += [int(number)] * int(times.rstrip(")") or 1)
    return counts
