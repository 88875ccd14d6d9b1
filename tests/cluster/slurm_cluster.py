"""A real Slurm cluster of several nodes on this one machine, for tests and for trying things by hand.

By hand: `eval $(python -m tests.cluster.slurm_cluster up)`, then sbatch, squeue and the rest work in that shell;
`python -m tests.cluster.slurm_cluster down` ends it. The daemons are Slurm's own. As root every node has a host
name, an /etc/hosts and mounts of its own, so that a node can lose its power while the others go on.

A process belongs to a cluster when its environment names the cluster's slurm.conf (the daemons) or when it lives in
the mounts of one of the nodes (the jobs). Nothing else is ever signalled, and stale pid files mislead nobody.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tests.cluster.processes import Process, processes, started_at
from tests.cluster.slurm_files import (
    Options,
    gres_conf,
    hosts_file,
    install,
    reason_it_cannot_run,
    search_path,
    slurm_conf,
    slurmdbd_conf,
    user_name,
)

__all__ = ["SlurmCluster", "install", "reason_it_cannot_run"]

Answer = TypeVar("Answer")
PATIENCE = 30.0  # seconds for any one step; all take well below one on an idle machine
POLL = 0.05
DAEMONS = ("slurmctld", "slurmscriptd", "slurmd", "slurmdbd", "mariadbd", "munged")
# defaults of the machine's own Slurm would change what the client commands do
FOREIGN = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_")


def _in_a_job(environment: bytes, mark: bytes) -> bool:
    return mark in environment and b"\0SLURM_JOB_ID=" in environment


@dataclass(kw_only=True)
class SlurmCluster(Options):
    """A cluster in a folder. `up` and `down` may be called at any time, by any process of the same user."""

    owner: str = ""  # pid and start of the process that made it

    def __post_init__(self) -> None:
        super().__post_init__()
        self.owner = self.owner or f"{os.getpid()} {started_at(os.getpid())}"

    @classmethod
    def open(cls, folder: Path | str) -> SlurmCluster:
        """The cluster that was started in `folder`, by whatever process (of an older version of this file, too)."""
        known = {field.name for field in dataclasses.fields(cls)}
        kept = json.loads(Path(folder, "cluster.json").read_text())
        return cls(**{name: value for name, value in kept.items() if name in known})

    @property
    def owner_lives(self) -> bool:
        pid, _, start = self.owner.partition(" ")
        return started_at(int(pid)) == start

    @property
    def conf(self) -> Path:
        return self.folder / "etc" / "slurm.conf"

    # --- start -------------------------------------------------------------------------------------------------

    def up(self) -> SlurmCluster:
        """Start whatever does not run, and return when every node can take jobs."""
        self._write_files()
        if not self._daemons("munged"):
            munge = {word: self.folder / "munge" / word for word in ("key", "seed", "pid", "socket")}
            munge["log"] = self.folder / "log" / "munged.log"
            files = [f"--{word}{'' if word == 'socket' else '-file'}={path}" for word, path in munge.items()]
            self._start("munged", "--num-threads=10", *files)  # Slurm warns of fewer
        if self.accounting:
            self._start_accounting()
        self.start_controller()
        for node in self.node_names:
            if not self._daemons("slurmd", node):
                self._start(*self._on_node(node), "slurmd", "-N", node)
        self.wait_for(self._nodes_are_ready, PATIENCE, "all nodes are ready")
        return self

    def start_controller(self) -> None:
        if not self._daemons("slurmctld"):
            self._start("slurmctld")
        self.wait_for(self._controller_answers, PATIENCE, "the controller answers")

    def _write_files(self) -> None:
        self.folder.mkdir(exist_ok=True)
        if self.folder.stat().st_uid != os.getuid():
            raise PermissionError(f"{self.folder} belongs to another user")
        self.folder.chmod(0o755)
        for name in ("etc", "hosts", "state", "spool", "log", "pid", "munge", "db", "nodes", "dev"):
            (self.folder / name).mkdir(exist_ok=True)
        (self.folder / "munge").chmod(0o711)  # munged refuses a folder that others cannot pass through
        self._keep_options()
        self.conf.write_text(slurm_conf(self))
        (self.folder / "etc" / "gres.conf").write_text(gres_conf(self))
        # no cgroup is used, but slurmd looks for them, and ends where /sys/fs/cgroup is not mounted
        (self.folder / "etc" / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for node in self.node_names:
            (self.folder / "hosts" / node).write_text(hosts_file(self))
            for place in ("spool", "nodes"):
                (self.folder / place / node).mkdir(exist_ok=True)
        for number in range(self.gpus):
            device = self.folder / "dev" / f"gpu{number}"
            if not device.exists():
                os.mknod(device, 0o020666, os.makedev(1, 3))  # a twin of /dev/null
        key = self.folder / "munge" / "key"
        if not key.exists():
            key.touch(mode=0o600)
            key.write_bytes(os.urandom(128))

    def _keep_options(self) -> None:
        text = json.dumps(dataclasses.asdict(self), default=str, indent=1)
        (self.folder / "cluster.json").write_text(text + "\n")

    def _on_node(self, node: str) -> list[str]:
        """The words in front of slurmd that make a node of it."""
        if not self.own_names:
            return []
        # Jobs that drop SLURM_CONF (submitit does) find this cluster in the usual place.
        script = """hostname "$1" && mount --bind "$2/hosts/$1" /etc/hosts || exit
