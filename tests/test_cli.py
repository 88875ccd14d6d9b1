"""``hpc-cpd``: what it says of itself and of plug-ins, and advice that holds."""

import sys
from importlib import metadata

import pytest
from typer.testing import CliRunner

from hpc_cpd import cli, plugins
from hpc_cpd.config import load_config
from hpc_cpd.errors import UserError, disk_error_sentence
from hpc_cpd.run.paths import Run


def said(*words: str) -> str:
    done = CliRunner().invoke(cli.app, words, env={"COLUMNS": "200"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_the_version_is_that_of_the_installed_package():
    assert said("--version").split() == ["hpc_cpd", metadata.version("hpc_cpd")]


def test_the_help_says_where_runs_are_started_and_offers_completion():
    shown = said("--help")
    assert "python -m hpc_cpd.launch" in shown and "--install-completion" in shown and "``" not in shown


RED = """
from typing import Literal

from pydantic import Field

from hpc_cpd.settings import PluginSettings


class Glow(PluginSettings):
    name: Literal["red"] = "red"
    watts: float = Field(2.5, gt=0, description="power, in watts")
    names: list[str] | None = Field(None, description="of its friends")


class Red:
    \"""A red toy.

    It glows.\"""

    Settings = Glow


plugin = Red
"""


@pytest.fixture
def toys(tmp_path, monkeypatch) -> str:
    """A kind of plug-in with one that works and one, of an installed package, that does not."""
    package = tmp_path / "toy_box"
    package.mkdir()
    for name, text in {"__init__": "", "base": "", "red": RED}.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(plugins.KINDS, "toys", plugins.Kind("toy", "student.toy", "toy_box", "hpc_cpd.toys"))
    broken = metadata.EntryPoint("broken", "no_such_module:Thing", "hpc_cpd.toys")
    real = plugins.installed
    monkeypatch.setattr(plugins, "installed", lambda kind: {"broken": broken} if kind == "toys" else real(kind))
    return "toys"


def test_plugins_are_listed_with_where_they_come_from_and_what_they_are(toys):
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in said("plugins", toys).splitlines()]
    assert ["red", "hpc_cpd", "A red toy."] in rows
    ((_, origin, reason),) = [row for row in rows if row[:1] == ["broken"]]
    assert origin == "unknown" and "cannot be loaded: ModuleNotFoundError" in reason  # and the others are still shown


def test_the_settings_of_a_plugin_are_listed_with_type_default_and_meaning(toys):
    rows = [[cell.strip() for cell in line.split("│")[1:5]] for line in said("plugins", toys, "red").splitlines()]
    assert ["student.toy.watts", "float", "2.5", "power, in watts"] in rows
    assert ["student.toy.names", "list[str] or null", "null", "of its friends"] in rows


def test_an_unknown_kind_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="no kind of plug-in 'method'; did you mean 'methods'"):
        said("plugins", "method")


def test_a_stage_that_the_run_does_not_have_is_refused_without_a_command_that_fails_too(tmp_path):
    run = Run(tmp_path / "run")
    run.open(load_config(None, ["stream.tasks=[metaworld/reach-v3]"]), {})
    with pytest.raises(UserError, match=r"--stage is 9, but .* has the stages 1 to 1$"):
        said("evaluate", str(run.folder), "--stage", "9")


def test_a_refused_write_names_only_an_option_that_the_command_has():
    refusal = PermissionError(13, "Permission denied", "/closed/report")
    assert disk_error_sentence(refusal, "--out").endswith("choose another folder with --out")
    assert "--" not in disk_error_sentence(refusal, None)


def test_a_family_lists_its_tasks(monkeypatch):
    shown = said("tasks", "metaworld").splitlines()
    assert "NAME@1of2" in shown[0] and shown[1] == "metaworld/reach-v3" and len(shown) == 52
    assert shown[-1] == "The spaces of one: hpc-cpd tasks metaworld/NAME"
    assert said("tasks", "metaworld/").splitlines() == shown
    assert "gymnasium/Pendulum-v1" in said("tasks", "gymnasium").splitlines()
    monkeypatch.setattr(plugins.load("tasks", "gymnasium"), "names", list, raising=False)
    first, last = said("tasks", "gymnasium").splitlines()
    assert "gymnasium/MODULE:ID where MODULE registers ID" in first and "written gymnasium/NAME" in last


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("metawrld", "did you mean 'metaworld'? known: MT10, MT25, MT50, gymnasium, metaworld"),
        ("MT50xx", "there is no task set 'MT50xx'"),
        ("metaworld/raech-v3", "did you mean 'metaworld/reach-v3'"),
    ],
)
def test_a_name_that_is_no_task_set_family_or_task_is_refused(name, parts, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hpc-cpd", "tasks", name])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2 and parts in capsys.readouterr().err
