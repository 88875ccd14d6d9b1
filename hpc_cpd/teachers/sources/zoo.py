"""Trained teachers that come with the package: ``teachers.source=zoo`` starts from them in seconds.

A teacher of the zoo is a published teacher folder without its critic, its weights in float16, with a card: where it
comes from and how it scored in just this form.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from hpc_cpd import plugins
from hpc_cpd.errors import UserError
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import atomic_folder, is_done, mark_done, read_json
from hpc_cpd.settings import Config, PluginSettings
from hpc_cpd.tasks.families.base import TaskSpec
from hpc_cpd.teachers.algorithms.base import TeacherContext, TrainablePolicy

ZOO = Path(__file__).parents[2] / "zoo"


class ZooSettings(PluginSettings):
    """The zoo has nothing to set."""

    name: Literal["zoo"] = "zoo"


class Zoo:
    """Trained teachers that come with the package."""

    Settings = ZooSettings

    def check(self, settings: ZooSettings, config: Config, task: TaskSpec, ranks: int) -> None:
        known = _card(task)["provenance"].get("reward_version")
        if known != task.reward_version:
            raise UserError(
                f"the zoo's teacher of {task.task_id} learnt reward version {known}, but this run has "
                f"{task.reward_version}; set teachers.source=train"
            )

    def make(self, settings: ZooSettings, run: Run, context: TeacherContext, stop: Callable[[], bool]) -> None:
        from hpc_cpd.teachers.policy import load_teacher, save_teacher
        from hpc_cpd.teachers.publish import publish_teacher

        began, task = time.monotonic(), context.task
        card, policy = _card(task), load_teacher(zoo_folder(task.skill))
        policy.task_id = task.task_id
        provenance = {**card["provenance"], "source": "zoo"}
        write = partial(save_teacher, policy=policy, provenance=provenance, algorithm=card.get("algorithm", "ppo"))
        publish_teacher(run, policy, context, write, "taken from the zoo", began)


def zoo_folder(task_id: str) -> Path:
    """The folder of the zoo's teacher of `task_id`. Raises UserError when it has none."""
    folder = ZOO / task_id
    if not is_done(folder):
        known = sorted(str(path.parent.relative_to(ZOO)) for path in ZOO.glob("*/*/DONE"))
        near = [name for name in known if name.endswith(f"/{task_id}")]
        hint = plugins.hint(near[0] if near else task_id, known)
        raise UserError(
            f"the zoo has no teacher of {task_id}; {hint}it has those of {len(known)} tasks, the folders in {ZOO}; "
            "others are trained with teachers.source=train"
        )
    return folder


def add_to_zoo(zoo: Path, policy: TrainablePolicy, card: Mapping[str, Any]) -> None:
    """Write `policy` to ``zoo/TASK`` in the small form, replacing one that is there; `card` becomes its provenance."""
    from hpc_cpd.teachers.policy import save_teacher

    with atomic_folder(zoo / policy.task_id) as temporary:
        save_teacher(temporary, policy, card, small=True)
        mark_done(temporary, {"task_id": policy.task_id})


def _card(task: TaskSpec) -> dict[str, Any]:
    return dict(read_json(zoo_folder(task.skill) / "policy.json"))


plugin = Zoo()
