"""What the words of a vectorized function mean: numbers are [N], vectors [k, N], constants stay as they are.

Every operation gives, row by row, the bits that upstream's gives for one environment, but for the power of a number
(NumPy squares an array by multiplying, a scalar through the C library's pow), which may differ in the last bit.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from types import SimpleNamespace
from typing import Any

import numpy as np
from metaworld.utils import reward_utils
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from hpc_cpd.tasks.metaworld.vectorize import VectorizeError

Array = NDArray[Any]


@dataclass(frozen=True)
class Deferred:
    """A costly yes or no per environment, asked only where the rest of a condition holds already."""

    where: Callable[[Any], Any]
    """bool [N], false where its argument (bool [N], or one bool for all) is"""


class Mixed:
    """Numbers of which some rows are float32 and the others Python's floats, as upstream's are.

    An action is float32, and NumPy lets a Python float give way to it; so the rows that an action went into are
    computed in float32, the others in float64. Rounding the float64 result of two float32 numbers gives the bits of
    float32 arithmetic for + - * / (a float64 has more than twice its digits).
    """

    __array_ufunc__ = None  # an array on the left leaves the operation to this class

    def __init__(self, values: Array, single: Any) -> None:
        """`values` float64 [N] or [k, N], rounded already; `single` bool [N], or True: which rows are float32."""
        self.values = values
        self.single = single

    def __getitem__(self, index: Any) -> Mixed:
        return Mixed(self.values[index], self.single)

    def apply(self, operation: Any, other: Any, swapped: bool = False) -> Any:
        values, other_single = _parts(other)
        single = self.single | other_single
        pair = (_rounded(self.values, single), _rounded(values, single))
        result = operation(*(reversed(pair) if swapped else pair))
        return result if result.dtype == np.bool_ else Mixed(_rounded(result, single), single)

    def __neg__(self) -> Mixed:
        return Mixed(-self.values, self.single)


def _rounded(values: Any, single: Any) -> Any:
    """`values` with the rows of `single` rounded to float32."""
    low = np.asarray(values, np.float32).astype(np.float64)
    return low if single is True else np.where(single, low, values)


for _word in ("add", "sub", "mul", "truediv", "lt", "le", "gt", "ge"):
    _operation = getattr(operator, _word)
    setattr(Mixed, f"__{_word}__", lambda one, other, do=_operation: one.apply(do, other))
    setattr(Mixed, f"__r{_word}__", lambda one, other, do=_operation: one.apply(do, other, True))  # no __rlt__ is asked


def _and(*sides: Any) -> Any:
    result: Any = True
    for side in sides:
        if not isinstance(side, Deferred):
            result = np.logical_and(result, side) if isinstance(side, np.ndarray) or result is not True else side
    for side in sides:
        if isinstance(side, Deferred):
            result = side.where(result)
    return result


def _or(*sides: Any) -> Any:
    return np.logical_or.reduce(np.broadcast_arrays(*sides))


def _not(side: Any) -> Any:
    return np.logical_not(side) if isinstance(side, np.ndarray) else not side


def _any(side: Any) -> bool:
    return bool(side.any()) if isinstance(side, np.ndarray) else bool(side)


def _select(mask: Any, new: Any, old: Any) -> Any:
    """`new` where `mask`, else `old`; an `old` of None was never assigned before."""
    if not isinstance(mask, np.ndarray):
        return new if mask else old
    if old is None:
        return new
    if isinstance(new, Mixed) or isinstance(old, Mixed):
        (new, new_single), (old, old_single) = _parts(new), _parts(old)
        return Mixed(np.where(mask, new, old), np.where(mask, new_single, old_single))
    return np.where(mask, new, old)


def _parts(value: Any) -> tuple[Any, Any]:
    return (value.values, value.single) if isinstance(value, Mixed) else (value, False)


def _missing(value: Any) -> Any:
    """Where the value is None; rows of a stacked attribute hold NaN for it."""
    return np.isnan(value) if isinstance(value, np.ndarray) else value is None


def _number(value: Any) -> Any:
    """A value that upstream takes as one number: [1, N] becomes [N]."""
    if isinstance(value, Deferred):
        return value.where(True)
    if isinstance(value, Mixed):
        return value.values
    return value[0] if isinstance(value, np.ndarray) and value.ndim == 2 else value


def _float(value: Any) -> Any:
    value = _number(value)
    return value.astype(np.float64) if isinstance(value, np.ndarray) else builtins.float(value)


def _bool(value: Any) -> Any:
    value = _number(value)
    return value.astype(np.bool_) if isinstance(value, np.ndarray) else value


def _extreme(better: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Python's ``max`` (``min``) for a `better` that is "greater" ("less"): of equal ones the first."""

    def best(*values: Any) -> Any:
        several = values if len(values) > 1 else values[0]
        return reduce(lambda result, value: _select(better(value, result), value, result), several)

    return best


