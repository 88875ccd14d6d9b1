"""A backbone that an installed package brings learns, is checkpointed, grows, is published, and acts with a cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.installed import installed

SCRIPT = Path(__file__).with_name("gru_student.py")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return installed(tmp_path_factory.mktemp("installed"), "gru_backbone")


def play(environment: dict[str, str], *words: object) -> str:
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([environment["PYTHONPATH"], root])
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    done = subprocess.run(
        command, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("top_k", [0, 2])
def test_it_acts_as_it_learnt_also_when_the_inferred_task_changes(environment: dict[str, str], top_k: int) -> None:
    assert "the same" in play(environment, "acts", top_k)


def test_its_importance_is_what_autograd_finds(environment: dict[str, str]) -> None:
    assert "the same" in play(environment, "importance")


@pytest.mark.slow
def test_two_stages_are_learnt_with_it_and_an_interrupted_one_goes_on_to_the_same_bits(
    environment: dict[str, str], tmp_path: Path
) -> None:
    assert "the same" in play(environment, "learns", tmp_path)


def test_a_student_whose_backbone_is_not_installed_is_one_sentence(environment: dict[str, str], tmp_path: Path) -> None:
    play(environment, "publishes", tmp_path / "student")
    code = "import sys, hpc_cpd; hpc_cpd.load_student(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "student")], capture_output=True, text=True, check=False
    )
    assert "there is no backbone 'gru'" in done.stderr.splitlines()[-1]