if [ -d /etc/slurm ]; then mount --bind "$2/etc" /etc/slurm || exit; fi
shift 2; exec "$@" """
        return ["unshare", "--uts", "--mount", "--propagation=slave", "sh", "-c", script, "sh", node, str(self.folder)]

    def _start_accounting(self) -> None:
        database, owner = self.folder / "db", user_name()
        data, server = database / "data", ["--no-defaults", f"--socket={database}/socket"]
        if not (data / "mysql").exists():
            words = ["--auth-root-authentication-method=socket", f"--auth-root-socket-user={owner}", "--skip-test-db"]
            self.run("mariadb-install-db", "--no-defaults", f"--user={owner}", f"--datadir={data}", *words)
        if not self._daemons("mariadbd"):
            more = [f"--user={owner}", f"--datadir={data}", f"--pid-file={database}/pid", "--skip-networking"]
            more += ["--innodb-buffer-pool-size=64M", "--innodb-log-file-size=16M", "--innodb-lock-wait-timeout=900"]
            more += ["--innodb-flush-log-at-trx-commit=0", f"--log-error={self.folder}/log/mariadbd.log"]
            self._start("setsid", "--fork", "mariadbd", *server, *more)
        self.wait_for(lambda: self._succeeds("mariadb", *server, "-e", "select 1"), PATIENCE, "the database answers")
        conf = self.folder / "etc" / "slurmdbd.conf"
        conf.touch(mode=0o600)  # slurmdbd refuses one that others can read
        conf.write_text(slurmdbd_conf(self))
        if not self._daemons("slurmdbd"):
            self._start("slurmdbd")
        answers = ("timeout", "5", "sacctmgr", "-n", "list", "cluster", "format=cluster")
        self.wait_for(lambda: self._succeeds(*answers), PATIENCE, "slurmdbd answers")
        if not self.run(*answers).stdout.strip():
            self.run("sacctmgr", "-i", "add", "cluster", "lab")

    def _start(self, *command: str) -> None:
        """Run a command that leaves a daemon; what it says goes to a file, for a pipe would stay open."""
        said = self.folder / "log" / "start.log"
        environment = {**self.environment(), "MYSQL_UNIX_PORT": f"{self.folder}/db/socket"}
        with said.open("w") as out:
            done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd="/")
        if done.returncode:
            raise RuntimeError(f"'{' '.join(command)}' failed ({done.returncode}): {said.read_text()[-2000:]}")

    def _controller_answers(self) -> bool:
        return "UP" in self.run("scontrol", "ping", check=False).stdout

    def _nodes_are_ready(self) -> bool:
        states = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T", check=False).stdout.split()
        ready = {"idle", "mixed", "allocated", "completing"}
        for node, state in zip(states[::2], states[1::2], strict=True):
            if state.startswith("drain"):  # "Duplicate jobid", after a controller that lost its state
                self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        return len(states) == 2 * self.nodes and set(states[1::2]) <= ready

    # --- stop --------------------------------------------------------------------------------------------------

    def down(self, wipe: bool = False) -> None:
        """Stop everything: no daemon, step or task is left. With `wipe` the folder goes too."""
        if not wipe and self._daemons("slurmctld") and self._controller_answers():
            # what waits or runs now must not come back with the next `up`
            for state in ("PENDING", "RUNNING", "SUSPENDED"):  # scancel takes one at a time
                self.run("scancel", "-t", state, check=False)
            seconds = 10 if all(self._daemons("slurmd", node) for node in self.node_names) else 1  # nobody reports
            with suppress(TimeoutError):
                self.wait_for(self._jobs_have_ended, seconds)
        for program in DAEMONS:
            if program == "slurmdbd":  # the nodes' daemons have ended, so no new step begins
                self._end(signal.SIGKILL, self._job_processes)
            find = functools.partial(self._daemons, program)
            if not wipe:
                with suppress(TimeoutError):
                    self._end(signal.SIGTERM, find, 5)  # the controller saves at once, then waits for dead nodes
            self._end(signal.SIGKILL, find)
        if wipe:
            shutil.rmtree(self.folder)

    def _jobs_have_ended(self) -> bool:
        """Hurry the tasks: one that ignores SIGTERM, or hides and holds a pipe, keeps its step for long."""
        for process in self._job_processes():
            if process.program not in (*DAEMONS, "slurmstepd"):
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        return not self.run("squeue", "-h", "-t", "PD,R,S,CF,CG", "-o", "%A", check=False).stdout.strip()

    def kill_slurmd(self, node: str) -> None:
        """End a node's daemon; its steps go on, unwatched."""
        self._end(signal.SIGKILL, functools.partial(self._daemons, "slurmd", node))

    def kill_controller(self) -> None:
        self._end(signal.SIGKILL, functools.partial(self._daemons, "slurmctld"))

    def power_off(self, node: str) -> None:
        """End every process of a node at once, as a power cut does."""
        if not self.own_names:
            raise RuntimeError("a node that has no namespaces of its own (not root) cannot lose its power")
        self._end(signal.SIGKILL, functools.partial(self._processes_on, node))

    def _end(self, number: signal.Signals, find: Callable[[], list[Process]], seconds: float = PATIENCE) -> None:
        """Signal what `find` finds until it finds nothing: what forks meanwhile is found the next time."""

        def nothing_is_left() -> bool:
            left = find()
            for process in left:
                if number == signal.SIGKILL or process not in signalled:
                    signalled.add(process)
                    with suppress(ProcessLookupError):
                        os.kill(process.pid, number)
            return not left

        signalled: set[Process] = set()
        self.wait_for(nothing_is_left, seconds, f"processes end on {number.name}")

    @property
    def _mark(self) -> bytes:
        return f"SLURM_CONF={self.conf}\0".encode()

    def _daemons(self, program: str, node: str = "") -> list[Process]:
        """Daemons of this cluster by their program's name (and of one node)."""
        return [
            process
            for process in processes()
            if process.program == program
            and self._mark in process.text("environ")
            and (not node or process.text("cmdline").rstrip(b"\0").endswith(f"\0-N\0{node}".encode()))
        ]

    def _processes_on(self, node: str) -> list[Process]:
        """Everything in a node's namespaces, known by the /etc/hosts that only this node has."""
        mark, path = f"/hosts/{node} /etc/hosts ".encode(), f"{self.folder}/hosts/{node}".encode()

        def lives_there(process: Process) -> bool:
            mounts = process.text("mountinfo")
            # as a path in its file system, which may begin above or below ours (a volume, a /tmp of its own)
            sources = [line.split()[3] for line in mounts.splitlines() if mark in line] if mark in mounts else []
            return any(path.endswith(source) or source.endswith(path) for source in sources)

        return [process for process in processes() if lives_there(process)]

    def _job_processes(self) -> list[Process]:
        """Steps and their tasks, also those whose slurmd was killed (with namespaces: all that is on the nodes)."""
        if self.own_names:
            return [process for node in self.node_names for process in self._processes_on(node)]
        alive = list(processes())
        found = {process for process in alive if _in_a_job(process.text("environ"), self._mark)}
        found |= set(self._daemons("slurmstepd"))
        while more := {process for process in alive if process.parent in {one.pid for one in found}} - found:
            found |= more
        return list(found)

    # --- use ---------------------------------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        """The environment in which client commands talk to this cluster and to no other."""
        mine = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        return {**mine, "SLURM_CONF": str(self.conf), "PATH": search_path()}

    def run(self, *command: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run a client command; the error of one that fails has what it said."""
        more = {"env": self.environment(), "check": True, "text": True, "capture_output": True, **more}
        try:
            return subprocess.run([str(word) for word in command], **more)
        except subprocess.CalledProcessError as error:
            error.add_note(f"{error.stdout or ''}{error.stderr or ''}")
            raise

    def _succeeds(self, *command: str) -> bool:
        return self.run(*command, check=False).returncode == 0

    def enter(self, node: str, *command: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on a node: its host name, its mounts."""
        if not self.own_names:
            return self.run(*command, **more)
        # its slurmd's view: what a killed slurmd left behind lives in namespaces of its own
        pid = max(process.pid for process in self._daemons("slurmd", node))
        return self.run("nsenter", "-t", str(pid), "--uts", "--mount", *command, **more)

    def submit(self, *words: str | Path) -> str:
        """sbatch with these words; the id of the job."""
        return self.run("sbatch", "--parsable", *words).stdout.strip().partition(";")[0]

    def state(self, job: str) -> str:
        """A job's state in squeue's words; "" for one that Slurm does not know. Of an array: its last line."""
        lines = self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T", check=False).stdout.split()
        return lines[-1] if lines else ""

    def reconfigure(self, *, user_signal: bool) -> None:
        """Change what a preempted job is told, and return when it holds."""
        self.user_signal = user_signal
        self._write_files()
        self.run("scontrol", "reconfigure")
        word = "preempt_send_user_signal"
        shown = ("scontrol", "show", "config")
        self.wait_for(lambda: (word in self.run(*shown).stdout) == user_signal, PATIENCE, f"{word}: {user_signal}")

    @staticmethod
    def wait_for(predicate: Callable[[], Answer], seconds: float, what: str = "") -> Answer:
        """The first true answer of `predicate`; TimeoutError after `seconds`."""
        end = time.monotonic() + seconds
        while not (answer := predicate()):
            if time.monotonic() > end:
                raise TimeoutError(f"after {seconds:g} seconds not yet: {what or predicate}")
            time.sleep(POLL)
        return answer


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.cluster.slurm_cluster", description="A private Slurm cluster on this machine."
    )
    actions = parser.add_subparsers(dest="action", required=True)
    up = actions.add_parser("up", help="start it, or what of it does not run", argument_default=argparse.SUPPRESS)
    up.add_argument("--nodes", type=int, help="default 4")
    up.add_argument("--cpus", type=int, help="per node, default 2")
    up.add_argument("--gpus", type=int, help="per node, fake, default 2")
    up.add_argument("--memory-mb", type=int, help="per node, default 8000")
    up.add_argument("--accounting", action="store_true", help="with slurmdbd and a database, so that sacct answers")
    down = actions.add_parser("down", help="stop it and remove its state")
    down.add_argument("--keep", action="store_true", help="keep the state for the next up")
    for action in (up, down):
        action.add_argument("--folder", type=Path, default=Path(f"/tmp/hpc-cpd-slurm-{os.getuid()}"))
    wanted = vars(parser.parse_args())
    action, folder = wanted.pop("action"), wanted.pop("folder")
    try:
        return bring_up(folder, wanted) if action == "up" else bring_down(folder, wanted["keep"])
    except (RuntimeError, TimeoutError, ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def bring_up(folder: Path, wanted: dict[str, Any]) -> int:
    """What is meant for a person goes to stderr: a shell can evaluate the rest."""
    if (folder / "cluster.json").exists():
        cluster = SlurmCluster.open(folder)
        if any(getattr(cluster, name) != value for name, value in wanted.items()):
            raise ValueError(f"the cluster in {folder} was made with other options: 'down' first")
    else:
        cluster = SlurmCluster(folder=folder, **{"cpus": 2, **wanted})
    install(cluster.accounting)
    cluster.up()
    size = f"{cluster.nodes} nodes of {cluster.cpus} processors and {cluster.gpus} fake GPUs"
    print(f"{size} are up, logs in {cluster.folder}/log; paste the next line:", file=sys.stderr)
    print(f"export SLURM_CONF={cluster.conf}")
    return 0


def bring_down(folder: Path, keep: bool) -> int:
    there = (folder / "cluster.json").exists()
    if there:
        SlurmCluster.open(folder).down(wipe=not keep)
    print(f"stopped: {folder}" if there else f"no cluster in {folder}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
