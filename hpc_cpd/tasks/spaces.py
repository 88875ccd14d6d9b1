"""Spaces of observations and actions: which are known, and arrays that hold their elements.

An element of a Dict is a dict of arrays by key; of every other space it is one array. Importing this module does not
import Gymnasium.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from gymnasium import Space

Data = NDArray[Any] | dict[str, Any]
"""An element of a space, or one per row of a batch: an array [N, ...], or such a one per key."""


def shown(space: Space[Any]) -> str:
    """`space` in a few words, such as ``Box [84, 84, 3] uint8`` or ``Discrete(4)``."""
    from gymnasium.spaces import Box, Dict

    if isinstance(space, Dict):
        return "Dict " + ", ".join(f"{key}: {shown(part)}" for key, part in space.items())
    return f"Box {list(space.shape)} {space.dtype}" if isinstance(space, Box) else str(space)


def space_problem(space: Space[Any], action: bool = False) -> str | None:
    """Why elements of `space` cannot be passed in batches; None: they can. `action`: they are what a task is told."""
    from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete

    if isinstance(space, Dict):
        return next((problem for part in space.values() if (problem := space_problem(part, action))), None)
    if not isinstance(space, Box | Discrete | MultiDiscrete):
        return f"{space} is none of Box, Discrete, MultiDiscrete and Dict"
    if action and isinstance(space, Box) and space.dtype.kind == "f" and space != Box(-1.0, 1.0, space.shape):
        return f"the actions {shown(space)} are not float32 with the bounds -1 and 1; scale them inside the family"
    return None


def mapped(function: Callable[..., Any], first: Data, *others: Any) -> Any:
    """`function` of an array, or of the arrays under each key of dicts with the same keys."""
    if isinstance(first, dict):
        return {key: mapped(function, value, *(other[key] for other in others)) for key, value in first.items()}
    return function(first, *others)


def stack(elements: Sequence[Any]) -> Any:
    """One element per row: [N, ...]."""
    if isinstance(elements[0], dict):
        return {key: stack([element[key] for element in elements]) for key in elements[0]}
    if isinstance(elements[0], tuple):
        raise TypeError("an observation must be an array, or a dict of arrays, not a tuple")
    return np.array(elements)


def write_rows(data: Data, rows: NDArray[np.int64], new: Data) -> None:
    """Put `new` into `rows` of a batch."""
    mapped(lambda values, others: operator.setitem(values, rows, others), data, new)


def checked_actions(space: Any, actions: Any, active: NDArray[np.bool_], task_id: str) -> Any:
    """`actions` of N environments as the simulators get them: floats clipped to [-1, 1], everything else int64.

    Raises ValueError: another shape, or numbers of an `active` (bool [N]) environment that are no actions.
    """
    from gymnasium.spaces import Box, Dict, Discrete

    if isinstance(space, Dict):
        if not isinstance(actions, dict) or actions.keys() != space.keys():
            raise ValueError(f"actions must be a dict with the keys {', '.join(space)}")
        return {key: checked_actions(part, actions[key], active, task_id) for key, part in space.items()}
    floats = isinstance(space, Box) and space.dtype.kind == "f"
    array = np.asarray(actions, np.float32 if floats else None)
    if array.shape != (len(active), *space.shape):
        raise ValueError(f"actions must be {[len(active), *space.shape]}, but are {array.shape}")
    if floats:
        # MuJoCo answers a NaN by silently restarting the simulation
        if not np.isfinite(array[active]).all():
            raise ValueError(f"an action for {task_id} is not finite")
        return np.clip(array, -1.0, 1.0)
    if array.dtype.kind not in "iu":
        raise ValueError(f"actions for {task_id} must be integers, but are {array.dtype}")
    if isinstance(space, Box):
        low, high = space.low, space.high
    else:
        low, high = space.start, space.start + (space.n if isinstance(space, Discrete) else space.nvec) - 1
    if ((array < low) | (array > high))[active].any():
        raise ValueError(f"an action for {task_id} is not in {shown(space)}")
    return array.astype(space.dtype)
