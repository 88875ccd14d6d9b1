"""Task ids: which there are, in which stages they arrive, and how to simulate them.

Importing this module, resolving Meta-World names and describing them imports no simulator.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import import_module, metadata
from typing import TYPE_CHECKING

import numpy as np

from hpc_cpd.errors import UserError
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import read_json
from hpc_cpd.settings import Config, StreamSettings
from hpc_cpd.tasks.family import OneByOne, Simulator, Step, TaskFamily, TaskSpec

if TYPE_CHECKING:
    from hpc_cpd.tasks.batch import BatchEnv

__all__ = [
    "ENTRY_POINT_GROUP",
    "TASK_SETS",
    "Simulator",
    "Step",
    "TaskFamily",
    "TaskSpec",
    "describe",
    "families",
    "make_batch",
    "resolve_tasks",
    "run_plan",
    "stage_plan",
    "task_set",
]

ENTRY_POINT_GROUP = "hpc_cpd.tasks"
TASK_SETS = {"MT10": 10, "MT25": 25, "MT50": 50}
_BUILT_IN = {"metaworld": "hpc_cpd.tasks.metaworld", "gymnasium": "hpc_cpd.tasks.gymnasium"}


def task_set(name: str) -> list[str]:
    """The task ids of MT10, MT25 or MT50, or of such a set with the goals of every task split: MT50x2.

    The sets are nested: MT25 stands in the order of the benchmark's own list, MT10 is its first ten, and MT50 is
    MT25 followed by the other tasks in the order of the benchmark's list. MT50x2 are the first halves of all fifty,
    ``reach-v3@1of2`` and so on, then their second halves.
    """
    whole, split, parts = name.partition("x")
    if whole not in TASK_SETS or (split and not (parts.isascii() and parts.isdigit() and int(parts))):
        raise UserError(f"there is no task set '{name}'; {_hint(whole, TASK_SETS)}known: {', '.join(TASK_SETS)}")
    tasks = [f"metaworld/{task}" for task in _family("metaworld", name).names()[: TASK_SETS[whole]]]
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
        _check_exists(task_id)
    twice = sorted({task_id for task_id in ids if ids.count(task_id) > 1})
    if twice:
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
        file = run.left_out_file(stage)
        if file.is_file():
            left_out = read_json(file)["tasks"]
            tasks[:] = [task for task in tasks if task not in left_out]
    return plan


def describe(task_id: str) -> TaskSpec:
    """The facts of a task. Raises UserError: no such task, or spaces that are not supported."""
    prefix, name = _split(task_id)
    return _family(prefix, task_id).describe(name)


def make_batch(task_id: str, num_envs: int, seed: int) -> BatchEnv:
    """`num_envs` environments of one task, stepped together in this process.

    `seed` fixes the set of goals, and the order in which they are drawn where the caller does not name them.
    """
    from hpc_cpd.tasks.batch import BatchEnv

    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, but it is {num_envs}")
    prefix, name = _split(task_id)
    family = _family(prefix, task_id)
    task, made = family.describe(name), family.make(name, num_envs, seed)
    return BatchEnv(task, OneByOne(made) if isinstance(made, Sequence) else made, seed)


@cache
def families() -> dict[str, metadata.EntryPoint]:
    """The families that installed packages add, by prefix.

    Raises UserError: a prefix that is taken, by us or by another package.
    """
    found: dict[str, metadata.EntryPoint] = {}
    for point in metadata.entry_points(group=ENTRY_POINT_GROUP):
        if point.name in _BUILT_IN or (point.name in found and found[point.name].value != point.value):
            raise UserError(
                f"the entry point '{point.name} = {point.value}' in group {ENTRY_POINT_GROUP} takes a prefix that is "
                f"already in use; rename it in the package that declares it"
            )
        found[point.name] = point
    return found


@cache
def _load(prefix: str) -> TaskFamily:
    if prefix in _BUILT_IN:
        family: TaskFamily = import_module(_BUILT_IN[prefix]).family
        return family
    point = families()[prefix]
    try:
        family = point.load()
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"the task family '{prefix}' ({point.value}) cannot be loaded: {error}; repair the package that declares it"
        ) from error
    missing = [method for method in ("names", "describe", "make") if not callable(getattr(family, method, None))]
    if missing:
        raise UserError(
            f"the task family '{prefix}' ({point.value}) has no {missing[0]}(); see hpc_cpd.tasks.family.TaskFamily"
        )
    return family


def _family(prefix: str, task_id: str) -> TaskFamily:
    if prefix not in _BUILT_IN and prefix not in families():
        known = [*_BUILT_IN, *families()]
        raise UserError(
            f"there is no task '{task_id}'; {_hint(prefix, known)}task ids begin with one of: "
            f"{', '.join(f'{word}/' for word in known)}"
        )
    return _load(prefix)


def _split(task_id: str) -> tuple[str, str]:
    prefix, separator, name = task_id.partition("/")
    if not separator or not name:
        near = difflib.get_close_matches(task_id, _family("metaworld", task_id).names(), n=1)
        hint = f"did you mean 'metaworld/{near[0]}'?" if near else "write for example metaworld/reach-v3"
        raise UserError(f"'{task_id}' is not a task id; {hint}")
    return prefix, name


def _check_exists(task_id: str) -> None:
    prefix, name = _split(task_id)
    family = _family(prefix, task_id)
    if name not in family.names():
        family.describe(name)


def _hint(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word.lower(), [name.lower() for name in known], n=1)
    return next((f"did you mean '{name}'? " for name in known if near and name.lower() == near[0]), "")
