"""Task ids, sets, stages, and families that other packages bring."""

import subprocess
import sys
import textwrap
from itertools import chain

import pytest

from hpc_cpd import plugins
from hpc_cpd.errors import UserError
from hpc_cpd.settings import StreamSettings
from hpc_cpd.tasks.registry import describe, make_batch, resolve_tasks, stage_plan, task_set

FAMILY = """
import numpy as np
from gymnasium.spaces import Box
from hpc_cpd.errors import UserError
from hpc_cpd.tasks import Step, TaskSpec

class Line:
    num_goals = 2
    def reset(self, goal_index):
        self.place = float(goal_index)
        return np.array([self.place])
    def step(self, action):
        self.place += float(action[0])
        return Step(np.array([self.place]), -abs(self.place), False, False, abs(self.place) < 0.1)
    def close(self):
        pass

class Family:
    def names(self):
        return ["line"]
    def describe(self, name):
        if name != "line":
            raise UserError(f"there is no task 'mylab/{name}'")
        return TaskSpec("mylab/line", Box(-9, 9, (1,)), Box(-1, 1, (1,)), 3, "1", "mylab 0.1")
    def make(self, name, num, seed):
        return [Line() for _ in range(num)]

family = Family()
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a package with entry points on the path, as pip would."""

    def add(entry_points, module=FAMILY, package="mylab", group="hpc_cpd.tasks"):
        (tmp_path / f"{package}.py").write_text(module)
        info = tmp_path / f"{package}-0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{entry_points}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, package, raising=False)
        forget()

    def forget():
        plugins.installed.cache_clear()
        plugins.load.cache_clear()

    yield add
    forget()


def test_the_sets_are_nested():
    ten, twenty_five, fifty = (task_set(name) for name in ("MT10", "MT25", "MT50"))
    assert (len(ten), len(twenty_five), len(fifty)) == (10, 25, 50)
    assert fifty[:25] == twenty_five and twenty_five[:10] == ten
    assert len(set(fifty)) == 50
    assert ten[0] == "metaworld/reach-v3"


def test_tasks_resolve_from_a_set_an_id_or_a_list():
    assert resolve_tasks("MT10") == task_set("MT10")
    assert resolve_tasks("metaworld/push-v3") == ["metaworld/push-v3"]
    mixed = ["gymnasium/Pendulum-v1", "metaworld/push-v3"]
    assert resolve_tasks(mixed) == mixed


@pytest.mark.parametrize(
    ("tasks", "sentence"),
    [
        ("MT11", "there is no task set 'MT11'; did you mean 'MT10'"),
        ("mt25", "did you mean 'MT25'"),
        (["metaworld/reach-v2"], "did you mean 'metaworld/reach-v3'"),
        (["reach-v3"], "did you mean 'metaworld/reach-v3'"),
        (["MT10"], "'MT10' is not a task id"),
        (["metaword/reach-v3"], "did you mean 'metaworld'"),
        (["metaworld/push-v3", "metaworld/reach-v3", "metaworld/push-v3"], "'metaworld/push-v3' is listed twice"),
        ([], "the list of tasks is empty"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(tasks, sentence):
    with pytest.raises(UserError) as caught:
        resolve_tasks(tasks)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_stages_keep_the_order_and_the_last_may_be_smaller():
    stages = stage_plan(StreamSettings(tasks="MT10", tasks_per_stage=4))
    assert [len(stage) for stage in stages] == [4, 4, 2]
    assert list(chain(*stages)) == task_set("MT10")


def test_order_seed_shuffles_reproducibly():
    plans = [stage_plan(StreamSettings(tasks="MT10", tasks_per_stage=5, order_seed=seed)) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]
    shuffled = list(chain(*plans[0]))
    assert shuffled != task_set("MT10") and sorted(shuffled) == sorted(task_set("MT10"))


def test_naming_tasks_imports_no_simulator():
    code = """
    import sys
    import hpc_cpd
    from hpc_cpd.settings import StreamSettings
    from hpc_cpd.tasks.registry import describe, resolve_tasks, stage_plan
    resolve_tasks("MT50")
    stage_plan(StreamSettings(tasks="MT25"))
    describe("metaworld/reach-v3")
    print([name for name in ("mujoco", "metaworld", "torch") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_installed_package_adds_a_family(install):
    install("mylab = mylab:family")
    assert resolve_tasks(["mylab/line", "metaworld/reach-v3"]) == ["mylab/line", "metaworld/reach-v3"]
    assert describe("mylab/line").horizon == 3
    batch = make_batch("mylab/line", 2, seed=0)
    observations, _ = batch.reset(options={"goal_index": [0, 1]})
    assert observations.tolist() == [[0.0], [1.0]]
    _, rewards, _, _, info = batch.step([[0.5], [-1.0]])
    assert rewards.tolist() == [-0.5, 0.0] and info["success"].tolist() == [False, True]
    batch.step([[0.0], [0.0]])
    *_, truncated, _ = batch.step([[0.0], [0.0]])
    assert truncated.all()
    with pytest.raises(UserError, match="there is no task 'mylab/circle'"):
        resolve_tasks(["mylab/circle"])


def test_a_family_that_cannot_be_loaded_is_named(install):
    install("mylab = mylab:absent")
    with pytest.raises(UserError, match=r"the task family 'mylab' \(mylab:absent\) cannot be loaded"):
        describe("mylab/line")


def test_a_family_that_lacks_a_method_is_named(install):
    install("mylab = mylab:Line")
    with pytest.raises(UserError, match=r"has no names; see docs/extending/tasks\.md"):
        describe("mylab/line")


PULLS = """
from typing import Literal
from hpc_cpd.methods.base import Method, MethodSettings
class L1PullSettings(MethodSettings):
    name: Literal["l1pull"] = "l1pull"
class L1Pull(Method):
    Settings = L1PullSettings
class Bare(Method):
    pass
"""


@pytest.mark.parametrize(("where", "said"), [("L1Pull", "names itself 'l1pull'"), ("Bare", "has no name of its own")])
def test_a_plug_in_whose_settings_have_another_name_is_refused(install, where, said):
    install(f"l1_pull = pulls:{where}", PULLS, "pulls", "hpc_cpd.methods")
    with pytest.raises(UserError) as caught:
        plugins.load("methods", "l1_pull")
    assert str(caught.value) == (
        f"the plug-in 'l1_pull' (pulls:{where}) {said} in its Settings; both names must be the same"
    )


def test_a_prefix_that_is_taken_is_refused(install):
    install("metaworld = mylab:family")
    with pytest.raises(UserError, match="already in use"):
        describe("other/task")
