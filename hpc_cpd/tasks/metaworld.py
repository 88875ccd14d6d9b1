"""Meta-World v3 through its own classes, seeded properly and a little faster, to the same bits.

Source: Meta-World 3.1.1 (https://github.com/Farama-Foundation/Metaworld), benchmark arXiv 1910.10897. A goal
index counts ``metaworld.MT1(name, seed=seed).train_tasks``, or those of a region (``reach-v3@1of2``) alone. Success is
the benchmark's own flag per step.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from functools import lru_cache
from importlib import metadata
from typing import Any

import numpy as np

from hpc_cpd.errors import UserError
from hpc_cpd.tasks.family import Batch, TaskSpec
from hpc_cpd.tasks.regions import MOST_PARTS, region_of

REWARD_VERSION = "v2"
OBSERVATION_SIZE = 39
ACTION_SIZE = 4
HORIZON = 500
GOALS = 50  # of a task under one seed: metaworld._N_GOALS

# metaworld.env_dict.MT25_V3 in its order (MT10 is its first ten), then the rest of MT50_V3 in its order; written out
# because importing metaworld loads MuJoCo
NAMES = (
    "reach-v3",
    "push-v3",
    "pick-place-v3",
    "door-open-v3",
    "drawer-open-v3",
    "drawer-close-v3",
    "button-press-topdown-v3",
    "peg-insert-side-v3",
    "window-open-v3",
    "window-close-v3",
    "coffee-pull-v3",
    "pick-out-of-hole-v3",
    "disassemble-v3",
    "pick-place-wall-v3",
    "basketball-v3",
    "stick-pull-v3",
    "button-press-wall-v3",
    "faucet-open-v3",
    "door-lock-v3",
    "lever-pull-v3",
    "sweep-into-v3",
    "faucet-close-v3",
    "coffee-button-v3",
    "button-press-topdown-wall-v3",
    "dial-turn-v3",
    "assembly-v3",
    "bin-picking-v3",
    "box-close-v3",
    "button-press-v3",
    "coffee-push-v3",
    "door-close-v3",
    "door-unlock-v3",
    "hand-insert-v3",
    "hammer-v3",
    "handle-press-side-v3",
    "handle-press-v3",
    "handle-pull-side-v3",
    "handle-pull-v3",
    "plate-slide-v3",
    "plate-slide-side-v3",
    "plate-slide-back-v3",
    "plate-slide-back-side-v3",
    "peg-unplug-side-v3",
    "soccer-v3",
    "stick-push-v3",
    "push-wall-v3",
    "push-back-v3",
    "reach-wall-v3",
    "shelf-place-v3",
    "sweep-v3",
)


class MetaWorldFamily:
    """The tasks ``metaworld/...``."""

    def names(self) -> tuple[str, ...]:
        return NAMES

    def describe(self, name: str) -> TaskSpec:
        region = region_of(name)
        if region is not None:
            if region_of(region.whole) is not None:
                raise UserError(f"there is no task 'metaworld/{name}'; a part of a part is none, write a smaller one")
            whole = self.describe(region.whole)
            if not region.exists:
                raise UserError(
                    f"there is no task 'metaworld/{name}'; a part is written {region.whole}@1of2, with at most "
                    f"{MOST_PARTS} parts"
                )
            return replace(whole, task_id=f"metaworld/{name}", whole=whole.task_id)
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1)
            hint = f"did you mean 'metaworld/{near[0]}'?" if near else "'hpc-cpd tasks MT50' lists them"
            raise UserError(f"there is no task 'metaworld/{name}'; {hint}")
        return TaskSpec(f"metaworld/{name}", OBSERVATION_SIZE, ACTION_SIZE, HORIZON, REWARD_VERSION, _versions())

    def make(self, name: str, num: int, seed: int) -> Batch:
        from hpc_cpd.tasks.metaworld_batch import MetaWorldBatch, owned_cores

        region = region_of(name)
        whole = name if region is None else region.whole
        return MetaWorldBatch(whole, _goals(name, seed), num, owned_cores(), _starts(name, seed))


family = MetaWorldFamily()


@lru_cache
def _versions() -> str:
    return f"metaworld {metadata.version('metaworld')}, mujoco {metadata.version('mujoco')}"


@lru_cache(maxsize=256)
def _goals(name: str, seed: int) -> tuple[Any, ...]:
    """The train tasks of MT1, or those of a region."""
    import metaworld

    region = region_of(name)
    if region is not None:
        goals = _goals(region.whole, seed)
        return tuple(goals[index] for index in region.choose(np.array(_vectors(region.whole, seed))))
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
    from hpc_cpd.tasks.metaworld_classes import drawing_class

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
