"""The private cluster itself: what the tests that run on it rely on."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster import slurm_files
from tests.cluster.conftest import bring_down_leftovers, need_slurm
from tests.cluster.processes import processes
from tests.cluster.slurm_cluster import SlurmCluster

ROOT = Path(__file__).parents[2]
SMALL = ("--mem-per-cpu=10", "-o", "/dev/null")


def that_mention(folder: Path) -> list[str]:
    """Living processes whose environment, command line, open files or mounts have to do with `folder`."""
    found, mark = [], str(folder).encode()
    for process in processes():
        texts = [process.text(name) for name in ("environ", "cmdline", "mountinfo")]
        with suppress(OSError):  # it has ended, or belongs to somebody else
            texts += [os.readlink(entry.path).encode() for entry in os.scandir(f"/proc/{process.pid}/fd")]
        if process.pid != os.getpid() and any(mark in text for text in texts):
            found.append(f"{process.pid} {process.program}")
    return found


def is_in(cluster: SlurmCluster, job: str, *states: str, seconds: float = 20) -> bool:
    return cluster.wait_for(lambda: cluster.state(job) in states, seconds, f"job {job} is {states}")


@pytest.fixture
def cluster() -> Iterator[SlurmCluster]:
    """A cluster that a test may break."""
    need_slurm()
    made = SlurmCluster(nodes=2)
    yield made.up()
    if made.folder.exists():
        made.down(wipe=True)


@pytest.fixture
def site(slurm_site: SlurmCluster) -> Iterator[SlurmCluster]:
    yield slurm_site
    slurm_site.run("scancel", "-t", "PENDING")
    slurm_site.run("scancel", "-f", "-s", "KILL", "-t", "RUNNING")
    slurm_site.run("scancel", "-t", "RUNNING")


def only_root(cluster: SlurmCluster) -> None:
    if not cluster.own_names:
        pytest.skip("only root's nodes have names, devices and mounts of their own")


def test_up_again_starts_nothing(site: SlurmCluster) -> None:
    before = that_mention(site.folder)
    SlurmCluster.open(site.folder).up()
    assert that_mention(site.folder) == before
    assert len(before) >= 6  # munged, the controller, four nodes


def test_a_job_over_two_nodes_sees_two_host_names(site: SlurmCluster) -> None:
    only_root(site)
    names = site.run("srun", "-N2", "--ntasks-per-node=1", "-w", "n2,n4", "hostname").stdout.split()
    assert sorted(names) == ["n2", "n4"]


def test_the_nodes_find_each_other_by_name_and_the_machine_does_not(site: SlurmCluster) -> None:
    only_root(site)
    assert site.run("srun", "-w", "n2", "getent", "hosts", "n4").stdout.split()[:2] == ["127.0.0.1", "n4"]
    assert site.enter("n3", "hostname").stdout == "n3\n"
    assert "n4" not in Path("/etc/hosts").read_text().split()


def test_a_job_without_slurm_conf_still_finds_this_cluster(site: SlurmCluster) -> None:
    only_root(site)
    if not Path("/etc/slurm").is_dir():
        pytest.skip("nothing can be mounted on /etc/slurm where it does not exist")
    shown = site.run("srun", "env", "-u", "SLURM_CONF", "scontrol", "show", "config").stdout
    assert f"{site.folder}/state" in shown


def test_fake_gpus_are_shared_out(site: SlurmCluster) -> None:
    only_root(site)
    ask = ("sh", "-c", "echo $CUDA_VISIBLE_DEVICES")
    assert site.run("srun", "--gpus-per-node=2", *ask).stdout == "0,1\n"
    assert site.run("srun", "--gpus-per-node=1", *ask).stdout in ("0\n", "1\n")
    assert site.run("srun", *ask).stdout == "\n"
    assert site.run("srun", "--immediate=1", "--gpus-per-node=3", "true", check=False).returncode != 0


def test_a_job_in_low_gives_way_to_high_and_runs_again(site: SlurmCluster, tmp_path: Path) -> None:
    said = tmp_path / "said.txt"
    script = f'echo ${{SLURM_RESTART_COUNT:-0}} >>{said}; [ -n "$SLURM_RESTART_COUNT" ] || sleep 100'
    low = site.submit(*SMALL, "-p", "low0", "-w", "n1", "--wrap", script)
    is_in(site, low, "RUNNING")
    site.wait_for(said.exists, 10)
    high = site.submit(*SMALL, "-p", "high", "-w", "n1", "--exclusive", "--wrap", "true")
    is_in(site, low, "PENDING")
    is_in(site, high, "COMPLETED")
    is_in(site, low, "COMPLETED")
    assert said.read_text().split() == ["0", "1"]


def test_a_job_in_cancel_that_gives_way_is_preempted_for_good(site: SlurmCluster) -> None:
    low = site.submit(*SMALL, "-p", "cancel0", "-w", "n2", "--wrap", "sleep 100")
    is_in(site, low, "RUNNING")
    high = site.submit(*SMALL, "-p", "high", "-w", "n2", "--exclusive", "--wrap", "true")
    is_in(site, low, "PREEMPTED")
    is_in(site, high, "COMPLETED")


def test_the_signal_at_preemption_can_be_switched(site: SlurmCluster) -> None:
    for wanted in (False, True):
        site.reconfigure(user_signal=wanted)
        assert ("preempt_send_user_signal" in site.run("scontrol", "show", "config").stdout) == wanted
        assert SlurmCluster.open(site.folder).user_signal == wanted


def test_the_state_of_a_job(site: SlurmCluster) -> None:
    job = site.submit(*SMALL, "--wrap", "exit 3")
    is_in(site, job, "FAILED")
    assert site.state("987654") == ""


def test_a_command_that_fails_says_why(site: SlurmCluster) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        site.submit("--partition=nowhere", "--wrap", "true")
    assert "invalid partition" in "".join(caught.value.__notes__)


def test_two_clusters_do_not_disturb_each_other(site: SlurmCluster, cluster: SlurmCluster) -> None:
    mine = site.submit(*SMALL, "--wrap", "sleep 100")
    is_in(site, mine, "RUNNING")
    other = cluster.submit(*SMALL, "-N2", "--wrap", "sleep 100")
    is_in(cluster, other, "RUNNING")
    cluster.down(wipe=True)
    assert not that_mention(cluster.folder)
    assert site.state(mine) == "RUNNING"
    assert site.run("srun", "-N4", "true").returncode == 0


@pytest.mark.parametrize("wipe", [False, True])
def test_down_leaves_no_process(cluster: SlurmCluster, wipe: bool) -> None:
    # a task that hides: no parent, no session, no environment
    hidden = "setsid -f env -i sleep 54321; sleep 100"
    job = cluster.submit(*SMALL, "-N2", "--wrap", f"srun sh -c '{hidden}'")
    is_in(cluster, job, "RUNNING")
    cluster.submit(*SMALL, "--begin=now+1hour", "--wrap", "true")
    cluster.wait_for(lambda: len(_sleepers(cluster)) >= 2, 10, "the tasks run")
    cluster.down(wipe=wipe)
    assert that_mention(cluster.folder) == []
    assert cluster.folder.exists() != wipe
    if not wipe:
        cluster.up()  # what ran or waited does not come back, and the next job has the next number
        assert cluster.wait_for(lambda: {cluster.state("1"), cluster.state("2")} == {"CANCELLED"}, 10)
        assert cluster.submit(*SMALL, "--wrap", "true") == "3"


def _sleepers(cluster: SlurmCluster) -> list[int]:
    mark = f"{cluster.folder.name}/hosts/".encode() if cluster.own_names else b"SLURM_CONF=" + bytes(cluster.conf)
    found = [p for p in processes() if p.program == "sleep" and mark in p.text("mountinfo") + p.text("environ")]
    return [p.pid for p in found]


def test_a_step_whose_slurmd_was_killed_goes_on_and_ends_with_the_cluster(cluster: SlurmCluster) -> None:
    job = cluster.submit(*SMALL, "-w", "n1", "--wrap", "sleep 100")
    is_in(cluster, job, "RUNNING")
    cluster.wait_for(lambda: _sleepers(cluster), 10)
    cluster.kill_slurmd("n1")
    assert _sleepers(cluster)
    cluster.down(wipe=True)
    assert that_mention(cluster.folder) == []


def test_a_node_without_power_has_no_process_and_the_others_go_on(cluster: SlurmCluster) -> None:
    only_root(cluster)
    for node in ("n1", "n2"):  # two jobs: Slurm ends the whole of one that lost a node
        is_in(cluster, cluster.submit(*SMALL, "-w", node, "--wrap", "sleep 100"), "RUNNING")
    cluster.wait_for(lambda: len(_sleepers(cluster)) == 2, 10)
    cluster.power_off("n1")
    assert len(_sleepers(cluster)) == 1
    SlurmCluster.open(cluster.folder).up()
    assert cluster.run("srun", "--overcommit", "-w", "n1", "hostname").stdout == "n1\n"


def test_the_controller_comes_back_with_its_jobs(cluster: SlurmCluster) -> None:
    job = cluster.submit(*SMALL, "--hold", "--wrap", "true")
    cluster.reconfigure(user_signal=False)  # writes the state, which otherwise takes seconds
    cluster.kill_controller()
    assert "slurmctld" not in " ".join(that_mention(cluster.folder))  # a client would try again for ten seconds
    cluster.start_controller()
    assert cluster.state(job) == "PENDING"


def test_with_accounting_sacct_knows_how_a_job_ended(slurm_with_accounting: SlurmCluster) -> None:
    job = slurm_with_accounting.submit(*SMALL, "--wrap", "exit 3")
    ask = ("sacct", "-n", "-X", "-P", "-j", job, "-o", "State,ExitCode")
    slurm_with_accounting.wait_for(lambda: slurm_with_accounting.run(*ask).stdout == "FAILED|3:0\n", 20)


def by_hand(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.cluster.slurm_cluster", *words]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)


def test_by_hand_up_prints_a_line_for_the_shell(tmp_path_factory: pytest.TempPathFactory) -> None:
    need_slurm()
    folder = slurm_files.new_folder()
    try:
        for _ in range(2):
            done = by_hand("up", "--folder", str(folder), "--nodes", "2")
            assert (done.returncode, done.stdout) == (0, f"export SLURM_CONF={folder}/etc/slurm.conf\n"), done.stderr
        shell = f"{done.stdout} srun -N2 hostname"
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        assert len(subprocess.check_output(["sh", "-c", shell], env=clean, text=True).split()) == 2
        other = by_hand("up", "--folder", str(folder), "--nodes", "3")
        assert other.returncode == 1 and "'down' first" in other.stderr
    finally:
        assert by_hand("down", "--folder", str(folder)).returncode == 0
    assert not folder.exists() and not that_mention(folder)
    assert "no cluster" in by_hand("down", "--folder", str(folder)).stderr


def test_what_a_killed_test_run_left_is_removed(cluster: SlurmCluster) -> None:
    kept = cluster.folder / "cluster.json"
    assert cluster.folder not in bring_down_leftovers()  # its owner, this process, lives
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "owner": f"{os.getpid()} 1"}))
    assert cluster.folder in bring_down_leftovers()
    assert that_mention(cluster.folder) == []


def test_a_machine_without_slurm_gives_the_command_that_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    reason = slurm_files.reason_it_cannot_run(accounting=True)
    assert reason is not None and "slurmdbd" in reason and "apt-get install" in reason


def test_a_folder_that_sockets_cannot_live_in_is_refused() -> None:
    for folder in ("/tmp/" + "a" * 60, "/tmp/a b"):
        with pytest.raises(ValueError, match="at most 60 letters, no blanks"):
            SlurmCluster(folder=Path(folder))


def test_a_cluster_is_the_same_when_opened_by_another_process(cluster: SlurmCluster) -> None:
    assert dataclasses.asdict(SlurmCluster.open(cluster.folder)) == dataclasses.asdict(cluster)
