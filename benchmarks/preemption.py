"""A stage of two nodes and four ranks, preempted five times on a real Slurm, against one that nobody disturbed.

    python benchmarks/preemption.py [OUT.json]

Four kinds of site: GraceTime 10 and 0, each with and without preempt_send_user_signal. What is shown per kind: whether
the student has the same bits, how often the job was restarted, in how many of the preemptions no step was lost, and the
time it took as a ratio to the undisturbed stage (requeueing alone costs about seven seconds a time on this Slurm).
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from hpc_cpd.cluster.provenance import describe_origin
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done
from tests.cluster.lab import Lab, job_of, merged, settings, student_hash
from tests.cluster.slurm_cluster import SlurmCluster, install

TIMES = 5
PHASES = {"ranks": 4, "phase1_steps": 700, "phase2_steps": 500}
SAVED = re.compile(r"all ranks saved \S+ at phase (\d) step (\d+)")


def main() -> None:
    install()
    cluster = SlurmCluster(nodes=4, cpus=4)
    with tempfile.TemporaryDirectory(prefix="preemption-") as name:
        try:
            results = measure(Lab(cluster.up(), Path(name)))
        finally:
            cluster.down(wipe=True)
    if len(sys.argv) > 1:
        text = json.dumps({"results": results, "origin": describe_origin()}, indent=1)
        Path(sys.argv[1]).write_text(text + "\n")


def measure(lab: Lab) -> list[dict[str, Any]]:
    run = Run(lab.folder / "undisturbed")
    config = lab.config(merged(settings(["toy/a", "toy/b"], nodes_per_stage=2), distill=PHASES))
    lab.launch("--stage", "teachers", "--config", config, "--run", run.folder, "--wait")
    prepared = Run(shutil.copytree(run.folder, lab.folder / "prepared"))
    shutil.rmtree(prepared.logs)
    begin = time.monotonic()
    lab.launch("--stage", "1", "--run", run.folder, "--wait")
    alone = time.monotonic() - begin
    print(f"undisturbed: {alone:.0f} s, student {student_hash(run)[:12]}", flush=True)
    results = []
    for user_signal in (True, False):
        lab.cluster.reconfigure(user_signal=user_signal)
        for partition, grace in (("low", 10), ("low0", 0)):
            copy = Run(shutil.copytree(prepared.folder, lab.folder / f"{partition}-{user_signal}"))
            result = disturb(lab, copy, partition)
            result |= {"grace_seconds": grace, "user_signal": user_signal}
            result["same_bits"] = student_hash(copy) == student_hash(run)
            result["ratio"] = round(result["seconds"] / alone, 2)
            results.append(result)
            print(json.dumps(result), flush=True)
    return results


def disturb(lab: Lab, run: Run, partition: str) -> dict[str, Any]:
    """Preempt the stage in its learning, TIMES times."""
    begin = time.monotonic()
    lab.launch("--stage", "1", "--run", run.folder, f"cluster.scheduler.partition={partition}")
    saves: list[tuple[int, ...]] = []
    nothing_lost = 0
    for _ in range(TIMES):
        before = position(run)
        lab.wait(lambda before=before: position(run) > before or is_done(run.stage(1)), 120, "a new checkpoint")
        assert not is_done(run.stage(1)), "the stage was over before it had been preempted often enough; add steps"
        lab.preempt(1)
        log = (run.logs / "slurm" / f"{job_of(run, 'stage 1')}_0_log.out").read_text()
        known = len(saves)
        saves = [tuple(map(int, match.groups())) for match in SAVED.finditer(log)]
        # all ranks saved together, so the next incarnation begins at the very step this one had reached
        nothing_lost += len(saves) > known and saves[-1] == position(run)
    lab.wait(lambda: is_done(run.stage(1)), 300, "the stage")
    attempt = json.loads((run.stage(1) / "attempt.json").read_text())
    return {
        "preempted": TIMES,
        "restarts": attempt["restart"],
        "no_step_lost": nothing_lost,
        "seconds": round(time.monotonic() - begin, 1),
    }


def position(run: Run) -> tuple[int, int]:
    """(phase, step) of the newest whole checkpoint; (0, 0) before the first."""
    found = [
        (int(phase), int(step))
        for path in (run.stage(1) / "checkpoints").glob("phase-*-step-*")
        if (path / "index.json").is_file()
        for _, phase, _, step in [path.name.split("-")]
    ]
    return max(found, default=(0, 0))


if __name__ == "__main__":
    main()
