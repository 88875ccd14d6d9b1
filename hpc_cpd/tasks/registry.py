"""Task ids: which there are, in which stages they arrive, and how to simulate them.

Importing this module, resolving Meta-World names and describing them imports no simulator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from hpc_cpd import plugins
from hpc_cpd.errors import UserError
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import read_json
from hpc_cpd.settings import Config, StreamSettings
from hpc_cpd.tasks.families.base import Batch, OneByOne, TaskFamily, TaskSpec
from hpc_cpd.tasks.spaces import space_problem

if TYPE_CHECKING:
    from hpc_cpd.tasks.batch import BatchEnv

PAGE = "docs/extending/tasks.md"
TASK_SETS = {"MT10": 10, "MT25": 25, "MT50": 50}


def task_set(name: str) -> list[str]:
    """The task ids of MT10, MT25 or MT50, or of such a set with the goals of every task split: MT50x2.

    The sets are nested: MT25 stands in the order of the benchmark's own list, MT10 is its first ten, and MT50 is
    MT25 followed by the other tasks in the order of the benchmark's list. MT50x2 are the first halves of all fifty,
    ``reach-v3@1of2`` and so on, then their second halves.
    """
    whole, split, parts = name.partition("x")
    if whole not in TASK_SETS or (split and not (parts.isascii() and parts.isdigit() and int(parts))):
        raise UserError(f"there is no task set '{name}'; {plugins.hint(whole, TASK_SETS)}known: {', '.join(TASK_SETS)}")
    tasks = [f"metaworld/{task}" for task in plugins.load("tasks", "metaworld").names()[: TASK_SETS[whole]]]
    return [f"{task}@{part}of{parts}" for part in range(1, int(parts) + 1) for task in tasks] if split else tasks


def resolve_tasks(tasks: str | Sequence[str]) -> list[str]:
    """The task ids that a task set, one task id or a list of task ids stands for, in order.

    Raises UserError: an unknown set or id (with the nearest match), a task named twice, an empty list.
    """
    if isinstance(tasks, str):
        tasks = [tasks] if "/" in tasks else task_set(tasks)
    ids = list(tasks)
    if not ids:
        raise UserError("the list of tasks is empty; name a task set such as MT10, or at least one task id")
    for task_id in ids:
        family, name = family_of(task_id)
        if name not in ask(family.names, "names", task_id):
            describe(task_id)
    if twice := sorted({task_id for task_id in ids if ids.count(task_id) > 1}):
        raise UserError(f"task '{twice[0]}' is listed twice; name every task once")
    return ids


def stage_plan(stream: StreamSettings) -> list[list[str]]:
    """The task ids of each stage: the stream's tasks in order (shuffled if order_seed is set), cut into stages.

    The last stage is smaller when the tasks do not divide evenly.
    """
    tasks = resolve_tasks(stream.tasks)
    if stream.order_seed is not None:
        order = np.random.default_rng([stream.order_seed]).permutation(len(tasks))
        tasks = [tasks[index] for index in order]
    size = stream.tasks_per_stage or len(tasks)
    return [tasks[start : start + size] for start in range(0, len(tasks), size)]


def run_plan(run: Run, config: Config | None = None) -> list[list[str]]:
    """The stage plan of `run` without the tasks that a stage was told to do without (``--allow-missing``).

    `config`: the run's settings, where they are at hand already.
    """
    plan = stage_plan((run.config() if config is None else config).stream)
    for stage, tasks in enumerate(plan, 1):
        if (file := run.left_out_file(stage)).is_file():
            left_out = read_json(file)["tasks"]
            tasks[:] = [task for task in tasks if task not in left_out]
    return plan


def describe(task_id: str) -> TaskSpec:
    """The facts of a task. Raises UserError: no such task, or its family describes it wrongly."""
    family, name = family_of(task_id)
    spec = ask(family.describe, "describe", task_id, name)
    if problem := _mistake(spec, task_id):
        raise UserError(f"the family of task '{task_id}' describes it wrongly: {problem}; see {PAGE}")
    return cast(TaskSpec, spec)


def make_batch(task_id: str, num_envs: int, seed: int) -> BatchEnv:
    """`num_envs` environments of one task, stepped together in this process.

    `seed` fixes the set of goals, and the order in which they are drawn where the caller does not name them.
    """
    from hpc_cpd.tasks.batch import BatchEnv

    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, but it is {num_envs}")
    return BatchEnv(describe(task_id), environments(task_id, num_envs, seed), seed)


def environments(task_id: str, num_envs: int, seed: int) -> Batch:
    """What the family makes for `make_batch`."""
    family, name = family_of(task_id)
    made = family.make(name, num_envs, seed)
    return OneByOne(made) if isinstance(made, Sequence) else made


def family_of(task_id: str) -> tuple[TaskFamily, str]:
    """The family of a task, and the task's name in it. Raises UserError: `task_id` is none, or there is no family."""
    prefix, separator, name = task_id.partition("/")
    if not separator or not name:
        hint = plugins.hint(task_id, plugins.load("tasks", "metaworld").names(), "metaworld/").strip()
        raise UserError(f"'{task_id}' is not a task id; {hint or 'write for example metaworld/reach-v3'}")
    known = plugins.names("tasks")
    if prefix not in known:
        raise UserError(
            f"there is no task '{task_id}'; {plugins.hint(prefix, known)}task ids begin with one of: "
            f"{', '.join(f'{word}/' for word in known)}"
        )
    return plugins.load("tasks", prefix), name


def ask(method: Callable[..., Any], what: str, task_id: str, *arguments: Any) -> Any:
    """Call into a family. Raises UserError: its own, or one sentence for whatever else it raises."""
    return plugins.ask(f"the family of task '{task_id}' fails in {what}()", PAGE, method, *arguments)


def _mistake(spec: Any, task_id: str) -> str | None:
    """What is wrong with a description, whatever the simulator does; None: nothing."""
    from gymnasium import Space

    if not isinstance(spec, TaskSpec):
        return f"describe() must return a TaskSpec, but returned {type(spec).__name__} {spec!r:.80}"
    if spec.task_id != task_id:
        return f"its TaskSpec says task_id '{spec.task_id}'"
    for word, space in (("observation_space", spec.observation_space), ("action_space", spec.action_space)):
        if not isinstance(space, Space):
            return f"{word} must be a gymnasium space, but is {space!r:.80}"
        if problem := space_problem(space, word == "action_space"):
            return problem
    if not isinstance(spec.horizon, int) or spec.horizon < 1:
        return f"horizon must be a number of steps from 1, but is {spec.horizon!r}"
    return None
