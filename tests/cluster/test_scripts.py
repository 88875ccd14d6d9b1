"""The job slurm_scripts, word for word, and the settings that cannot become one."""

import os
import subprocess
from pathlib import Path

import pytest

from hpc_cpd.cluster.schedulers import slurm_scripts
from hpc_cpd.cluster.submit import dependency
from hpc_cpd.config import parse_config
from hpc_cpd.errors import UserError
from hpc_cpd.run.paths import Run

GOLDEN = Path(__file__).with_name("golden_scripts.txt")
FOLDER = Path("/site/runs/mt")
LOGS = FOLDER / "logs/slurm"
PYTHON = "/site/.venv/bin/python"


def site_config(cluster=(), **more):
    settings = {
        "partition": "cpu",
        "stage_partition": "gpu",
        "account": "lab",
        "qos": "long",
        "constraint": "a100",
        "nodes_per_stage": 2,
        "gpus_per_node": 2,
        "cpus_per_rank": 3,
        "memory_per_cpu": "4G",
        "time_limit_minutes": 90,
        "signal_seconds_before_end": 300,
        "mpi_plugin": "pmix",
        "network_interface": "ib0",
        "setup": ["module load mpi", "ulimit -n 4096"],
        "options": {"reservation": "course", "exclusive": True},
    } | dict(cluster)
    return parse_config({"name": "mt", "teachers": {"ranks": 8}, "distill": {"ranks": 4}, "cluster": settings} | more)


def test_the_scripts_are_word_for_word_those_of_the_golden_file():
    run, config = Run(FOLDER), site_config()
    teachers = slurm_scripts.teachers_script(run, config, FOLDER / "logs/teachers-1.json", 12, 5, PYTHON)
    stage = slurm_scripts.stage_script(run, config, 2, python=PYTHON)
    caretaker = slurm_scripts.caretaker_script(run, config, python=PYTHON)
    after = dependency({"teacher a": "7_1", "teacher b": "7_2", "stage 1": "9"}, any_end=False)
    texts = [teachers.text(LOGS, avoid=["n3"]), stage.text(LOGS, after), caretaker.text(LOGS, "afternotok:7_1")]
    text = "\n=====\n".join(texts)
    if os.environ.get("WRITE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_what_must_hold_of_every_script_holds():
    run, config = Run(FOLDER), site_config()
    teachers = slurm_scripts.teachers_script(run, config, FOLDER / "plan.json", 12, 5).text(LOGS, avoid=["n3", "n4"])
    stage = slurm_scripts.stage_script(run, config, 1).text(LOGS)
    for line in ("--requeue", "--open-mode=append", "--signal=USR2@300", "--array=0-11%5", "--kill-on-bad-exit=1"):
        assert line in teachers
    assert "--mpi=pmix" in teachers and "--exclude=n3,n4" in teachers and "gpu" not in teachers
    assert "--mpi" not in stage and "--gpus-per-node=2" in stage and "--partition=gpu" in stage
    assert "GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0" in stage
    for text in (teachers, stage):
        assert "#SBATCH --reservation=course" in text and "#SBATCH --exclusive\n" in text


def test_a_stage_may_have_more_cores_per_rank_than_a_teacher():
    run, config = Run(FOLDER), site_config({"stage_cpus_per_rank": 7})
    teachers = slurm_scripts.teachers_script(run, config, FOLDER / "plan.json", 12, 5).text(LOGS)
    stage = slurm_scripts.stage_script(run, config, 1).text(LOGS)
    for text, cpus in ((teachers, 3), (stage, 7)):
        assert f"#SBATCH --cpus-per-task={cpus}\n" in text and f"OMP_NUM_THREADS={cpus} " in text
        assert text.count(f"--cpus-per-task={cpus} ") == 1  # of srun


@pytest.mark.parametrize("way", ["resubmit", "chain"])
def test_where_work_does_not_go_on_by_requeueing_slurm_is_told_not_to(way):
    text = slurm_scripts.stage_script(Run(FOLDER), site_config({"continuation": way}), 1).text(LOGS)
    assert "--no-requeue" in text and "--requeue" not in text


def test_a_folder_with_blanks_and_quotes_is_one_word_of_the_command():
    command = slurm_scripts.stage_script(Run("/site/my runs/it's"), site_config(), 1, python="/py").command
    done = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True)
    words = done.stdout.split("\n")
    assert words[words.index("--run") + 1] == "/site/my runs/it's"


def test_the_mere_end_of_teachers_may_be_waited_for_but_of_the_stage_before_its_success():
    after = {"teacher a": "7_1", "teacher b": "7_2", "stage 1": "9"}
    assert dependency(after, any_end=True) == "afterany:7_1:7_2,afterok:9"
    assert dependency(after, any_end=False) == "afterok:7_1:7_2:9"
    assert dependency({}, any_end=False) == ""


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"distill": {"ranks": 3}}, r"distill\.ranks is 3.*2 nodes.*multiple"),
        ({"distill": {"ranks": 8}}, r"distill\.ranks is 8, but 2 nodes with 2 GPUs.*set distill\.ranks=4"),
        ({"cluster": {"time_limit_minutes": 5}}, r"signal_seconds_before_end is 300.*time_limit_minutes"),
    ],
)
def test_ranks_nodes_and_times_that_do_not_fit_are_refused(more, words):
    cluster = more.pop("cluster", {})
    with pytest.raises(UserError, match=words):
        slurm_scripts.stage_script(Run(FOLDER), site_config(cluster, **more), 1)
