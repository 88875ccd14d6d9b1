"""Example packages as if they were installed, without pip: their code and their entry points on a path."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

from hpc_cpd import plugins

PLUGINS = Path(__file__).parents[2] / "examples" / "plugins"


def installed(folder: Path, *names: str) -> dict[str, str]:
    """The environment in which the packages ``examples/plugins/NAME`` are installed; `folder` holds their metadata."""
    paths = []
    for name in names:
        package = PLUGINS / name
        project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
        info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        (info / "entry_points.txt").write_text(_entry_points(project["entry-points"]))
        paths.append(str(package))
    known = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *paths, *([known] if known else [])])}


def install_here(patch: pytest.MonkeyPatch, folder: Path, *names: str) -> None:
    """The same in this process, and in those that it starts, until `patch` is undone."""
    paths = installed(folder, *names)["PYTHONPATH"]
    patch.setenv("PYTHONPATH", paths)
    for path in reversed(paths.split(os.pathsep)):
        patch.syspath_prepend(path)
    for name in ("installed", "load"):  # with caches of their own
        patch.setattr(plugins, name, cache(getattr(plugins, name).__wrapped__))


def _entry_points(groups: Mapping[str, Mapping[str, str]]) -> str:
    lines = []
    for group, points in groups.items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items()), ""]
    return "\n".join(lines)
