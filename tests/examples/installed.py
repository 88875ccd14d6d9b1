"""Example packages as if they were installed, without pip: their code and their entry points on a path."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path

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


def _entry_points(groups: Mapping[str, Mapping[str, str]]) -> str:
    lines = []
    for group, points in groups.items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items()), ""]
    return "\n".join(lines)
