"""Meta-World v3 through its own classes, seeded properly and a little faster, to the same bits.

Source: Meta-World 3.1.1 (https://github.com/Farama-Foundation/Metaworld), benchmark arXiv 1910.10897. A goal
index counts ``metaworld.MT1(name, seed=seed).train_tasks``. Success is the benchmark's own flag per step.

Parts of a task's goals are tasks of their own: ``reach-v3@2of4`` is reaching for the second quarter of its goals. So a
stream can be longer than the list of tasks, and the same skill can come back at goals it never saw.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpc_cpd import plugins
from hpc_cpd.errors import UserError
from hpc_cpd.run.cores import owned_cores
from hpc_cpd.tasks.families.base import Batch, TaskSpec

REWARD_VERSION = "v2"
HORIZON = 500
GOALS = 50  # of a task under one seed: metaworld._N_GOALS
MOST_PARTS = 25  # of 50 goals each part then has two
_REGION = re.compile(r"(?P<parent_task>.+)@(?P<number>[1-9]\d*)of(?P<parts>[1-9]\d*)")

# metaworld.env_dict.MT25_V3 in its order (MT10 is its first ten), then the rest of MT50_V3 in its order; written out
# because importing metaworld loads MuJoCo
NAMES = (
    *("reach-v3", "push-v3", "pick-place-v3", "door-open-v3", "drawer-open-v3"),
    *("drawer-close-v3", "button-press-topdown-v3", "peg-insert-side-v3", "window-open-v3", "window-close-v3"),
    *("coffee-pull-v3", "pick-out-of-hole-v3", "disassemble-v3", "pick-place-wall-v3", "basketball-v3"),
    *("stick-pull-v3", "button-press-wall-v3", "faucet-open-v3", "door-lock-v3", "lever-pull-v3"),
    *("sweep-into-v3", "faucet-close-v3", "coffee-button-v3", "button-press-topdown-wall-v3", "dial-turn-v3"),
    *("assembly-v3", "bin-picking-v3", "box-close-v3", "button-press-v3", "coffee-push-v3"),
    *("door-close-v3", "door-unlock-v3", "hand-insert-v3", "hammer-v3", "handle-press-side-v3"),
    *("handle-press-v3", "handle-pull-side-v3", "handle-pull-v3", "plate-slide-v3", "plate-slide-side-v3"),
    *("plate-slide-back-v3", "plate-slide-back-side-v3", "peg-unplug-side-v3", "soccer-v3", "stick-push-v3"),
    *("push-wall-v3", "push-back-v3", "reach-wall-v3", "shelf-place-v3", "sweep-v3"),
)


class Region(NamedTuple):
    """Part `number` (from 1) of `parts` of the goals of `parent_task`."""

    parent_task: str
    number: int
    parts: int

    def choose(self, places: NDArray[np.float64]) -> list[int]:
        """The goals of this part, int indices in increasing order; `places` float64 [goals, numbers] tells them apart.

        Goals are put in the order of the number that varies most among them, and cut into parts of equal size (of 50
        goals in 4 parts, the first two have one more). Whatever the order, every goal is in one part.
        """
        widest = int(places.std(axis=0).argmax())
        ordered = np.argsort(places[:, widest], kind="stable")
        return sorted(np.array_split(ordered, self.parts)[self.number - 1].tolist())


def region_of(name: str) -> Region | None:
    """The region that `name` asks for (it may not exist); None: a whole task."""
    found = _REGION.fullmatch(name)
    return Region(found["parent_task"], int(found["number"]), int(found["parts"])) if found else None


class MetaWorldFamily:
    """Meta-World's tasks: metaworld/NAME, or metaworld/NAME@1of2 for the first half of its goals."""

    trusted = True  # the tests hold every task against upstream's environment; making one takes a second

    def names(self) -> tuple[str, ...]:
        return NAMES

    def describe(self, name: str) -> TaskSpec:
        if region := region_of(name):
            if region_of(region.parent_task):
                raise UserError(f"there is no task 'metaworld/{name}'; a part of a part is none, write a smaller one")
            parent = self.describe(region.parent_task)
            if not region.number <= region.parts <= MOST_PARTS:
                raise UserError(
                    f"there is no task 'metaworld/{name}'; a part is written {region.parent_task}@1of2, with at most "
                    f"{MOST_PARTS} parts"
                )
            return replace(parent, task_id=f"metaworld/{name}", parent_task=parent.task_id)
        if name not in NAMES:
            hint = plugins.hint(name, NAMES, "metaworld/").strip() or "'hpc-cpd tasks MT50' lists them"
            raise UserError(f"there is no task 'metaworld/{name}'; {hint}")
        from gymnasium.spaces import Box

        observations, actions = Box(-np.inf, np.inf, (39,)), Box(-1.0, 1.0, (4,))
        return TaskSpec(f"metaworld/{name}", observations, actions, HORIZON, REWARD_VERSION, _versions())

    def make(self, name: str, num: int, seed: int) -> Batch:
        from hpc_cpd.tasks.metaworld.batch import MetaWorldBatch

        task = name.partition("@")[0]
        return MetaWorldBatch(task, _goals(name, seed), num, owned_cores(), _starts(name, seed))


plugin = MetaWorldFamily()


@lru_cache
def _versions() -> str:
    return f"metaworld {metadata.version('metaworld')}, mujoco {metadata.version('mujoco')}"


@lru_cache(maxsize=256)
def _goals(name: str, seed: int) -> tuple[Any, ...]:
    """The train tasks of MT1, or those of a region."""
    import metaworld

    if region := region_of(name):
        goals = _goals(region.parent_task, seed)
        return tuple(goals[index] for index in region.choose(np.array(_vectors(region.parent_task, seed))))
    stock = metaworld.env_dict.ALL_V3_ENVIRONMENTS[name]
    return tuple(
        metaworld._encode_task(name, {"rand_vec": vector, "env_cls": stock, **metaworld._MT_OVERRIDE})
        for vector in _vectors(name, seed)
    )


@lru_cache(maxsize=64)
def _starts(name: str, seed: int) -> dict[int, Any]:
    """The first states that batches of these goals have met: 50 steps of physics each, some kilobytes to keep."""
    return {}


@lru_cache(maxsize=256)
def _vectors(name: str, seed: int) -> tuple[np.ndarray, ...]:
    """The random vectors of MT1's 50 train tasks, float64: places of the object and of its target.

    Drawn as ``metaworld._make_tasks`` draws them, by 50 resets, but without the physics of a reset: the vectors do not
    depend on it.
    """
    from hpc_cpd.tasks.metaworld.classes import drawing_class

    state = np.random.get_state()  # upstream draws from the global generator
    try:
        np.random.seed(seed)
        environment = drawing_class(name)()
        environment._freeze_rand_vec = False
        environment._set_task_called = True
        vectors = []
        for _ in range(GOALS):
            environment.reset()
            vectors.append(environment._last_rand_vec)
    finally:
        np.random.set_state(state)
    environment.close()
    return tuple(vectors)
