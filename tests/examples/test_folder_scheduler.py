"""The example scheduler, as a package outside of hpc_cpd: teachers and a stage run through it, stopped and requeued."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done
from tests.cluster.lab import merged, settings
from tests.examples.installed import installed

ROOT = Path(__file__).parents[2]
TASKS = ["toy/a", "toy/b"]


class Site:
    """A queue in `folder`, and this user's commands."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.queue = folder, folder / "queue"
        self.environment = installed(folder / "packages", "folder_scheduler")
        toy = folder / "packages" / "toy_tasks-1.0.dist-info"
        toy.mkdir()
        (toy / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-tasks\nVersion: 1.0\n")
        (toy / "entry_points.txt").write_text("[hpc_cpd.tasks]\ntoy = tests.cluster.toy_tasks:family\n")
        self.environment["PYTHONPATH"] += f"{os.pathsep}{ROOT}"
        values = merged(settings(TASKS), distill={"phase1_steps": 100, "phase2_steps": 30})
        values["cluster"] = {"scheduler": {"name": "folder", "folder": str(self.queue)}}
        (folder / "toy.yaml").write_text(yaml.safe_dump(values))

    def command(self, module: str, *words: object) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", module, *map(str, words)]
        pipe = subprocess.PIPE
        return subprocess.Popen(argv, env=self.environment, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True)

    def run(self, module: str, *words: object, code: int = 0) -> str:
        process = self.command(module, *words)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == code, output
        return output

    def launch(self, run: Run, *words: object, code: int = 0) -> str:
        config = ["--config", self.folder / "toy.yaml"]
        return self.run("hpc_cpd.launch", "--stage", "all", *config, "--run", run.folder, *words, code=code)

    def units(self, run: Run) -> dict[str, dict[str, object]]:
        document = json.loads(self.run("hpc_cpd.cli", "status", run.folder, "--json"))
        assert document["scheduler"] in ("folder", None)
        return {unit["unit"]: unit for unit in document["units"]}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"))


def student(run: Run) -> str:
    assert is_done(run.stage(1))
    return hashlib.sha256((run.stage(1) / "student" / "student.json").read_bytes()).hexdigest()


@pytest.mark.slow
def test_teachers_and_a_stage_run_through_it_and_a_stopped_job_goes_on_to_the_same_bits(site: Site) -> None:
    run, here = Run(site.folder / "run"), Run(site.folder / "here")
    shown = site.launch(run, "--dry-run")
    assert "stage --run" in shown and not site.queue.exists() and not run.folder.exists()
    printed = site.launch(run, "--cluster", "folder")
    assert "through folder" in printed and "stage 1: job 3, after teacher toy/a, teacher toy/b" in printed
    assert {unit["state"] for unit in site.units(run).values()} == {"waiting"}
    assert "in the queue already" in site.launch(run, "--cluster", "auto")  # auto: the configured one, which is there

    runner = site.command("folder_scheduler", site.queue)
    lock, end = run.stage(1) / "lock.json", time.monotonic() + 200
    while not list((run.stage(1) / "checkpoints").glob("phase-*")):
        assert time.monotonic() < end and runner.poll() is None
        time.sleep(0.05)
    pid = json.loads(lock.read_text())["pid"]
    os.kill(pid, signal.SIGUSR1)  # alive, or this raises
    output, _ = runner.communicate(timeout=200)
    assert runner.returncode == 0, output
    unit = site.units(run)["stage 1"]
    assert (unit["state"], unit["job"], unit["restarts"]) == ("done", "3", 1)
    record = json.loads((run.stage(1) / "attempt.json").read_text())
    assert (record["job"], record["restart"], record["log"]) == ("3", 1, "logs/folder/3_0.log")
    assert "stopped: " in (run.folder / record["log"]).read_text()

    site.launch(here, "--cluster", "local")
    assert student(run) == student(here)


def test_a_scheduler_that_nobody_has_is_refused_with_those_that_are_there(site: Site) -> None:
    said = site.launch(Run(site.folder / "none"), "--cluster", "foldr", code=2)
    assert "did you mean 'folder'? known: auto, local, slurm, folder" in said
