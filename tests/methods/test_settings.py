"""What a config says about the method, and what every built-in method is ready for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_cpd import plugins
from hpc_cpd.config import config_as_yaml, load_config
from hpc_cpd.distill.validation import check_settings
from hpc_cpd.errors import UserError
from hpc_cpd.methods.base import method_of, phases_of
from hpc_cpd.methods.ewc import EWCSettings
from hpc_cpd.methods.ours import OurSettings
from hpc_cpd.methods.paper import PaperSettings
from hpc_cpd.run.paths import Run
from hpc_cpd.settings import Config
from tests.examples.installed import install_here

NAMES = plugins.built_in("methods")

READ_ALL = f"""
import json, sys
from hpc_cpd.config import load_config
from hpc_cpd.distill.validation import check_settings
loaded = {{}}
for name in {NAMES!r}:
    check_settings(load_config(None, [f"method={{name}}"]), [["a"]])
    loaded[name] = "torch" in sys.modules
print(json.dumps(loaded))
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, bool]:
    """For each method, whether torch was imported when its settings, or those of one before it, had been checked."""
    done = subprocess.run([sys.executable, "-c", READ_ALL], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("name", NAMES)
def test_reading_the_settings_of_a_method_imports_no_torch(loaded: dict[str, bool], name: str) -> None:
    assert not loaded[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_method_with_all_defaults_is_ready_for_a_stream(name: str) -> None:
    config = load_config(None, [f"method={name}"])
    plan = [["a", "b"]] if name == "joint" else [["a"], ["b"]]
    check_settings(config, plan)
    method = method_of(config)
    assert config.method.name == method.settings.name == name
    assert isinstance(config.method, method.Settings)
    for number in range(1, len(plan) + 1):
        phases = phases_of(method, number)
        assert [phase.number for phase in phases] == sorted({phase.number for phase in phases})
        assert all(phase.steps > 0 for phase in phases)


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_of_a_method_is_described(name: str) -> None:
    for key, field in plugins.load("methods", name).Settings.model_fields.items():
        group = getattr(field.annotation, "__doc__", None)  # a group of settings says it in its docstring
        assert key == "name" or field.description or group, f"method.{key}"


def test_our_method_is_the_default() -> None:
    assert load_config(None) == load_config(None, ["method=ours"]) == Config()
    assert load_config(None).method == OurSettings()


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("method: ewc", ["method.coefficient=10"]),
        ("method: {name: ewc, coefficient: 10}", []),
        ("method: {name: ewc, coefficient: 3}", ["method.coefficient=10"]),
        ("method:\n  name: ewc\n  coefficient: 10", []),
        ("method: ours", ["method={name: ewc, coefficient: 10}"]),
        ("method: {replay_fraction: 0.3}", ["method=ewc", "method.coefficient=10"]),  # another method's settings go
        ("seed: 0", ["method=ewc", "method.coefficient=10"]),
    ],
)
def test_every_way_of_saying_a_method_means_the_same(file: str, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(file + "\n")
    assert load_config(path, words).method == EWCSettings(coefficient=10.0)


def test_settings_without_a_name_are_those_of_our_method() -> None:
    assert load_config(None, ["method.growth.initial_gate_bias=-3"]).method.model_dump() == {
        **OurSettings().model_dump(),
        "growth": {**OurSettings().model_dump()["growth"], "initial_gate_bias": -3.0},
    }


@pytest.mark.parametrize("file", [True, False])
def test_what_a_method_sets_elsewhere_gives_way_to_what_a_user_says(file: bool, tmp_path: Path) -> None:
    preset = load_config(None, ["method=paper"])
    assert not preset.student.experts_see_observation
    assert Config().student.experts_see_observation
    words = ["method=paper", "student.experts_see_observation=true", "method.memory.budget_fraction=0.2"]
    path = None
    if file:
        path, words = tmp_path / "config.yaml", words[:1]
        path.write_text("method: {memory: {budget_fraction: 0.2}}\nstudent: {experts_see_observation: true}\n")
        words = ["method.name=paper"]
    said = load_config(path, words)
    assert said.student.experts_see_observation
    assert said.method.model_dump() == {
        **PaperSettings().model_dump(),
        "memory": {**PaperSettings().model_dump()["memory"], "budget_fraction": 0.2},
    }
    assert said.student.width == Config().student.width


def test_a_preset_of_joint_training_is_one_stage_unless_somebody_cuts_it() -> None:
    assert load_config(None, ["method=joint"]).stream.tasks_per_stage == 0
    cut = load_config(None, ["method=joint", "stream.tasks_per_stage=5"])
    with pytest.raises(UserError, match=r"joint learns all tasks in one stage.*set stream\.tasks_per_stage=0"):
        check_settings(cut, [["a"], ["b"]])


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("method=ewd", r"method: there is no method 'ewd'; did you mean 'ewc'\? known: .*ours"),
        ("method=better", r"method: there is no method 'better'; known: a_gem, .*ours"),
        ("method={name: ewc, coeficient: 1}", r"unknown setting 'method\.coeficient'; did you mean 'method\.coeff"),
        (
            "method={name: ewc, memory: {}}",
            r"unknown setting 'method\.memory'.*; memory is a setting of a_gem, .*replay$",
        ),
        ("method.growth.gate_bias=1", r"unknown setting 'method\.growth\.gate_bias'; .*initial_gate_bias"),
        ("method={name: ewc, coefficient: -1}", r"setting 'method\.coefficient' \(weight of the regulariser\): .*-1"),
        ("method={name: replay, replay_fraction: 2}", r"setting 'method\.replay_fraction' .*less than 1.*2"),
        ("method=3", r"setting 'method' must be a name, or a mapping with a name and settings, but it is 3"),
        ("method=[ewc]", r"setting 'method' must be a name, or a mapping .*\['ewc'\]"),
    ],
)
def test_a_mistake_about_the_method_is_one_sentence(word: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as refusal:
        load_config(None, [word])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "words",
    [
        ["method=paper", "student.experts_see_observation=true"],
        ["method=ewc", "method.coefficient=10"],
        ["method.growth=null", "method.self_distillation=null", "method.memory.selection=uniform"],
        ["method={name: ours, dagger: {episodes: 3}}"],
        ["method=joint"],
    ],
)
def test_a_stored_config_is_read_as_it_was(words: list[str], tmp_path: Path) -> None:
    config = load_config(None, words)
    (tmp_path / "config.yaml").write_text(config_as_yaml(config))
    again = load_config(tmp_path / "config.yaml")
    assert again == config and type(again.method) is type(config.method)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("method=ours", "method was 'ewc' and is now 'ours'"),
        ("method.coefficient=2", r"method\.coefficient was 100\.0 and is now 2\.0"),
    ],
)
def test_a_run_that_exists_keeps_its_method(word: str, sentence: str, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.open(load_config(None, ["method=ewc"]), {})
    with pytest.raises(UserError, match=rf"was made with other settings: {sentence}\. Choose another --run"):
        run.open(load_config(None, ["method=ewc", word]), {})
    run.open(load_config(None, ["method=ewc"]), {})


@pytest.mark.parametrize("names", ['Literal["other"] = "other"', 'Literal["other"] = "mine"'])
@pytest.mark.parametrize("body", ["", "    Settings = Named\n"])
def test_a_plugin_whose_settings_have_another_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, names: str
) -> None:
    lines = "from typing import Literal\nfrom hpc_cpd.methods.base import Method, MethodSettings\n"
    lines += f"class Named(MethodSettings):\n    name: {names}\n"
    (tmp_path / "mine.py").write_text(f'{lines}class Mine(Method):\n    """Mine."""\n{body}')
    project = '[project]\nname = "mine"\nversion = "1"\n[project.entry-points."hpc_cpd.methods"]\nmine = "mine:Mine"\n'
    (tmp_path / "pyproject.toml").write_text(project)
    install_here(monkeypatch, tmp_path / "site", str(tmp_path))
    with pytest.raises(
        UserError, match=r"'mine' \(mine:Mine\) needs Settings of its own, in which name is Literal\['mine"
    ):
        plugins.load("methods", "mine")
