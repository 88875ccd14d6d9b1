"""The REINFORCE of examples/plugins learns a task through the ordinary loop, and what it leaves is a teacher."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples import train_reinforce
from tests.examples.installed import installed

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("packages")
    info = folder / "line_tasks-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: line-tasks\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hpc_cpd.tasks]\nline = tests.examples.line_tasks:family\n")
    found = installed(folder, "reinforce")
    return {**found, "PYTHONPATH": f"{found['PYTHONPATH']}:{ROOT}"}


def _run(environment: dict[str, str], *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_it_learns_is_resumed_to_the_same_bits_and_its_policy_is_a_teacher(
    environment: dict[str, str], tmp_path: Path
) -> None:
    done = _run(environment, train_reinforce.__file__, tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["class"] == "LinearPolicy"
    assert found["untrained"] < 0.2 and found["success"] > 0.9
    assert found["launches"] > 2 and found["same_bits"]
    assert found["episodes"] == 8


@pytest.mark.slow
def test_two_ranks_train_it_through_the_launcher_like_any_other(environment: dict[str, str], tmp_path: Path) -> None:
    config = tmp_path / "line.yaml"
    config.write_text(
        "name: line\nstream: {tasks: [line/short], tasks_per_stage: 1}\n"
        "teachers: {algorithm: {name: reinforce, rounds: 3}, start: scratch, ranks: 2}\n"
        "trajectories: {success_only: false, episodes: 8}\n"
    )
    words = ["-m", "hpc_cpd.launch", "--stage", "teachers", "--cluster", "local", "--config", config]
    done = _run(environment, *words, "--run", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/teachers/line/short/policy.json").read_text())["algorithm"] == "reinforce"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["teachers.start=demonstrations"], "cannot be cloned from demonstrations; set teachers.start=scratch"),
        (["teachers.algorithm.name=reinfroce"], "there is no teacher algorithm 'reinfroce'; did you mean 'reinforce'?"),
        (["teachers.algorithm.ruonds=3"], "did you mean 'teachers.algorithm.rounds'?"),
    ],
)
def test_its_settings_are_checked_before_anything_starts(
    environment: dict[str, str], tmp_path: Path, words: list[str], sentence: str
) -> None:
    command = ["-m", "hpc_cpd.launch", "--stage", "teachers", "--cluster", "local", "--config", "configs/mt10.yaml"]
    settings = ["stream.tasks=[line/short]", "teachers.algorithm=reinforce", "teachers.start=scratch", *words]
    done = _run(environment, *command, "--run", tmp_path / "run", *settings)
    assert done.returncode == 2 and sentence in done.stderr
    assert not (tmp_path / "run").exists()
