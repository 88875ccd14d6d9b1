"""A vectorized function gives, row by row, what the function itself gives for one environment."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from metaworld.utils import reward_utils

from hpc_cpd.tasks.metaworld.vector_ops import OPERATIONS, Deferred, Mixed
from hpc_cpd.tasks.metaworld.vectorize import VectorizeError, vectorize

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # both sides of a branch are computed
ROWS = 7
numbers = st.floats(-2.0, 2.0, allow_subnormal=False)
columns = st.lists(numbers, min_size=ROWS, max_size=ROWS).map(np.array)


def same(function, *rows, **changed):
    """Compare with one call per row; vectors are [k, N]."""
    many = vectorize(function, OPERATIONS, {})(*rows, **changed)
    for index in range(ROWS):
        one = function(*(row[..., index] for row in rows), **changed)
        pairs = zip(one, many, strict=True) if isinstance(one, tuple) else [(one, many)]
        for expected, found in pairs:
            assert np.array_equal(expected, np.broadcast_to(found, (ROWS,))[index])


def branches(a, b):
    low: float = 0.0
    if a > 0 and b > 0:
        low = a * b
        if a > b:
            low += 1.0
            new = a
        else:
            new = b
    elif a < -1:
        low = -a
        new = 2.0
    else:
        new = 3.0
    return low, new, 1.0 if 0 < a <= 1 else b, not (a > 0 or b > 0)


@given(columns, columns)
def test_branches_conditions_and_chains(a, b):
    same(branches, a, b)


def vectors(v, w):
    scale = np.array([1.0, 2.0, 2.0])
    moved = v.copy()
    if abs(v[0] - w[0]) < 0.5:
        moved[0] = w[0]
    length = float(np.linalg.norm((moved - w) * scale))
    both = np.array([v[0], w[1], 0.0])
    return length, np.linalg.norm(both[:2]), min([max(0.0, x) for x in (v[1], w[1])])


@given(st.lists(columns, min_size=3, max_size=3), st.lists(columns, min_size=3, max_size=3))
def test_vectors_of_three(v, w):
    same(vectors, np.array(v).T.copy().T, np.array(w).T.copy().T)


def rewards(x, margin):
    near = reward_utils.tolerance(x, bounds=(0, 0.5), margin=margin, sigmoid="long_tail")
    soft = reward_utils.tolerance(abs(x), bounds=(0.1, 0.2), margin=0.3, sigmoid="gaussian")
    return near, soft, reward_utils.hamacher_product(near, soft)


@given(columns, st.lists(st.floats(0.0, 1.0), min_size=ROWS, max_size=ROWS).map(np.array))
def test_the_reward_functions(x, margin):
    many = vectorize(rewards, OPERATIONS, {})(x, margin)
    for index in range(ROWS):
        # one square: the array's is a product, the number's a power
        np.testing.assert_allclose([part[index] for part in many], rewards(x[index], margin[index]), rtol=1e-14)


def gripping(action, caging):
    closed = min(max(0, action), 0.7) / 0.7
    used = closed if caging > 0.97 else 0.0
    product = caging * used
    return (product / (caging + used - product) + caging) / 2 if product > 0 else 0.25 - product


@given(columns, st.lists(st.floats(0.9, 1.0), min_size=ROWS, max_size=ROWS))
def test_float32_and_python_numbers_mix_as_numpy_mixes_them(action, caging):
    """NumPy computes in float32 in the rows that an action went into, in float64 in the others."""
    single = action.astype(np.float32)
    with np.errstate(all="ignore"):
        many = vectorize(gripping, OPERATIONS, {})(Mixed(single.astype(np.float64), True), np.array(caging))
    for index in range(ROWS):
        assert many.values[index] == gripping(single[index], caging[index])


def first_seen(self, value):
    if self.first is None:
        self.first = value
    return self.first


def test_none_is_asked_of_every_row_and_an_attribute_set_in_some():
    rows = SimpleNamespace(first=np.array([np.nan, 5.0]))
    assert vectorize(first_seen, OPERATIONS, {})(rows, np.array([1.0, 2.0])).tolist() == [1.0, 5.0]
    assert rows.first.tolist() == [1.0, 5.0]


def test_a_costly_question_is_asked_only_where_the_rest_holds():
    asked = []

    def ask(needed):
        asked.append(needed.tolist())
        return needed

    def both(costly, cheap):
        return float(costly and cheap > 0)

    assert vectorize(both, OPERATIONS, {})(Deferred(ask), np.array([1.0, -1.0])).tolist() == [1.0, 0.0]
    assert asked == [[True, False]]


def test_a_branch_on_a_known_setting_is_resolved_beforehand():
    def versions(self, x):
        if self.version == "v2":
            return x
        else:
            while True:
                return -x

    vectorized = vectorize(versions, OPERATIONS, {"self.version": "'v2'"})
    assert vectorized(None, np.ones(2)).tolist() == [1.0, 1.0]


def looping(x):
    for _ in range(3):
        x = x + 1
    return x


def returning(x):
    if x > 0:
        return x
    return -x


def unpacking(x):
    a = b = x
    if x > 0:
        a, b = b, x
    return a


@pytest.mark.parametrize("function", [looping, returning, unpacking, len])
def test_what_has_no_meaning_for_many_is_refused_when_it_is_lifted(function):
    with pytest.raises(VectorizeError):
        vectorize(function, OPERATIONS, {})
