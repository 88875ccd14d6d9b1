"""Trained teachers that come with the package: ``teachers.source=zoo`` starts from them in seconds.

A teacher of the zoo is a published teacher folder without its critic, its weights in float16, with a card: where it
comes from and how it scored in just this form.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc_cpd.distributed.mpi import Communicator
from hpc_cpd.errors import UserError
from hpc_cpd.progress import Progress
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import atomic_folder, mark_done
from hpc_cpd.tasks.registry import describe
from hpc_cpd.teachers.policy import TeacherPolicy, load_teacher, save_teacher, zoo_folder
from hpc_cpd.teachers.publish import Evaluate, publish_teacher


def take_from_zoo(run: Run, task_id: str, communicator: Communicator, evaluate: Evaluate) -> None:
    """Publish the zoo's teacher of `task_id` in `run`, evaluated on the run's own goals; all ranks call it together.

    Raises UserError: the zoo has none, or one of another version of the reward.
    """
    began = time.monotonic()
    progress = Progress(f"teacher {task_id}", enabled=communicator.rank == 0, folder=run.teacher(task_id))
    task = describe(task_id)
    policy = load_teacher(zoo_folder(task.skill))
    policy.task_id = task_id
    provenance = policy.provenance
    known = provenance.get("reward_version")
    if known != task.reward_version:
        raise UserError(
            f"the zoo's teacher of {task_id} learnt reward version {known}, but this run has {task.reward_version}; "
            "set teachers.source=train"
        )
    successes = publish_teacher(
        run,
        policy,
        communicator,
        evaluate,
        {**provenance, "source": "zoo"},
        environment_steps=0,
        seconds=lambda: time.monotonic() - began,
    )
    progress.update(f"taken from the zoo, success {successes}", last=True)


def add_to_zoo(zoo: Path, policy: TeacherPolicy, card: Mapping[str, Any]) -> None:
    """Write `policy` to ``zoo/TASK`` in the small form, replacing one that is there; `card` becomes its provenance."""
    with atomic_folder(zoo / policy.task_id) as temporary:
        save_teacher(temporary, policy, card, small=True)
        mark_done(temporary, {"task_id": policy.task_id})
