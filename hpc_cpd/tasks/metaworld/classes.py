"""Meta-World's task classes, resetting to the same bits in less time.

Each class is a subclass of the task's own; what is overridden here avoids work whose result is not used.
"""

from __future__ import annotations

import copy
from functools import cache, lru_cache
from typing import Any

import metaworld
import mujoco


@cache
def environment_class(name: str) -> Any:
    """The subclass for the task `name`, such as ``reach-v3``."""
    stock = metaworld.env_dict.ALL_V3_ENVIRONMENTS[name]

    def reset(environment: Any, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        environment._rehearsing = True
        return stock.reset(environment, seed, options)

    def reset_hand(environment: Any, steps: int = 50) -> None:
        # upstream resets the model twice and throws the first simulation away: of the first pass only the places of
        # bodies and sites in the model remain, and they come from the task. So its 50 steps are not simulated
        if environment._rehearsing:
            environment._rehearsing, steps = False, 0
        stock._reset_hand(environment, steps)

    members = {"reset": reset, "_reset_hand": reset_hand, "_initialize_simulation": _initialize_simulation}
    return type(stock.__name__, (stock,), members)


@cache
def drawing_class(name: str) -> Any:
    """The subclass that draws goals for the task `name`: its resets simulate nothing."""

    def reset_hand(environment: Any, steps: int = 50) -> None:
        mujoco.mj_forward(environment.model, environment.data)  # upstream reads rotations next
        environment.init_tcp = environment.tcp_center

    stock = environment_class(name)
    return type(stock.__name__, (stock,), {"_reset_hand": reset_hand})


def _initialize_simulation(environment: Any) -> tuple[Any, Any]:
    # the compiled model is copied (12 ms) instead of compiled again for each environment (110 ms)
    model = copy.deepcopy(_compiled_model(environment.fullpath, environment.width, environment.height))
    return model, mujoco.MjData(model)


@lru_cache(maxsize=2)
def _compiled_model(path: str, width: int, height: int) -> Any:
    """The model as upstream compiles it; never simulated itself, and only a few are kept: one takes 21 MB."""
    model = mujoco.MjModel.from_xml_path(path)
    model.vis.global_.offwidth = max(model.vis.global_.offwidth, width)
    model.vis.global_.offheight = max(model.vis.global_.offheight, height)
    return model