def norm(vector: Any, ord: int = 2) -> Any:
    """Length of vectors [k, N], or of a number: the same dot product that numpy.linalg.norm takes."""
    if ord != 2:
        raise VectorizeError(f"a norm of order {ord} is not supported")
    if vector.ndim == 1:
        return np.abs(vector)
    return np.sqrt(np.vecdot(vector, vector, axis=0))  # type: ignore[call-overload]


def _vector(values: Any) -> Any:
    """``numpy.array``: numbers, each one or [N], become a vector [k, 1] or [k, N]."""
    if isinstance(values, np.ndarray):
        return values.copy()
    if any(isinstance(value, np.ndarray) for value in values):
        return np.stack(np.broadcast_arrays(*map(_number, values)))
    return np.array(values)[:, None]


def _stacked(parts: Any) -> Any:
    """``numpy.hstack``: numbers [N] and vectors [k, N] one below the other."""
    rows = [part if part.ndim == 2 else part[None] for part in parts]
    count = max(part.shape[1] for part in rows)
    return np.concatenate([np.broadcast_to(part, (len(part), count)) for part in rows])


class _NumPy(SimpleNamespace):
    """NumPy, with other meanings for the few functions that look at shapes."""

    linalg = SimpleNamespace(norm=norm)
    array = staticmethod(_vector)
    hstack = staticmethod(_stacked)
    zeros = staticmethod(lambda size: np.zeros((size, 1)))

    @staticmethod
    def clip(value: Any, low: float, high: float) -> Any:
        return Mixed(value.values.clip(low, high), value.single) if isinstance(value, Mixed) else value.clip(low, high)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def _tolerance(
    x: Any, bounds: Any = (0.0, 0.0), margin: Any = 0.0, sigmoid: Any = "gaussian", value_at_margin: float = 0.1
) -> Any:
    """``reward_utils.tolerance`` with `margin` and the bounds one number or [N] each."""
    lower, upper = bounds
    inside = np.logical_and(lower <= x, x <= upper)
    distance = np.where(x < lower, lower - x, x - upper) / margin
    outside = reward_utils._sigmoids(distance, value_at_margin, sigmoid)
    return np.where(inside, 1.0, np.where(np.equal(margin, 0), 0.0, outside))


def _hamacher_product(a: Any, b: Any) -> Any:
    product = a * b
    denominator = a + b - product
    return _select(denominator > 0, product / denominator, 0.0)


def _rect_prism_tolerance(curr: Any, zero: Any, one: Any) -> Any:
    inside = ((np.minimum(zero, one) <= curr) & (curr <= np.maximum(zero, one))).all(axis=0)
    scale = (curr - zero) / (one - zero)
    return np.where(inside, scale[0] * scale[1] * scale[2], 1.0)


@dataclass(frozen=True)
class Matrices:
    """Rotation matrices as MuJoCo has them, [9, N]."""

    values: Array

    def reshape(self, *shape: int) -> Matrices:
        return self


def _rotation(matrices: Matrices) -> SimpleNamespace:
    """scipy's ``Rotation.from_matrix``; the matrices are MuJoCo's own and need no test of orthogonality."""
    rotation = Rotation.from_matrix(matrices.values.T.reshape(-1, 3, 3), assume_valid=True)
    return SimpleNamespace(as_quat=lambda: rotation.as_quat().T)


OPERATIONS: dict[str, Any] = {
    **{operation.__name__: operation for operation in (_and, _or, _not, _any, _select, _missing, _number)},
    "float": _float,
    "bool": _bool,
    "max": _extreme(operator.gt),
    "min": _extreme(operator.lt),
    "np": _NumPy(),
    "Rotation": SimpleNamespace(from_matrix=_rotation),
    "tolerance": _tolerance,
    "reward_utils": SimpleNamespace(
        tolerance=_tolerance, hamacher_product=_hamacher_product, rect_prism_tolerance=_rect_prism_tolerance
    ),
}
"""The globals of every vectorized function."""
