"""Whole jobs on a real Slurm: they fail, are preempted, stopped, lost with their node, and the work goes on."""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest

from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done
from tests.cluster.lab import ROOT, Lab, job_of, merged, settings, student_hash
from tests.cluster.slurm_cluster import SlurmCluster

TWO_NODES = {"nodes_per_stage": 2}
LONG = {"ranks": 2, "phase1_steps": 300, "phase2_steps": 200}  # benchmarks/preemption.py: 4 ranks, 5 times, 4 sites


@pytest.fixture(scope="module")
def prepared(slurm_site: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with two teachers, and a stage of a rank on each of two nodes that was never disturbed."""
    lab = Lab(slurm_site, tmp_path_factory.mktemp("prepared"))
    run = Run(lab.folder / "run")
    config = lab.config(merged(settings(["toy/a", "toy/b"], **TWO_NODES), distill=LONG))
    lab.launch("--stage", "all", "--config", config, "--run", run.folder, "--wait")
    return run


def without_stage(run: Run, folder: Path) -> Run:
    """A copy of `run` in which the stage was never begun."""
    copy = Run(shutil.copytree(run.folder, folder))
    shutil.rmtree(copy.stage(1))
    shutil.rmtree(copy.logs)
    return copy


def checkpoints(run: Run, stage: int = 1) -> set[str]:
    return {path.name for path in (run.stage(stage) / "checkpoints").glob("phase-*")}


def wait_for_progress(lab: Lab, run: Run) -> None:
    """Until the stage has written a checkpoint that was not there before."""
    before = checkpoints(run)
    lab.wait(lambda: checkpoints(run) - before or is_done(run.stage(1)), 90, "a new checkpoint")
    assert not is_done(run.stage(1)), "the stage ended before it could be disturbed"


def log_of(run: Run, unit: str) -> str:
    return (run.logs / "slurm" / f"{job_of(run, unit)}_0_log.out").read_text()


def attempt(folder: Path) -> dict[str, object]:
    return json.loads((folder / "attempt.json").read_text())


@pytest.mark.parametrize("partition", ["low", "low0"])
def test_a_preempted_stage_of_two_nodes_ends_with_the_bits_of_an_undisturbed_one(prepared, lab, partition):
    """GraceTime 10: all ranks save together and no step is lost. GraceTime 0: the last checkpoint is all there is."""
    run = without_stage(prepared, lab.folder / "run")
    gpus = "cluster.scheduler.gpus_per_node=1"  # made of /dev/null here: the ranks learn without
    lab.launch("--stage", "1", "--run", run.folder, f"cluster.scheduler.partition={partition}", gpus)
    wait_for_progress(lab, run)
    lab.preempt(1)
    if partition == "low":
        assert "stopped: " in log_of(run, "stage 1")
    lab.wait(lambda: is_done(run.stage(1)), 120, "the stage")
    assert student_hash(run) == student_hash(prepared)
    assert attempt(run.stage(1))["restart"] == 1


def test_where_preemption_cancels_the_work_goes_on_without_a_human(prepared, lab):
    run = without_stage(prepared, lab.folder / "run")
    words = ["cluster.scheduler.partition=cancel0", "cluster.scheduler.continuation=resubmit"]
    lab.launch("--stage", "1", "--run", run.folder, *words)
    first = job_of(run, "stage 1")
    wait_for_progress(lab, run)
    lab.preempt(1)
    lab.wait(lambda: is_done(run.stage(1)), 120, "the stage")
    assert job_of(run, "stage 1") != first and lab.cluster.state(first) == "PREEMPTED"
    assert student_hash(run) == student_hash(prepared)


def test_where_jobs_may_neither_be_requeued_nor_submit_a_chain_goes_on(prepared, lab):
    run = without_stage(prepared, lab.folder / "run")
    words = [
        "cluster.scheduler.partition=cancel",
        "cluster.scheduler.continuation=chain",
        "cluster.scheduler.chain_length=3",
    ]
    lab.launch("--stage", "1", "--run", run.folder, *words)
    assert len(lab.queue()) == 3
    wait_for_progress(lab, run)
    lab.preempt(1)
    lab.wait(lambda: is_done(run.stage(1)) and not lab.queue(), 120, "the chain")
    assert student_hash(run) == student_hash(prepared)
    assert lab.cluster.state(job_of(run, "stage 1")) == "COMPLETED"  # the last link finds nothing to do


def test_one_that_always_fails_leaves_the_rest_alone_and_is_named_and_it_alone_is_submitted_again(lab):
    run = Run(lab.folder / "run")
    config = lab.config(settings(["toy/a", "toy/broken", "toy/c", "toy/d"], max_retries=1))
    printed = lab.run(
        "sbatch", "--wait", f"--output={lab.folder}/driver.out", "slurm/teachers.sh", config, "--run", run.folder
    )
    assert "Submitted" in printed
    lab.wait(lambda: not lab.queue(), 90, "the end of all jobs")
    done = [task for task in ("toy/a", "toy/broken", "toy/c", "toy/d") if is_done(run.trajectories(task))]
    assert done == ["toy/a", "toy/c", "toy/d"]
    unit = lab.status(run)["teacher toy/broken"]
    assert unit["state"] == "given up" and "this task is broken on purpose" in unit["error"]
    assert attempt(run.teacher("toy/broken"))["number"] == 2  # once, and once more

    jobs = {task: job_of(run, f"teacher {task}") for task in done}
    refused = lab.launch("--stage", "1", "--run", run.folder, expected=2)
    assert "the teachers of toy/broken" in refused and "--allow-missing" in refused
    again = lab.run(
        "sbatch", "--wait", f"--output={lab.folder}/again.out", "slurm/teachers.sh", config, "--run", run.folder
    )
    assert "Submitted" in again and "teacher toy/broken: job" in (lab.folder / "again.out").read_text()
    assert {task: job_of(run, f"teacher {task}") for task in done} == jobs

    words = [config, "--run", run.folder, "--allow-missing", "cluster.max_retries=0"]
    lab.run("sbatch", "--wait", f"--output={lab.folder}/stages.out", "slurm/distill.sh", *words)
    lab.wait(lambda: is_done(run.stage(2)), 120, "both stages")
    assert json.loads((run.stage(1) / "evaluation.json").read_text())["tasks"].keys() == {"toy/a"}
    assert json.loads((run.stage(2) / "evaluation.json").read_text())["tasks"].keys() == {"toy/a", "toy/c", "toy/d"}
    assert "toy/broken" not in (run.report / "metrics.json").read_text()


def test_a_controller_killed_in_mid_array_is_survived_by_every_element(lab):
    run = Run(lab.folder / "run")
    tasks = [f"toy/slow-{index}" for index in range(6)]
    config = lab.config(settings(tasks, array_parallelism=3))
    lab.launch("--stage", "teachers", "--config", config, "--run", run.folder)
    lab.wait(lambda: any(is_done(run.teacher(task)) for task in tasks), 60, "the first teacher")
    lab.cluster.kill_controller()
    time.sleep(3)
    lab.cluster.start_controller()
    lab.wait(lambda: all(is_done(run.trajectories(task)) for task in tasks), 120, "every teacher")
    assert {unit["state"] for name, unit in lab.status(run).items() if name.startswith("teacher")} == {"done"}


def test_a_lost_node_costs_nothing_that_was_published(prepared, lab):
    """slurmd of a node is killed under a stage and an array. Its old processes live on, and may not disturb the new."""
    stage = without_stage(prepared, lab.folder / "stage")
    array = Run(lab.folder / "array")
    lab.launch("--stage", "1", "--run", stage.folder, "cluster.scheduler.options={nodelist: 'n1,n2'}")
    config = lab.config(settings(["toy/slow-1", "toy/slow-2", "toy/c"], options={"nodelist": "n1"}))
    wait_for_progress(lab, stage)
    lab.launch("--stage", "teachers", "--config", config, "--run", array.folder)
    lab.wait(lambda: is_done(array.trajectories("toy/c")), 60, "the quick teacher")
    published = (array.trajectories("toy/c") / "DONE").stat().st_mtime_ns
    lab.cluster.kill_slurmd("n1")
    lab.wait(lambda: "n1" in lab.cluster.run("sinfo", "-h", "-t", "down", "-o", "%n").stdout, 60, "the node's loss")
    lab.cluster.up()
    lab.wait(lambda: is_done(stage.stage(1)), 150, "the stage")
    lab.wait(lambda: all(is_done(array.trajectories(f"toy/slow-{n}")) for n in (1, 2)), 150, "the teachers")
    assert student_hash(stage) == student_hash(prepared)
    assert (array.trajectories("toy/c") / "DONE").stat().st_mtime_ns == published
    assert attempt(array.teacher("toy/c"))["number"] == 1


def test_stop_and_save_reach_a_stage_of_four_ranks_which_goes_on_on_two(prepared, lab):
    run = without_stage(prepared, lab.folder / "run")
    lab.launch("--stage", "1", "--run", run.folder, "distill.ranks=4", "checkpoint_every_seconds=3600")
    lab.wait(
        lambda: list(run.logs.glob("slurm/*_0_log.out")) and "phase 1 step" in log_of(run, "stage 1"),
        90,
        "the first steps",
    )
    assert not checkpoints(run)
    run.save_file.touch()
    lab.wait(lambda: checkpoints(run), 20, "the checkpoint asked for")
    run.stop_file.touch()
    lab.wait(lambda: not lab.queue(), 60, "the end of all jobs")
    assert not is_done(run.stage(1)) and attempt(run.stage(1))["code"] == 3
    refused = lab.launch("--stage", "1", "--run", run.folder, expected=2)
    assert "STOP" in refused and "delete it" in refused
    run.stop_file.unlink()
    lab.launch("--stage", "1", "--run", run.folder, "distill.ranks=2", "cluster.scheduler.nodes_per_stage=1", "--wait")
    assert is_done(run.stage(1)) and attempt(run.stage(1))["number"] == 2
    steps = [json.loads(line)["step"] for line in (run.stage(1) / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 500  # no step was done twice, none left out


def test_a_job_near_its_time_limit_stops_and_goes_on_in_another(prepared, lab):
    """Slurm's own signal comes up to a minute early or not at all; the job asks how long it has left."""
    run = without_stage(prepared, lab.folder / "run")
    words = [
        "cluster.scheduler.time_limit_minutes=4",
        "cluster.scheduler.signal_seconds_before_end=238",
    ]  # near it as soon as it begins
    lab.launch("--stage", "1", "--run", run.folder, *words)
    job = job_of(run, "stage 1")
    lab.wait(lambda: "Restarts=1" in lab.cluster.run("scontrol", "show", "job", job).stdout, 200, "the second start")
    lab.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    lab.wait(lambda: is_done(run.stage(1)), 200, "the stage")
    assert "stopped: " in log_of(run, "stage 1")
    assert attempt(run.stage(1))["restart"] >= 1
    assert student_hash(run) == student_hash(prepared)


def test_a_cancelled_job_stays_cancelled(prepared, lab):
    run = without_stage(prepared, lab.folder / "run")
    lab.launch("--stage", "1", "--run", run.folder)
    wait_for_progress(lab, run)
    lab.cluster.run("scancel", job_of(run, "stage 1"))
    lab.wait(lambda: not lab.queue(), 60, "an empty queue")
    assert not is_done(run.stage(1))
    assert lab.status(run)["stage 1"]["state"] in ("stopped", "failed")


def test_inside_an_allocation_of_two_nodes_the_stage_runs_at_once(prepared, lab):
    run = without_stage(prepared, lab.folder / "run")
    words = [sys.executable, "-m", "hpc_cpd.launch", "--stage", "1", "--run", str(run.folder)]
    lab.run("salloc", "--nodes=2", "--ntasks-per-node=1", "--mem-per-cpu=400M", *words, cwd=ROOT)
    assert student_hash(run) == student_hash(prepared)
    assert not run.logs.joinpath("submitted.json").exists()


def test_a_node_that_eats_tasks_is_avoided(lab, request):
    """Its disk is read-only, so a job there fails before it can say a word."""
    if lab.cluster.run("id", "-u").stdout.strip() != "0":
        pytest.skip("only root can make a disk read-only for one node")
    run = Run(lab.folder / "run")
    run.logs.mkdir(parents=True)
    lab.cluster.enter("n1", "mount", "--bind", str(run.folder), str(run.folder))
    lab.cluster.enter("n1", "mount", "-o", "remount,bind,ro", str(run.folder))
    try:
        config = lab.config(settings([f"toy/{index}" for index in range(4)], max_retries=1))
        lab.launch("--stage", "teachers", "--config", config, "--run", run.folder, "--wait")
        assert all(is_done(run.trajectories(f"toy/{index}")) for index in range(4))
        submitted = json.loads((run.logs / "submitted.json").read_text())["units"]
        assert {node for unit in submitted.values() for node in unit["avoid"]} == {"n1"}
    finally:
        lab.cluster.enter("n1", "umount", str(run.folder))


def test_a_teacher_that_takes_too_much_memory_is_told_so_and_the_other_ends(slurm_site, tmp_path):
    cluster = SlurmCluster(nodes=1, cpus=4, kill_over_memory=True)
    try:
        lab = Lab(cluster.up(), tmp_path)
        run = Run(tmp_path / "run")
        config = lab.config(settings(["toy/hungry", "toy/b"], max_retries=0, memory_per_cpu="800M"))
        lab.launch("--stage", "teachers", "--config", config, "--run", run.folder)
        lab.wait(lambda: not lab.queue(), 90, "the end of all jobs")
        units = lab.status(run)
        assert units["teacher toy/b"]["state"] == "done"
        assert units["teacher toy/hungry"]["state"] == "given up"
        assert "memory" in units["teacher toy/hungry"]["error"].lower(), units["teacher toy/hungry"]
    finally:
        cluster.down(wipe=True)
