"""Upstream's observation, reward and success of one task, vectorized: the same code for N environments at once.

`Rows` is the ``self`` of the vectorized methods. It offers the part of an environment that they look at: attributes
that a reset sets (one row each), MuJoCo's data by name, and the methods that they call.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache, partialmethod
from types import FunctionType
from typing import Any

import metaworld
import numpy as np
from numpy.typing import NDArray

from hpc_cpd.tasks.metaworld.vector_ops import OPERATIONS, Deferred, Matrices
from hpc_cpd.tasks.metaworld.vectorize import VectorizeError, vectorize

_ROOTS = ("evaluate_state", "_get_pos_objects", "_get_quat_objects")
REWARD_VERSION = "v2"


class Rows:
    """N environments of one task as upstream's methods see them. Vectors are [k, N], numbers [N]."""

    attributes: frozenset[str] = frozenset()
    """What the vectorized methods read that a reset may set."""

    def __init__(self, datas: Sequence[Any], object_geom: int | None) -> None:
        """`datas`: the MjData of each row; `object_geom`: what ``touching_main_object`` is about."""
        self.data = _Data(datas)
        self._object_geom = object_geom

    def get_body_com(self, name: str) -> Any:
        return self.data.body(name).xpos

    @property
    def touching_main_object(self) -> Deferred:
        return Deferred(self._touching)

    def _touching(self, needed: Any) -> NDArray[np.bool_]:
        rows = np.arange(len(self.data.datas))
        result = np.zeros(len(rows), np.bool_)
        for row in rows[np.broadcast_to(needed, rows.shape)]:
            result[row] = _touching(self.data.datas[row], self._object_geom)
        return result


def _touching(data: Any, geom: Any) -> bool:
    """``SawyerXYZEnv.touching_object`` on arrays; upstream loops over contact objects in Python, twice."""
    pairs = data.contact.geom
    with_object = (pairs == geom).any(axis=1)
    for pad in ("leftpad_geom", "rightpad_geom"):
        touching = with_object & (pairs == data.geom(pad).id).any(axis=1)
        # summed one by one in contact order, as upstream does: another order gives other bits
        if not sum(data.efc_force[address] for address in data.contact.efc_address[touching]) > 0:
            return False
    return True


class _Data:
    """MuJoCo's data of all rows, by name; read once per step, when something asks."""

    def __init__(self, datas: Sequence[Any]) -> None:
        self.datas = datas
        self.step = 0
        self._found: dict[tuple[str, str], _Item] = {}

    def _item(self, kind: str, name: str) -> _Item:
        item = self._found.get((kind, name))
        if item is None:
            item = self._found[kind, name] = _Item(self, [getattr(data, kind)(name) for data in self.datas])
        return item

    body = partialmethod(_item, "body")
    site = partialmethod(_item, "site")
    geom = partialmethod(_item, "geom")
    joint = partialmethod(_item, "joint")


class _Item:
    """One named thing in every row's data."""

    def __init__(self, data: _Data, items: Sequence[Any]) -> None:
        self._data = data
        self._items = items
        self._views: dict[str, list[NDArray[np.float64]]] = {}
        self._read: dict[str, tuple[int, Any]] = {}

    def __getattr__(self, field: str) -> Any:
        step, value = self._read.get(field, (-1, None))
        if step != self._data.step:
            if field not in self._views:
                self._views[field] = [getattr(item, field).reshape(-1) for item in self._items]
            value = np.concatenate(self._views[field]).reshape(len(self._items), -1).T
            value = Matrices(value) if field == "xmat" else value
            self._read[field] = (self._data.step, value)
        return value


@cache
def rows_class(name: str) -> type[Rows]:
    """The class of `Rows` for the task `name`, such as ``reach-v3``.

    Raises VectorizeError when upstream's code uses what cannot be vectorized.
    """
    stock = metaworld.env_dict.ALL_V3_ENVIRONMENTS[name]
    names = dict(OPERATIONS)
    members: dict[str, Any] = {}
    read: set[str] = set()
    waiting = list(_ROOTS)
    while waiting:
        word = waiting.pop()
        if word in members:
            continue
        member = inspect.getattr_static(stock, word)
        function = _function(member)
        if function is None:
            raise VectorizeError(f"{stock.__name__}.{word} is no method of Meta-World's")
        vectorized = vectorize(function, names, {"self.reward_function_version": repr(REWARD_VERSION)})
        members[word] = type(member)(vectorized) if isinstance(member, property | staticmethod) else vectorized
        for used in vectorized.__code__.co_names:
            if not hasattr(Rows, used) and _function(inspect.getattr_static(stock, used, None)) is not None:
                waiting.append(used)
            else:
                read.add(used)
    constants = {word: getattr(stock, word) for word in read if isinstance(getattr(stock, word, None), int | float)}
    attributes = frozenset(read - set(members) - {"data"})
    made = type(stock.__name__, (Rows,), constants | members | {"attributes": attributes})
    for member in members.values():
        # methods name their own class: SawyerDoorEnvV3._reward_pos(obs, theta)
        _unwrapped(member).__globals__[stock.__name__] = made
    return made


def _function(member: Any) -> FunctionType | None:
    """The plain function behind a method, static method, property or upstream's decorator; None: it is none."""
    member = _unwrapped(member)
    if not inspect.isfunction(member) or not (member.__module__ or "").startswith("metaworld"):
        return None
    if member.__name__ == "inner":  # assert_task_is_set keeps the method in its closure
        member = next(cell.cell_contents for cell in member.__closure__ or () if inspect.isfunction(cell.cell_contents))
    return member


def _unwrapped(member: Any) -> Any:
    if isinstance(member, property):
        return member.fget
    return member.__func__ if isinstance(member, staticmethod) else member
