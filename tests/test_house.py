"""The rules of the house: imports point down, files stay small, nothing runs from a file."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hpc_cpd"
# What stands higher may import what stands lower; rooms on one line may not import each other.
ORDER = [
    {"__main__"},
    {"launch", "worker"},
    {"cli"},
    {"sweep"},
    {"report"},
    {"cluster"},
    {"distill"},
    {"methods"},
    {"teachers"},
    {"evaluate"},
    {"evaluation"},
    {"student"},
    {"trajectories"},
    {"tasks"},
    {"distributed"},
    {"run"},
    {"config"},
    {"former_keys"},
    {"settings"},
    {"plugins"},
    {"progress", "errors", "optimizers", "layers", "losses", "randomness"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))
LIMIT = 400


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[tuple[str, int]]:
    """Rooms that a module imports anywhere, inside functions too, with the line."""
    here = ["hpc_cpd", *path.relative_to(PACKAGE).with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            base = ".".join(here[: len(here) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "hpc_cpd" else [module]
        for name in names:
            parts = name.split(".")
            if parts[0] == "hpc_cpd" and len(parts) > 1:
                yield parts[1], node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_the_list(path):
    room = room_of(path)
    if path == PACKAGE / "__init__.py":
        return  # the front of the package names things of several rooms, lazily
    assert room in LEVEL, f"{room} has no place in the list"
    for other, line in imported_rooms(path):
        if other not in LEVEL:  # a name such as hpc_cpd.__version__
            continue
        assert other == room or LEVEL[other] > LEVEL[room], f"{path}:{line}: {room} must not import {other}"


def test_the_reader_of_imports_sees_lazy_ones(tmp_path):
    # the check above is only as good as its reader
    found = {room for room, _ in imported_rooms(PACKAGE / "worker.py")}
    assert {"distill", "teachers", "errors", "run"} <= found


def test_report_and_tasks_registry_do_not_need_torch():
    for path in [*(PACKAGE / "report").rglob("*.py"), PACKAGE / "tasks" / "registry.py", PACKAGE / "launch.py"]:
        assert not re.search(r"^\s*(import|from) torch\b", path.read_text(), re.M), path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_small_and_have_a_name_of_their_own(path):
    assert len(path.read_text().splitlines()) <= LIMIT
    assert path.stem not in ("utils", "util", "helpers", "misc", "common")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_runs_from_a_file(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {"pickle", "cloudpickle", "dill", "shelve", "marshal"} & {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.module not in ("pickle", "cloudpickle", "dill", "shelve", "marshal")
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            words = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert words.get("weights_only") != "False" and words.get("allow_pickle") != "True"
            assert called not in ("torch.load", "eval", "exec", "yaml.load", "yaml.unsafe_load"), called


def test_one_file_alone_names_the_variables_of_a_scheduler():
    assert [path.name for path in FILES if "SLURM_" in path.read_text()] == ["slurm.py"]
