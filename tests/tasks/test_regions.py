"""A part of a task's goals is a task."""

from itertools import chain, pairwise

import numpy as np
import pytest

from hpc_cpd.errors import UserError
from hpc_cpd.tasks.families.metaworld import Region
from hpc_cpd.tasks.families.metaworld import plugin as family
from hpc_cpd.tasks.registry import describe, make_batch, resolve_tasks, task_set

SEED = 3


def goals(name):
    return [task.data for task in family.make(name, 1, SEED)._goals]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["reach-v3", "stick-pull-v3"])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_the_parts_share_out_all_goals(name, parts):
    shared_out = [goals(f"{name}@{number}of{parts}") for number in range(1, parts + 1)]
    assert sorted(chain.from_iterable(shared_out)) == sorted(goals(name))
    assert max(map(len, shared_out)) - min(map(len, shared_out)) <= 1


def test_parts_lie_behind_one_another_along_the_number_that_varies_most():
    places = np.random.default_rng(0).normal(size=(50, 3)) * [1.0, 5.0, 0.0]
    parts = [places[Region("any", number, 4).choose(places), 1] for number in range(1, 5)]
    assert all(one.max() < other.min() for one, other in pairwise(parts))


def test_a_goal_is_the_same_in_its_part_and_in_the_whole():
    index = goals("drawer-open-v3").index(goals("drawer-open-v3@2of2")[4])
    part, whole = (make_batch(f"metaworld/{name}", 1, SEED) for name in ("drawer-open-v3@2of2", "drawer-open-v3"))
    assert part.num_goals == 25
    first = [envs.reset(options={"goal_index": [goal]})[0] for envs, goal in ((part, 4), (whole, index))]
    second = [envs.step(np.full((1, 4), 0.5, np.float32))[0] for envs in (part, whole)]
    assert np.array_equal(*first) and np.array_equal(*second)


def test_a_part_is_described_as_the_whole_under_its_own_name():
    part, whole = describe("metaworld/reach-v3@2of4"), describe("metaworld/reach-v3")
    assert (part.task_id, part.skill) == ("metaworld/reach-v3@2of4", "metaworld/reach-v3")
    assert part.reward_version == whole.reward_version and whole.skill == whole.task_id


def test_a_split_set_brings_all_first_parts_before_any_second():
    hundred = task_set("MT50x2")
    assert hundred[:50] == [f"{task}@1of2" for task in task_set("MT50")]
    assert hundred[50:] == [f"{task}@2of2" for task in task_set("MT50")]
    assert resolve_tasks("MT50x2") == hundred


@pytest.mark.parametrize(
    "tasks, told",
    [
        ("MT50x0", "no task set 'MT50x0'; did you mean 'MT50'"),
        ("MT50xtwo", "no task set 'MT50xtwo'"),
        ("MT10x26", "at most 25 parts"),
        ("metaworld/reach-v3@3of2", "no task 'metaworld/reach-v3@3of2'; a part is written reach-v3@1of2"),
        ("metaworld/reech-v3@1of2", "did you mean 'metaworld/reach-v3'"),
        ("metaworld/reach-v3@1of2@1of2", "a part of a part"),
        ("metaworld/reach-v3@1", "no task 'metaworld/reach-v3@1'"),
    ],
)
def test_a_part_that_cannot_be_is_refused(tasks, told):
    with pytest.raises(UserError, match=told):
        resolve_tasks(tasks)
