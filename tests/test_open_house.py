"""What a user brings is one file: nothing outside it knows its name, its settings or, of a scheduler, its variables."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.testing import CliRunner

from hpc_cpd import cli, plugins
from hpc_cpd.settings import Config, PluginSettings, choice_of

PACKAGE = Path(__file__).parents[1] / "hpc_cpd"
TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
PLUGIN_FOLDERS = tuple(
    about.package.replace(".", "/").removeprefix("hpc_cpd/") + "/" for about in plugins.KINDS.values()
)
BUILT_IN = [(kind, name) for kind in plugins.KINDS for name in plugins.built_in(kind)]
WITH_SETTINGS = [kind for kind, about in plugins.KINDS.items() if "Settings" in about.needs]


def fields_of(settings: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """The settings in a group and in the groups within it, by dotted names, but not those of plug-ins that it names."""
    for name, field in settings.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel) and choice_of(settings, name) is None:
            yield from fields_of(kind, f"{prefix}{name}.")
        elif not (name == "name" and issubclass(settings, PluginSettings)):
            yield prefix + name, field


def read_in(trees: list[ast.Module]) -> set[str]:
    """The names of all attributes that are read."""
    nodes = (node for tree in trees for node in ast.walk(tree))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


def strings_of(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every string but docstrings and the defaults of ``Choice(kind, default)``, with its line."""
    passed = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Choice":
            passed += node.args
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in passed:
            yield node.lineno, node.value


def test_only_the_slurm_scheduler_reads_slurms_variables():
    assert [name for name in TREES if "SLURM_" in (PACKAGE / name).read_text()] == ["cluster/schedulers/slurm.py"]


def test_no_module_outside_the_methods_names_one():
    methods = set(plugins.built_in("methods"))
    named = [
        f"{name}:{line}: {text}"
        for name, tree in TREES.items()
        if not name.startswith(("methods/", "tasks/"))  # a task knows joints, MuJoCo's
        for line, text in strings_of(tree)
        if text in methods
    ]
    assert not named and methods


def test_no_module_imports_a_plugin_of_another_room():
    rooms = ("methods", "algorithms", "tokenizers", "backbones", "heads", "embeddings")
    modules = {f"{plugins.KINDS[kind].package}.{name}" for kind, name in BUILT_IN if kind in rooms}
    found = [
        f"{name}: {module}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for module in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        if module in modules and name.split("/")[0] != module.split(".")[1]
    ]
    assert not found


@pytest.mark.parametrize("key", dict(fields_of(Config)))
def test_a_common_setting_is_read_where_no_choice_has_been_made(key):
    common = {name: tree for name, tree in TREES.items() if name != "settings.py"}
    trees = [t for name, t in common.items() if name.endswith("/base.py") or not name.startswith(PLUGIN_FOLDERS)]
    if key.rpartition(".")[2] not in read_in(trees):
        pytest.fail(f"{key} is read by plug-ins alone: move it into their own settings")


@pytest.mark.parametrize(("kind", "name"), [one for one in BUILT_IN if one[0] in WITH_SETTINGS])
def test_the_settings_of_a_plugin_are_described_and_read_in_its_own_room(kind, name):
    settings = plugins.load(kind, name).Settings
    room = plugins.KINDS[kind].package.split(".")[1]
    read = read_in([tree for path, tree in TREES.items() if path.split("/")[0].removesuffix(".py") == room])
    assert issubclass(settings, PluginSettings) and settings.model_fields["name"].default == name
    for key, field in fields_of(settings):
        assert field.description, f"{key} has no description"
        if key.rpartition(".")[2] not in read:
            pytest.fail(f"{key} is not read under hpc_cpd/{room}")


@pytest.mark.parametrize("kind", plugins.KINDS)
def test_every_plugin_that_comes_with_the_package_is_listed_with_a_sentence(kind):
    shown = CliRunner().invoke(cli.app, ["plugins", kind], env={"COLUMNS": "200"}).output
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in shown.splitlines()]
    listed = {row[0]: row[2] for row in rows if len(row) == 3 and row[1] == "hpc_cpd"}
    assert sorted(listed) == list(plugins.built_in(kind)) != []
    assert not [what for what in listed.values() if what.startswith(("error:", "(it has no docstring"))]


def test_the_settings_of_every_plugin_are_known_without_torch():
    program = f"""
import sys
from hpc_cpd import plugins
for kind in {WITH_SETTINGS}:
    for name in plugins.built_in(kind):
        plugins.load(kind, name)
        assert "torch" not in sys.modules, (kind, name)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
