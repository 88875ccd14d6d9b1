"""The method that docs/extending/methods.md shows is one: copied from the page and installed, it learns two stages."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import torch

from hpc_cpd.student.policy import load_student_parts
from tests.distill.rank_forks import learn_on_forks
from tests.distill.synthetic import make_run
from tests.examples.installed import install_here

PAGE = Path(__file__).parents[2] / "docs" / "extending" / "methods.md"
STEPS = ["method.experts_per_task=1", "distill.phase1_steps=20", "distill.phase2_steps=0"]


def block(language: str) -> str:
    """The only block of the page in `language`."""
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    return str(text)


def test_the_method_of_the_page_holds_the_second_student_near_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "stay_close"
    package.mkdir()
    (package / "pyproject.toml").write_text(block("toml"))
    (package / "stay_close.py").write_text(block("python"))
    assert tomllib.loads(block("toml"))["project"]["entry-points"] == {
        "hpc_cpd.methods": {"stay_close": "stay_close:StayClose"}
    }
    install_here(monkeypatch, tmp_path / "site", str(package))
    runs = {name: make_run(tmp_path / name, f"method={name}", *STEPS) for name in ("fine_tuning", "stay_close")}
    learn_on_forks(1, tmp_path / "log", *((run.folder, stage) for run in runs.values() for stage in (1, 2)))
    distance = {}
    for name, run in runs.items():
        first, second = (load_student_parts(run.stage(stage) / "student").state for stage in (1, 2))
        distance[name] = float(sum((second[key] - first[key]).square().sum() for key in first))
    students = [load_student_parts(run.stage(1) / "student").state for run in runs.values()]
    assert all(torch.equal(students[0][key], students[1][key]) for key in students[0])
    assert 0 < distance["stay_close"] < 0.9 * distance["fine_tuning"]


def test_every_function_of_a_method_stands_on_the_page() -> None:
    from hpc_cpd.methods.base import Method

    told = PAGE.read_text()
    for name in vars(Method):
        if not name.startswith("_") and name != "Settings":
            assert f"`{name}" in told, name
