"""Meta-World's task classes, computing the same bits in less time.

Each class is a subclass of the task's own; what is overridden here avoids work whose result is not used or builds the
same numbers without Python loops. A test compares every bit with the stock classes. Physics, reward and success are
upstream's own code.
"""

from __future__ import annotations

import copy
import math
import types
from functools import cache, lru_cache
from typing import Any

import metaworld
import mujoco
import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation


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

    return type(
        stock.__name__,
        (stock,),
        {
            "reset": reset,
            "_reset_hand": reset_hand,
            "_initialize_simulation": _initialize_simulation,
            "_get_curr_obs_combined_no_goal": _current_observation,
            "_get_quat_objects": _with_rotation(stock._get_quat_objects),
            "touching_object": _touching_object,
        },
    )


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


def _current_observation(environment: Any) -> NDArray[np.float64]:
    """``SawyerXYZEnv._get_curr_obs_combined_no_goal`` without splitting and stacking: hand, gripper, objects [18]."""
    data = environment.data
    observation = np.zeros(18)
    observation[:3] = data.body("hand").xpos
    gap = data.body("rightclaw").xpos - data.body("leftclaw").xpos
    observation[3] = min(max(math.sqrt(gap.dot(gap)) / 0.1, 0.0), 1.0)
    positions, quaternions = environment._get_pos_objects(), environment._get_quat_objects()
    for index in range(len(positions) // 3):
        start = 4 + 7 * index
        observation[start : start + 3] = positions[3 * index : 3 * index + 3]
        observation[start + 3 : start + 7] = quaternions[4 * index : 4 * index + 4]
    return observation


def _touching_object(environment: Any, object_geom_id: int) -> bool:
    """``SawyerXYZEnv.touching_object`` on arrays; upstream loops over contact objects in Python, twice."""
    data = environment.data
    pairs = data.contact.geom
    with_object = (pairs == object_geom_id).any(axis=1)
    for pad in ("leftpad_geom", "rightpad_geom"):
        touching = with_object & (pairs == data.geom(pad).id).any(axis=1)
        # summed one by one in contact order, as upstream does: another order gives other bits
        force = sum(data.efc_force[address] for address in data.contact.efc_address[touching])
        if not force > 0:
            return False
    return True


class _ValidRotation:
    """Stands for scipy's ``Rotation`` where the matrix is MuJoCo's own, and so needs no test of orthogonality."""

    @staticmethod
    def from_matrix(matrix: Any) -> Rotation:
        return Rotation.from_matrix(matrix, assume_valid=True)


def _with_rotation(method: Any) -> Any:
    """`method` itself, in whose module the name ``Rotation`` means :class:`_ValidRotation`; upstream stays as it is."""
    names = {**method.__globals__, "Rotation": _ValidRotation}
    return types.FunctionType(method.__code__, names, method.__name__, method.__defaults__, method.__closure__)
