"""What ``make gpu`` runs, at a size that the CPU can do: it cannot rot while no GPU is at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_cpd.run.publish import read_json

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def run(*words: object, script: Path = SCRIPT) -> subprocess.CompletedProcess[str]:
    changed = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(script), *map(str, words)]
    return subprocess.run(command, env=os.environ | changed, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.ranks
def test_every_part_runs_end_to_end(tmp_path: Path) -> None:
    done = run("--device", "cpu", "--small", "--parts", "stage", "step", "layer", "acting", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {path.stem: read_json(path) for path in tmp_path.iterdir()}
    assert set(found) == {"stage", "step", "layer", "acting"}
    assert all(part["small"] and part["device"] == "CPU" and part["origin"] for part in found.values())
    assert found["stage"]["results"][0]["tasks"] == 2
    for row in found["step"]["results"]:
        assert 0 < row["active_parameters"] <= row["parameters"] and row["operations_per_step"] > 0
        assert row["share_of_peak"] > 0 and row["tokens_per_second"] > row["windows_per_second"]
    chosen, dense = (row for row in found["step"]["results"] if "100M active" in row["case"])
    assert dense["active_parameters"] == dense["parameters"] < chosen["active_parameters"] < chosen["parameters"] / 4
    assert all(row[f"{who}_ms"] > 0 for row in found["layer"]["results"] for who in ("dense", "ours", "DeepSpeed"))
    assert {row["environments"] for row in found["acting"]["results"]} == {1, 4}


def test_without_a_gpu_it_says_so_in_a_sentence_and_is_no_failure(tmp_path: Path) -> None:
    done = run("--out", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("make gpu measures nothing: torch sees no GPU") and done.stdout.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.ranks
def test_what_it_measures_is_on_the_device() -> None:
    done = run(script=Path(__file__).with_name("gpu_benchmark_elsewhere.py"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == ["acting 2", "steps 5", "layer 2"]
