"""A thousand teachers and two hundred stages, planned and submitted to a real Slurm, then asked after.

    python benchmarks/submission.py [OUT.json]

The jobs are held: what is timed is our side and the controller's, not the learning. The limits are those we promise:
10 s to submit, 2 s for ``hpc-cpd status``; the peer is a bare sbatch of as many jobs as we submit.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hpc_cpd.cluster.provenance import describe_origin
from hpc_cpd.run.paths import Run
from tests.cluster.lab import Lab, merged, settings
from tests.cluster.slurm_cluster import SlurmCluster, install

TASKS, PER_STAGE = 1000, 5


def main() -> None:
    install()
    cluster = SlurmCluster(nodes=4, cpus=4)
    with tempfile.TemporaryDirectory(prefix="submission-") as name:
        try:
            results = measure(Lab(cluster.up(), Path(name)))
        finally:
            cluster.down(wipe=True)
    for what, value in results.items():
        print(f"{what}: {value}")
    if len(sys.argv) > 1:
        text = json.dumps({"results": results, "origin": describe_origin()}, indent=1)
        Path(sys.argv[1]).write_text(text + "\n")


def measure(lab: Lab) -> dict[str, object]:
    run = Run(lab.folder / "run")
    tasks = [f"toy/{number}" for number in range(TASKS)]
    stream = {"tasks": tasks, "tasks_per_stage": PER_STAGE}
    config = lab.config(merged(settings([], options={"hold": True}), stream=stream))
    begin = time.monotonic()
    lab.launch("--stage", "all", "--config", config, "--run", run.folder)
    submit = time.monotonic() - begin
    begin = time.monotonic()
    units = lab.status(run)
    status = time.monotonic() - begin
    begin = time.monotonic()
    lab.launch("--stage", "all", "--run", run.folder)
    again = time.monotonic() - begin
    script = lab.folder / "empty.sh"
    script.write_text("#!/bin/bash\ntrue\n")
    jobs = TASKS // PER_STAGE + 2  # one array, the stages, the resubmitter
    begin = time.monotonic()
    for _ in range(jobs):
        lab.cluster.submit("--hold", script)
    bare = time.monotonic() - begin
    assert sum(unit["state"] == "waiting" for unit in units.values()) >= TASKS
    lab.clear()
    return {
        "tasks": TASKS,
        "jobs": jobs,
        "submit_seconds": round(submit, 2),
        "submit_again_seconds": round(again, 2),
        "status_seconds": round(status, 2),
        "bare_sbatch_seconds": round(bare, 2),
        "ratio_to_bare_sbatch": round(submit / bare, 2),
    }


if __name__ == "__main__":
    main()
