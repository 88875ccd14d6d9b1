"""The job scripts, word for word, and the settings that cannot become one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_cpd.cluster.schedulers._slurm_scripts import Scripts
from hpc_cpd.cluster.schedulers.base import scheduler_of
from hpc_cpd.cluster.schedulers.slurm import Slurm, dependency
from hpc_cpd.cluster.units import StageUnit, request_of
from hpc_cpd.config import parse_config
from hpc_cpd.errors import UserError
from hpc_cpd.run.paths import Run

GOLDEN = Path(__file__).with_name("golden_scripts.txt")
FOLDER = Path("/site/runs/mt")
LOGS = FOLDER / "logs/slurm"


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
    return parse_config(
        {"name": "mt", "teachers": {"ranks": 8}, "distill": {"ranks": 4}, "cluster": {"scheduler": settings}} | more
    )


@pytest.fixture(autouse=True)
def python_of_the_site(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/site/.venv/bin/python")


def scripts_of(config, run=FOLDER) -> Scripts:
    slurm = scheduler_of(config)
    assert isinstance(slurm, Slurm)
    return slurm.scripts(request_of(Run(run), config, [["a"], ["b"]], "all"))


def stage_of(config, number=1, **more):
    scripts = scripts_of(config, **more)
    return scripts.stage(StageUnit(scripts.request.run, number))


def test_the_scripts_are_word_for_word_those_of_the_golden_file():
    scripts = scripts_of(site_config())
    teachers, stage = scripts.teachers(FOLDER / "logs/teachers-1.json", 12, 5), stage_of(site_config(), 2)
    resubmitter = scripts.resubmitter()
    after = dependency(["7_1", "7_2"], ["9"], any_end=False)
    texts = [teachers.text(LOGS, avoid=["n3"]), stage.text(LOGS, after), resubmitter.text(LOGS, "afternotok:7_1")]
    text = "\n=====\n".join(texts)
    if os.environ.get("WRITE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_what_must_hold_of_every_script_holds():
    config = site_config()
    teachers = scripts_of(config).teachers(FOLDER / "plan.json", 12, 5).text(LOGS, avoid=["n3", "n4"])
    stage = stage_of(config).text(LOGS)
    for line in ("--requeue", "--open-mode=append", "--signal=USR2@300", "--array=0-11%5", "--kill-on-bad-exit=1"):
        assert line in teachers
    assert "--mpi=pmix" in teachers and "--exclude=n3,n4" in teachers and "gpu" not in teachers
    assert "--mpi" not in stage and "--gpus-per-node=2" in stage and "--partition=gpu" in stage
    assert "GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0" in stage
    for text in (teachers, stage):
        assert "#SBATCH --reservation=course" in text and "#SBATCH --exclusive\n" in text


def test_a_stage_may_have_more_cores_per_rank_than_a_teacher():
    config = site_config({"stage_cpus_per_rank": 7})
    teachers = scripts_of(config).teachers(FOLDER / "plan.json", 12, 5).text(LOGS)
    stage = stage_of(config).text(LOGS)
    for text, cpus in ((teachers, 3), (stage, 7)):
        assert f"#SBATCH --cpus-per-task={cpus}\n" in text and f"OMP_NUM_THREADS={cpus} " in text
        assert text.count(f"--cpus-per-task={cpus} ") == 1  # of srun


@pytest.mark.parametrize("way", ["resubmit", "chain"])
def test_where_work_does_not_go_on_by_requeueing_slurm_is_told_not_to(way):
    text = stage_of(site_config({"continuation": way})).text(LOGS)
    assert "--no-requeue" in text and "--requeue" not in text


def test_a_folder_with_blanks_and_quotes_is_one_word_of_the_command():
    command = stage_of(site_config(), run="/site/my runs/it's").command
    done = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True)
    words = done.stdout.split("\n")
    assert words[words.index("--run") + 1] == "/site/my runs/it's"


def test_the_mere_end_of_teachers_may_be_waited_for_but_of_the_stage_before_its_success():
    assert dependency(["7_1", "7_2"], ["9"], any_end=True) == "afterany:7_1:7_2,afterok:9"
    assert dependency(["7_1", "7_2"], ["9"], any_end=False) == "afterok:7_1:7_2:9"
    assert dependency([], [], any_end=False) == ""


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
        stage_of(site_config(cluster, **more))


def test_another_submitit_that_writes_scripts_otherwise_is_named_in_one_sentence(monkeypatch):
    monkeypatch.delattr("submitit.slurm.slurm._make_sbatch_string")
    with pytest.raises(UserError, match=r"submitit 1\.5.* writes job scripts in another way.*pip install"):
        stage_of(site_config()).text(LOGS)
