"""A family from outside that is learnt: the package that users copy, and the config beside it."""

import subprocess
import sys
from pathlib import Path

import pytest

from hpc_cpd.run.publish import read_json
from tests.examples.installed import PLUGINS, installed

CONFIG = PLUGINS / "point_task" / "point.yaml"


@pytest.mark.slow
def test_a_teacher_learns_it_with_the_config_beside_it(tmp_path):
    run = tmp_path / "run"
    words = ["--stage", "teachers", "--config", str(CONFIG), "--run", str(run), "--cluster", "local"]
    command = [sys.executable, "-m", "hpc_cpd.launch", *words, "stream.tasks=[point/near]"]
    environment = installed(tmp_path / "site", "point_task")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    evaluated = read_json(run / "teachers" / "point" / "near" / "evaluation.json")["tasks"]["point/near"]
    assert evaluated["successes"] > 0.8 * evaluated["episodes"]


def test_the_page_shows_what_the_package_holds():
    page = (Path(__file__).parents[2] / "docs" / "extending" / "tasks.md").read_text()
    project = (CONFIG.parent / "pyproject.toml").read_text()
    for line in ('[project.entry-points."hpc_cpd.tasks"]', 'point = "point_task:family"'):
        assert line in page and line in project
