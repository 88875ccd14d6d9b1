"""A whole sweep on a real Slurm: teachers once, then every row as jobs of its own."""

import sys

from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done, read_json
from tests.cluster.lab import Lab, settings

TASKS = ["toy/a", "toy/b"]  # one stage
ROWS = {"wide": {}, "narrow": {"seeds": [1], "settings": {"student.expert_hidden": 8}}}
WORDS = [sys.executable, "-c", "from hpc_cpd.cli import main; main()", "sweep", "pair.yaml"]


def test_a_sweep_waits_for_shared_teachers_submits_every_row_once_and_compares_what_they_made(lab: Lab):
    lab.config(settings(TASKS))
    lab.config({"name": "pair", "config": "toy.yaml", "rows": ROWS}, "pair.yaml")
    runs = [Run(lab.folder / "runs/pair/wide/seed-0"), Run(lab.folder / "runs/pair/narrow/seed-1")]

    said = lab.run(*WORDS, "--cluster", "slurm", cwd=lab.folder)
    assert "wide, seed 0: submitted" in said and "narrow, seed 1: submitted" in said
    (shared,) = (path for path in (lab.folder / "runs/pair/shared").iterdir() if path.is_dir())
    assert all(is_done(shared / part / task) for part in ("teachers", "trajectories") for task in TASKS)
    jobs = [read_json(run.logs / "submitted.json") for run in runs]
    assert [set(made["units"]) for made in jobs] == [{"stage 1"}] * 2  # no teacher of its own

    lab.run(*WORDS, "--cluster", "slurm", cwd=lab.folder)  # while they wait or run
    again = [read_json(run.logs / "submitted.json") for run in runs]
    assert [made["units"] for made in again] == [made["units"] for made in jobs]

    lab.wait(lambda: all(is_done(run.stage(1)) for run in runs), 300, "both rows")
    said = lab.run(*WORDS, "--cluster", "slurm", cwd=lab.folder)
    assert "2 of 2 runs done, 0 to do" in said
    table = read_json(lab.folder / "runs/pair/report/metrics.json")
    assert table["settings"] == {"student.expert_hidden": {"wide": 16, "narrow": 8}}
