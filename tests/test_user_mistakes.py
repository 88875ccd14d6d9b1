"""Mistakes at the front door: exit code 2, one sentence, no traceback, nothing written."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from hpc_cpd.config import load_config
from hpc_cpd.distill.validation import check_settings
from hpc_cpd.distributed.torch import require_gpus
from hpc_cpd.errors import UserError
from hpc_cpd.run.paths import Run

ROOT = Path(__file__).parents[1]
CAR = "gymnasium/MountainCarContinuous-v0"
MT10 = ["--config", "configs/mt10.yaml"]


def call(module: str, *words: str, **more) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, **more)


def refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if line]
    assert sentence.startswith("error: ")
    for part in parts:
        assert part in sentence


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--stage", "all", *MT10, "stream.taks=MT25"], ["stream.taks", "did you mean 'stream.tasks'"]),
        (["--stage", "all", *MT10, "seed=many"], ["'seed'", "integer", "'many'"]),
        (["--stage", "all", *MT10, "seed"], ["'seed' is not an override", "key=value"]),
        (["--stage", "all", "--config", "configs/mt11.yaml"], ["configs/mt11.yaml", "--config"]),
        (["--stage", "all", *MT10, "stream.tasks=[metaworld/raech-v3]"], ["did you mean 'metaworld/reach-v3'"]),
        (["--stage", "all", *MT10, "stream.tasks=MT11"], ["MT11", "MT10, MT25, MT50"]),
        (["--stage", "all", *MT10, "method=lora", "evaluation.infer_task=true"], ["method lora", "infer_task=false"]),
        (["--stage", "3", *MT10], ["--stage is '3'", "1 to 2"]),
        (["--stage", "all", *MT10, f"stream.tasks=[{CAR}]"], ["no scripted policy", "start=scratch"]),
        (
            ["--stage", "all", *MT10, "stream.tasks=[gymnasium/Pendulum-v1]"],
            ["never reports success"],
        ),
        (
            ["--stage", "all", *MT10, "stream.tasks=[gymnasium/CartPole-v1]"],
            ["actions Discrete(2)", "nothing"],
        ),
        (["--stage", "teachers", *MT10, "--ranks", "32"], ["teachers.algorithm.num_envs is 16", "32 ranks"]),
        (["--stage", "first", *MT10], ["'first'", "teachers, or all"]),
        ([*MT10], ["--stage", "for example --stage all"]),
        (["--stage", "all", *MT10, "--seed", "1"], ["--seed", "without dashes", "seed=1"]),
        (["--stage", "all", *MT10, "stream.tasks=metaworld/reach-v3,metaworld/push-v3"], ["'stream.tasks=[metaworld"]),
        (
            ["--stage", "all", *MT10, "stream.tasks=[metaworld/reach-v3, gymnasium/Pendulum-v1]"],
            ["metaworld/reach-v3", "[39]", "gymnasium/Pendulum-v1", "[3]"],
        ),
    ],
)
def test_a_mistake_in_the_words_is_named_and_nothing_is_written(tmp_path, words, parts):
    run = tmp_path / "run"
    refused(call("hpc_cpd.launch", *words, "--cluster", "local", "--run", str(run)), *parts)
    assert not run.exists()


def test_a_run_that_is_not_there_is_not_begun_by_accident(tmp_path):
    refused(call("hpc_cpd.launch", "--stage", "1", "--run", str(tmp_path / "rnu")), "rnu", "--config")


def test_a_stage_without_its_needs_names_them_and_the_commands(tmp_path):
    run = str(tmp_path / "run")
    done = call("hpc_cpd.launch", "--stage", "2", *MT10, "--cluster", "local", "--run", run)
    command = f"python -m hpc_cpd.launch --run {run} --stage"
    refused(done, "metaworld/window-close-v3", f"{command} teachers", "the student of stage 1", f"{command} 1")
    assert "metaworld/reach-v3" not in done.stderr  # a task of stage 1 is no need of stage 2
    assert not (tmp_path / "run").exists()


@pytest.fixture
def begun(tmp_path) -> Run:
    """A run of MT10 of which nothing is done."""
    run = Run(tmp_path / "run")
    run.open(load_config(ROOT / "configs" / "mt10.yaml"), {})
    return run


def test_other_settings_for_an_existing_run_are_refused_key_by_key(begun):
    run = ["--run", str(begun.folder), "--cluster", "local"]
    words = ["--stage", "2", *run, "seed=5", "student.width=64"]
    refused(call("hpc_cpd.launch", *words), "seed was 0", "student.width was")
    done = call("hpc_cpd.launch", "--stage", "2", *run, "--ranks", "3")  # how, not what: that may differ
    refused(done, "stage 2 cannot start")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--stage", "all", "seed=7"], "seed was 0 and is now 7"),
        (["--stage", "all", "--ranks", "32"], "teachers.algorithm.num_envs is 16"),
        (["--stage", "2"], "stage 2 cannot start"),
    ],
)
def test_a_dry_run_refuses_what_a_launch_refuses_and_neither_writes_anything(begun, words, part):
    before = {path: path.read_bytes() for path in begun.folder.rglob("*") if path.is_file()}
    for more in (["--dry-run"], []):
        refused(call("hpc_cpd.launch", *words, "--cluster", "local", "--run", str(begun.folder), *more), part)
    assert {path: path.read_bytes() for path in begun.folder.rglob("*") if path.is_file()} == before


def test_a_dry_run_refuses_ranks_that_do_not_fit_the_nodes_before_it_prints_a_script(begun):
    words = ["--cluster", "slurm", "distill.ranks=3", "cluster.scheduler.nodes_per_stage=2", "--dry-run"]
    done = call("hpc_cpd.launch", "--stage", "all", "--run", str(begun.folder), *words)
    refused(done, "distill.ranks is 3", "make it a multiple")
    assert done.stdout == ""


def test_a_stop_file_is_told_by_a_dry_run_too(begun):
    begun.stop_file.touch()
    words = ["--stage", "all", "--cluster", "local", "--run", str(begun.folder)]
    for more in ([], ["--dry-run"]):
        refused(call("hpc_cpd.launch", *words, *more), "STOP asks every job", "delete it")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["student.backbone.heads=3"], ["student.width is 128", "student.backbone.heads"]),
        (["student.backbone.mixtures=2"], ["student.backbone.mixtures is 2", "student.backbone.layers, 1"]),
        (["teachers.algorithm.hidden=[256, 0]"], ["teachers.algorithm.hidden.1", "greater than 0"]),
        (["teachers.source.folder=runs/x/student"], ["unknown setting 'teachers.source.folder'"]),
        (["distill.ranks=4", "distill.expert_parallel_size=3"], ["expert_parallel_size is 3", "distill.ranks, 4"]),
        (["distill.target=executed", "method.dagger.episodes=5"], ["the student's own", "distill.target=mean"]),
        (["seed=20260115123456"], ["'seed'", "4294967295"]),
        (["evaluation.seed=4294967295"], ["evaluation.seed", "4294967293"]),
        (["evaluation.infer_task=true", "student.task_embedding=one_hot"], ["infer_task", "one_hot"]),
        (["student.top_k=2", "distill.phase1_steps=0"], ["student.top_k is 2", "phase1_steps is 0"]),
        (["distill.penalty=ewc"], ["'distill.penalty' is now", "method"]),
    ],
)
def test_settings_that_could_only_fail_after_the_teachers_are_refused_before_them(words, parts):
    with pytest.raises(UserError) as refusal:
        check_settings(load_config(ROOT / "configs" / "quickstart.yaml", words), [["a/b"], ["a/c"]])
    for part in parts:
        assert part in str(refusal.value)


def test_one_stage_alone_may_begin_with_phase_2():
    check_settings(load_config(None, ["student.top_k=2", "distill.phase1_steps=0"]), [["a/b"]])


@pytest.mark.parametrize(
    ("text", "words", "part"),
    [
        ("# f\u00fcr alle\nname: x\n".encode("latin-1"), [], "not valid YAML"),
        (b"name: 2026-02-30\n", [], "not valid YAML"),
        (b"cluster: gpu\n", ["cluster.site=configs/cluster/example.yaml"], "'cluster' is a single value, 'gpu'"),
    ],
)
def test_a_file_that_cannot_be_read_as_settings_is_named(tmp_path, text, words, part):
    (tmp_path / "lab.yaml").write_bytes(text)
    with pytest.raises(UserError, match=part):
        load_config(tmp_path / "lab.yaml", words)


def test_a_word_that_looks_like_a_date_and_is_none_is_text():
    assert load_config(None, ["name=2026-02-30"]).name == "2026-02-30"


@pytest.mark.parametrize(("gpus", "ranks", "fits"), [(0, 8, True), (4, 4, True), (4, 2, True), (1, 2, False)])
def test_more_ranks_than_gpus_are_refused(monkeypatch, gpus, ranks, fits):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    refusal = pytest.raises(UserError, match=f"{ranks} ranks.*shows {gpus}; set distill.ranks={gpus}")
    with nullcontext() if fits else refusal:
        require_gpus(ranks)


@pytest.mark.parametrize("folder", ["/dev/null/run", "/proc/run"])
def test_a_folder_that_cannot_be_made_is_named(folder):
    refused(call("hpc_cpd.launch", "--stage", "all", *MT10, "--cluster", "local", "--run", folder), folder, "--run")


def test_a_full_disk_is_one_sentence(tmp_path):
    # every write of the launcher beyond a few bytes fails, as on a full disk
    program = (
        "import errno, os, sys, hpc_cpd.run.publish as run, hpc_cpd.launch as launch\n"
        "def full(path, data): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))\n"
        "run.write_bytes = full\n"
        "sys.exit(launch.main(sys.argv[1:]))\n"
    )
    words = ["--stage", "all", *MT10, "--cluster", "local", "--run", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    refused(done, "provenance.json", "disk is full")


def test_a_read_only_folder_is_one_sentence(tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    words = ["--stage", "all", *MT10, "--cluster", "local", "--run", str(folder / "run")]
    # root may write anywhere, unless it gives up the right to
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.getuid() == 0 else []
    command = [*drop, sys.executable, "-m", "hpc_cpd.launch", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    refused(done, str(folder), "permission was refused", "--run")


def test_two_launches_of_one_run_do_not_fight(tmp_path):
    from hpc_cpd.run.lock import Lock

    with Lock(tmp_path / "run", "the run"):
        done = call("hpc_cpd.launch", "--stage", "all", *MT10, "--cluster", "local", "--run", str(tmp_path / "run"))
    refused(done, f"process {os.getpid()}", "wait for it")


def test_slurm_where_there_is_none(tmp_path):
    environment = {**os.environ, "PATH": "/nonexistent"}
    words = ["--stage", "all", *MT10, "--cluster", "slurm", "--run", str(tmp_path / "run")]
    refused(call("hpc_cpd.launch", *words, env=environment), "slurm does not answer here", "--cluster local")


@pytest.mark.parametrize(
    "words", [["status", "no"], ["verify", "no"], ["report", "no"], ["evaluate", "no"], ["export", "no", "--out", "x"]]
)
def test_a_door_to_no_run_says_so(words):
    refused(call("hpc_cpd", *words), "no is not a run folder")


@pytest.mark.parametrize("module", ["hpc_cpd", "hpc_cpd.launch"])
def test_a_python_without_our_requirements_is_named(module):
    done = subprocess.run([sys.executable, "-S", "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
    refused(done, sys.executable, "no package '", ".venv/bin/python")


def test_a_key_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "lab.yaml").write_text("stream: {tasks: MT10}\nseed: 1\nstream: {tasks_per_stage: 2}\n")
    with pytest.raises(UserError, match=r"'stream' stands twice.*line 3"):
        load_config(tmp_path / "lab.yaml")
