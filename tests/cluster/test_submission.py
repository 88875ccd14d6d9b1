"""What a launch hands to a real Slurm. The jobs are held, so nothing runs."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done, mark_done
from tests.cluster.lab import ROOT, Lab, job_of, merged, settings
from tests.cluster.slurm_cluster import SlurmCluster

TASKS = ["toy/a", "toy/b", "toy/c"]
HELD = settings(TASKS, options={"hold": True})


def dependency_of(lab: Lab, job: str) -> str:
    """In short form, ``afterok:7_0,afterok:7_1``."""
    text = lab.cluster.run("squeue", "-h", "-j", job, "-O", "Dependency:400").stdout.strip()
    return text.replace("(unfulfilled)", "").replace("_*", "")


def publish(run: Run, task: str) -> None:
    for folder in (run.teacher(task), run.trajectories(task)):
        folder.mkdir(parents=True)
        mark_done(folder, {})


def test_stages_wait_for_their_own_teachers_and_the_stage_before(lab: Lab):
    run = Run(lab.folder / "run")
    lab.launch("--stage", "all", "--config", lab.config(HELD), "--run", run.folder)
    array = job_of(run, "teacher toy/a").split("_")[0]
    first, second = job_of(run, "stage 1"), job_of(run, "stage 2")
    assert [job_of(run, f"teacher {task}") for task in TASKS] == [f"{array}_{index}" for index in range(3)]
    assert dependency_of(lab, first) == f"afterok:{array}_0,afterok:{array}_1"
    assert dependency_of(lab, second) == f"afterok:{array}_2,afterok:{first}"
    resubmitter = json.loads((run.logs / "submitted.json").read_text())["resubmitter"]
    watched = {f"afternotok:{job}" for job in (f"{array}_0", f"{array}_1", f"{array}_2", first, second)}
    assert set(dependency_of(lab, resubmitter).split("?")) == watched
    assert json.loads((run.logs / "teachers-1.json").read_text())["tasks"] == TASKS
    assert not [path for path in run.folder.rglob("*") if path.suffix == ".pkl"]


def test_launched_again_nothing_that_waits_is_submitted_twice_and_only_what_is_missing_at_all(lab: Lab):
    run = Run(lab.folder / "run")
    words = ["--stage", "all", "--run", run.folder]
    lab.launch(*words, "--config", lab.config(HELD))
    before = lab.queue("%i")
    assert "in the queue already" in lab.launch(*words)
    assert len(lab.queue("%i")) == len(before)
    publish(run, "toy/a")
    lab.cluster.run("scontrol", "hold", json.loads((run.logs / "submitted.json").read_text())["resubmitter"])
    lab.cluster.run("scancel", job_of(run, "teacher toy/b"), job_of(run, "stage 1"))
    lab.wait(lambda: len(lab.queue()) <= len(before) - 2, 20, "two cancelled jobs")
    old = job_of(run, "teacher toy/c")
    lab.launch(*words)
    assert json.loads((run.logs / "teachers-2.json").read_text())["tasks"] == ["toy/b"]
    assert job_of(run, "teacher toy/c") == old
    assert dependency_of(lab, job_of(run, "stage 1")) == f"afterok:{job_of(run, 'teacher toy/b')}"


def test_two_people_at_once_submit_each_job_once(lab: Lab):
    import threading

    run = Run(lab.folder / "run")
    words = ["--stage", "all", "--config", lab.config(HELD), "--run", run.folder]
    outputs: list[str] = []
    people = [threading.Thread(target=lambda: outputs.append(lab.launch(*words, expected=None))) for _ in range(2)]
    for person in people:
        person.start()
    for person in people:
        person.join()
    submitted = [line for line in lab.queue("%i %j %o") if str(run.folder) in line]
    said = "\n".join([*lab.queue("%i %j %T %o"), *outputs])
    assert len(submitted) == len(TASKS) + 2 + 1, said  # teachers, stages, resubmitter
    assert any("in the queue already" in text or "is being worked on" in text for text in outputs)


def test_a_launch_told_to_stop_submits_no_more_and_the_next_one_the_rest(lab: Lab):
    run = Run(lab.folder / "run")
    sbatch = lab.folder / "bin" / "sbatch"  # tells its caller to stop as soon as the first job is submitted
    sbatch.parent.mkdir()
    real = shutil.which("sbatch", path=lab.environment["PATH"])
    sbatch.write_text(f'#!/bin/sh\n{real} "$@" && [ "$1" = --version ] || kill -TERM $PPID\n')
    sbatch.chmod(0o755)
    words = ["--stage", "all", "--config", lab.config(HELD), "--run", run.folder]
    path = lab.environment["PATH"]
    lab.environment["PATH"] = f"{sbatch.parent}:{path}"
    assert "not all jobs were submitted" in lab.launch(*words, expected=3)
    assert len(lab.queue()) == len(TASKS)
    lab.environment["PATH"] = path
    lab.launch(*words)
    assert len(lab.queue()) == len(TASKS) + 2 + 1


def test_a_dry_run_prints_the_very_scripts_and_touches_nothing(lab: Lab):
    run = Run(lab.folder / "run")
    words = ["--stage", "all", "--config", lab.config(HELD), "--run", run.folder]
    printed = lab.launch(*words, "--dry-run", cluster="auto")  # sbatch answers: auto means Slurm
    assert not run.folder.exists() and not lab.queue()
    assert printed.count("#!/bin/bash") == 3
    lab.launch(*words)
    for unit in ("teacher toy/a", "stage 1", "stage 2"):
        job = job_of(run, unit).split("_")[0]
        script = (run.logs / "slurm" / f"{job}_submission.sh").read_text()
        without = "\n".join(line for line in script.splitlines() if "--dependency" not in line)
        assert without.strip() in "\n".join(line for line in printed.splitlines() if "--dependency" not in line)


def test_a_driver_job_submits_whatever_memory_it_was_given_itself(lab: Lab):
    """sbatch slurm/teachers.sh with --mem-per-cpu, which an inner --mem would contradict, and the other way round."""
    run = Run(lab.folder / "run")
    config = lab.config(merged(HELD, cluster={"scheduler": {"options": {"hold": True, "mem": "300M"}}}))
    lab.run(
        "sbatch", "--wait", "--mem-per-cpu=500M", f"--output={lab.folder}/driver.out",
        "slurm/teachers.sh", config, "--run", run.folder,
        cwd=ROOT,
    )  # fmt: skip
    assert "3 teachers: job" in (lab.folder / "driver.out").read_text()
    assert len(lab.queue()) == len(TASKS) + 1


def test_slurms_refusal_is_told_in_its_own_words(lab: Lab):
    words = ["--config", lab.config(HELD), "--run", lab.folder / "run", "cluster.scheduler.partition=nowhere"]
    printed = lab.launch("--stage", "teachers", *words, expected=2)
    assert "invalid partition specified: nowhere" in printed.splitlines()[-1]
    assert "Traceback" not in printed


def test_more_teachers_than_an_array_may_hold_go_into_several(tmp_path: Path, slurm_site: SlurmCluster):
    cluster = SlurmCluster(nodes=1, gpus=0, max_array_size=4)
    try:
        lab = Lab(cluster.up(), tmp_path)
        run, tasks = Run(tmp_path / "run"), [f"toy/{index}" for index in range(10)]
        words = ["--stage", "teachers", "--config", lab.config(settings(tasks, options={"hold": True}))]
        lab.launch(*words, "--run", run.folder)
        assert [len(json.loads((run.logs / f"teachers-{n}.json").read_text())["tasks"]) for n in (1, 2, 3)] == [4, 4, 2]
        assert len({job_of(run, f"teacher {task}") for task in tasks}) == 10
        assert len(lab.queue()) == 10 + 1
        lab.clear()
    finally:
        cluster.down(wipe=True)


def test_a_submission_waits_for_a_controller_that_restarts(lab: Lab):
    run = Run(lab.folder / "run")
    lab.cluster.kill_controller()
    import threading

    again = threading.Timer(3, lab.cluster.start_controller)
    again.start()
    try:
        printed = lab.launch("--stage", "teachers", "--config", lab.config(HELD), "--run", run.folder, expected=None)
    finally:
        again.join()
    assert "3 teachers: job" in printed, printed


def test_a_stage_alone_is_refused_before_its_teachers_are_done_or_queued(lab: Lab):
    run = Run(lab.folder / "run")
    begin = time.monotonic()
    printed = lab.launch("--stage", "1", "--config", lab.config(HELD), "--run", run.folder, expected=2)
    assert "stage 1 cannot start; it needs the teachers of toy/a, toy/b" in printed
    assert time.monotonic() - begin < 30 and not lab.queue()
    assert not run.folder.exists()
    lab.launch("--stage", "teachers", "--config", lab.config(HELD), "--run", run.folder)
    lab.launch("--stage", "1", "--run", run.folder)
    assert dependency_of(lab, job_of(run, "stage 1")).count("afterok") == 2


def test_a_stage_on_gpu_nodes_differs_by_a_setting_only(lab: Lab):
    run = Run(lab.folder / "run")
    for task in TASKS:
        publish(run, task)
    words = ["distill.ranks=4", "cluster.scheduler.nodes_per_stage=2", "cluster.scheduler.gpus_per_node=2"]
    lab.launch("--stage", "1", "--config", lab.config(HELD), "--run", run.folder, *words)
    shown = lab.cluster.run("scontrol", "show", "job", job_of(run, "stage 1")).stdout
    assert "NumNodes=2" in shown and "NumTasks=4" in shown and "gpu:2" in shown


def test_a_resubmitter_takes_up_what_lost_what_it_waited_for_and_leaves_what_a_person_cancelled(lab: Lab):
    run = Run(lab.folder / "run")
    lab.launch("--stage", "all", "--config", lab.config(HELD), "--run", run.folder)
    lost, unwanted = job_of(run, "stage 1"), job_of(run, "stage 2")
    lab.cluster.run("scancel", unwanted)
    fine = lab.cluster.submit("--output=/dev/null", "--wrap", "true")
    lab.wait(lambda: lab.cluster.state(fine) == "COMPLETED", 30, "a job that is fine")
    lab.cluster.run("scontrol", "update", f"job={lost}", f"dependency=afternotok:{fine}")
    lab.cluster.run("scontrol", "release", lost)
    lab.wait(lambda: job_of(run, "stage 1") != lost, 60, "the stage's next job")
    log = (run.logs / "resubmitter.log").read_text()
    assert f"stage 2: job {unwanted} was cancelled; it is left alone" in log
    assert "stage 1: what it waited for had failed; submitted again" in log
    assert job_of(run, "stage 1") != lost and job_of(run, "stage 2") == unwanted


def test_a_resubmitter_leaves_an_array_that_a_person_cancelled_before_it_began(lab: Lab):
    """Slurm then tells of the array as a whole, and no longer of its elements."""
    run = Run(lab.folder / "run")
    lab.launch("--stage", "all", "--config", lab.config(HELD), "--run", run.folder)
    before = json.loads((run.logs / "submitted.json").read_text())
    lab.cluster.run("scancel", "--jobname=toy-teachers")
    lab.wait(lambda: lab.cluster.state(before["resubmitter"]) == "COMPLETED", 60, "the end of the resubmitter")
    log = (run.logs / "resubmitter.log").read_text()
    for task in TASKS:
        assert f"teacher {task}: job {job_of(run, f'teacher {task}')} was cancelled; it is left alone" in log
    assert json.loads((run.logs / "submitted.json").read_text())["units"] == before["units"]


@pytest.mark.parametrize("more", [[], ["--allow-missing"]])
def test_on_this_machine_too_allow_missing_goes_on_after_a_teacher_without_success(lab: Lab, more: list[str]):
    run = Run(lab.folder / "run")
    config = lab.config(merged(settings(["toy/hopeless", "toy/a"]), trajectories={"success_only": True, "episodes": 1}))
    one_at_a_time = ["taskset", "-c", str(min(os.sched_getaffinity(0)))]
    words = [sys.executable, "-m", "hpc_cpd.launch", "--cluster", "local", "--stage", "teachers", "--config", config]
    printed = lab.run(*one_at_a_time, *words, "--run", run.folder, *more, expected=None)
    assert "toy/hopeless never succeeded" in printed
    assert is_done(run.teacher("toy/a")) == bool(more)
