"""What a private Slurm cluster is made of: its options, the text of its configuration, and the packages.

Every value in `slurm_conf` that is not Slurm's own default is there for a reason, and the reason stands next to it.
"""

from __future__ import annotations

import fcntl
import os
import platform
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
# mariadb-server would bring 190 MB and a newer perl; the core package has the server itself
ACCOUNTING_PACKAGES = ("slurmdbd", "mariadb-server-core", "mariadb-client-core")
ACCOUNTING_PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db")
INSTALL_LOCK = Path("/tmp/hpc-cpd-slurm-install.lock")
POLICY = Path("/usr/sbin/policy-rc.d")
SYSTEM_MUNGED = Path("/run/munge/munged.pid")
LONGEST_FOLDER = 60  # unix sockets below it may have 108 characters in all


def new_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))


def search_path() -> str:
    """PATH with the folders of the daemons, which a plain user's PATH lacks on Debian."""
    return os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"


def user_name() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def may_make_namespaces() -> bool:
    """Root may, but not root of a container without privileges."""
    if os.getuid() != 0:
        return False
    done = subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True, check=False)
    return done.returncode == 0


@dataclass(kw_only=True)
class Options:
    """What a cluster is like; kept in its folder, so that another process finds the same cluster."""

    folder: Path = field(default_factory=new_folder)
    nodes: int = 4
    cpus: int = 4  # per node, however many the machine has
    memory_mb: int = 8000
    gpus: int = 2  # per node, fake; only where `own_names` can be
    accounting: bool = False  # a real slurmdbd and database, hence a real sacct
    user_signal: bool = True  # a preempted job gets the signal of its --signal; Slurm's own default is no
    kill_over_memory: bool = False  # a step over its memory is killed, as a cgroup would
    max_array_size: int = 5001
    requeue_wait: int = 5  # seconds; Slurm takes anything below 5 as 120
    extra: str = ""  # more lines for slurm.conf
    own_names: bool = field(default_factory=may_make_namespaces)  # each node has its host name, hosts file and mounts
    first_port: int = 0  # controller, database daemon, then one for each node; 0: free ones are searched

    def __post_init__(self) -> None:
        self.folder = Path(self.folder).absolute()
        if len(str(self.folder)) > LONGEST_FOLDER or any(letter.isspace() for letter in str(self.folder)):
            raise ValueError(f"the folder of a cluster has at most {LONGEST_FOLDER} letters, no blanks: {self.folder}")
        if not self.own_names:
            self.gpus = 0  # making devices takes the same privileges
        self.first_port = self.first_port or free_ports(2 + self.nodes)

    @property
    def node_names(self) -> list[str]:
        return [f"n{number}" for number in range(1, self.nodes + 1)]


def free_ports(count: int) -> int:
    """The first of `count` free ports in a row.

    Below 20000: above lie the ports that jobs compute from their id, and from 32768 on those the kernel gives to
    any client that connects. Searched from a random one, so that two clusters that start at once do not meet.
    """
    for _ in range(1000):
        first = random.randrange(10000, 20000 - count)
        with ExitStack() as stack, suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise RuntimeError("no free ports between 10000 and 20000")


def short_host_name() -> str:
    return socket.gethostname().split(".")[0]


def host_name_is_loopback() -> bool:
    """Whether daemons that listen on what the host name resolves to can be reached on 127.0.0.1."""
    try:
        return socket.gethostbyname(short_host_name()) == "127.0.0.1"
    except OSError:
        return False


def hosts_file(options: Options) -> str:
    """/etc/hosts of every node: all are 127.0.0.1, told apart by their ports.

    An address for each (127.0.0.11, ...) does not work: the kernel always calls from 127.0.0.1, so the step of a
    batch job calls srun back where it does not listen, and the job hangs until its time limit.
    """
    return "".join(f"127.0.0.1 {name}\n" for name in ["localhost", short_host_name(), *options.node_names])


def gres_conf(options: Options) -> str:
    """Without a device for each, slurmd counts no GPUs and the node is invalid."""
    return f"Name=gpu File={options.folder}/dev/gpu[0-{options.gpus - 1}]\n" if options.gpus else ""


def slurm_conf(options: Options) -> str:
    folder, me, host = options.folder, user_name(), short_host_name()
    polls_memory = options.accounting or options.kill_over_memory
    lines = [
        "ClusterName=lab",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmUser={me}",
        f"SlurmdUser={me}",
        f"SlurmctldPort={options.first_port}",
        "AuthType=auth/munge",
        "CredType=cred/munge",
        f"AuthInfo=socket={folder}/munge/socket,cred_expire={options.requeue_wait}",  # a requeued job waits so long
        "MailProg=/bin/true",
        "ProctrackType=proctrack/linuxproc",  # the default wants cgroups
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core_Memory",
        "DefMemPerCPU=200",
        "SchedulerType=sched/backfill",
        # a test waits for the scheduler: look often, and at every job
        "SchedulerParameters=bf_interval=1,bf_continue,sched_min_interval=0,batch_sched_delay=0,"
        "default_queue_depth=2000,bf_max_job_test=2000",
        "PriorityType=priority/basic",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "JobRequeue=1",
        "SlurmdParameters=config_overrides",  # more processors than the machine has
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool/%n",
        f"TmpFS={folder}/nodes/%n",  # PMIx of two nodes would share its folder otherwise
        f"SlurmctldPidFile={folder}/pid/slurmctld.pid",
        f"SlurmdPidFile={folder}/pid/slurmd.%n.pid",
        f"SlurmctldLogFile={folder}/log/slurmctld.log",
        f"SlurmdLogFile={folder}/log/slurmd.%n.log",
        "SlurmctldDebug=info",
        "SlurmdDebug=info",
        "ReturnToService=2",  # a node that was down is used again as soon as it reports
        "SlurmdTimeout=15",
        "SlurmctldTimeout=15",
        "MessageTimeout=10",
        "KillWait=5",
        "MinJobAge=60000",  # squeue knows ended jobs all day: most clusters here have no sacct
        "MaxJobCount=20000",
        f"MaxArraySize={options.max_array_size}",
        "GresTypes=gpu",
        f"JobAcctGatherType=jobacct_gather/{'linux' if polls_memory else 'none'}",
        f"JobAcctGatherFrequency=task={1 if options.kill_over_memory else 5 if polls_memory else 0}",
    ]
    if options.user_signal:
        lines.append("SlurmctldParameters=preempt_send_user_signal")
    if host_name_is_loopback():
        lines.append("CommunicationParameters=NoCtldInAddrAny,NoInAddrAny")  # not reachable from outside
    if options.kill_over_memory:
        lines.append("JobAcctGatherParams=OverMemoryKill")
    if options.accounting:
        lines += [
            "AccountingStorageType=accounting_storage/slurmdbd",
            "AccountingStorageHost=127.0.0.1",
            f"AccountingStoragePort={options.first_port + 1}",
            f"AccountingStoragePass={folder}/munge/socket",  # it does not look at AuthInfo
        ]
    for number, name in enumerate(options.node_names):
        gres = f" Gres=gpu:{options.gpus}" if options.gpus else ""
        lines.append(
            f"NodeName={name} NodeHostname={name if options.own_names else host} NodeAddr=127.0.0.1 "
            f"Port={options.first_port + 2 + number} CPUs={options.cpus} SocketsPerBoard=1 "
            f"CoresPerSocket={options.cpus} ThreadsPerCore=1 RealMemory={options.memory_mb}{gres}"
        )
    for name, tier, mode in (
        ("main", 5, "OFF Default=YES"),
        ("low", 1, "REQUEUE GraceTime=10"),
        ("low0", 1, "REQUEUE GraceTime=0"),
        ("cancel", 1, "CANCEL GraceTime=10"),
        ("cancel0", 1, "CANCEL GraceTime=0"),
        ("high", 10, "OFF"),
    ):
        nodes = f"n[1-{options.nodes}]"
        lines.append(f"PartitionName={name} Nodes={nodes} DefaultTime=60 PriorityTier={tier} PreemptMode={mode}")
    return "\n".join([*lines, options.extra]) + "\n"


def slurmdbd_conf(options: Options) -> str:
    folder, me = options.folder, user_name()
    return f"""\
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={options.first_port + 1}
SlurmUser={me}
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser={me}
StorageLoc=slurm_acct_db
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/pid/slurmdbd.pid
""" + ("CommunicationParameters=NoInAddrAny\n" if host_name_is_loopback() else "")


def missing_programs(accounting: bool) -> list[str]:
    wanted = PROGRAMS + (ACCOUNTING_PROGRAMS if accounting else ())
    return [name for name in wanted if shutil.which(name, path=search_path()) is None]


def install_command(accounting: bool) -> list[str]:
    packages = PACKAGES + (ACCOUNTING_PACKAGES if accounting else ())
    return ["apt-get", "install", "-y", "--no-install-recommends", *packages]


def reason_it_cannot_run(accounting: bool = False) -> str | None:
    """Why no cluster can be had on this machine, or None where the programs are there or `install` can get them."""
    if platform.system() != "Linux":
        return "a private Slurm cluster needs Linux"
    missing = missing_programs(accounting)
    if not missing or (os.getuid() == 0 and shutil.which("apt-get")):
        return None
    command = " ".join(install_command(accounting))
    return f"{', '.join(missing)} not found: on Debian or Ubuntu run 'sudo {command}'"


def install(accounting: bool = False) -> None:
    """Get what is missing, as root from Debian's packages; RuntimeError with one sentence where that fails."""
    if not missing_programs(accounting):
        return
    if reason := reason_it_cannot_run(accounting):
        raise RuntimeError(reason)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with INSTALL_LOCK.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test sessions; the second finds the work done
        if not missing_programs(accounting):
            return
        with _no_daemons_start():
            command = [*install_command(accounting), "-o", "DPkg::Lock::Timeout=120"]
            # known package lists are tried first: fetching them anew takes longer than the installation
            for step in (command, ["apt-get", "update"], command):
                done = subprocess.run(step, env=environment, text=True, capture_output=True, check=False)
                if step is command and done.returncode == 0:
                    return
    last = (done.stderr.strip() or "no message").splitlines()[-1]
    raise RuntimeError(f"'{' '.join(command)}' failed: {last}")


@contextmanager
def _no_daemons_start() -> Iterator[None]:
    """Keep Debian's packages from starting the daemons they bring: the private ones are started by hand."""
    had_munged = SYSTEM_MUNGED.exists()
    own_policy = not POLICY.exists()
    if own_policy:
        POLICY.write_text("#!/bin/sh\nexit 101\n")
        POLICY.chmod(0o755)
    try:
        yield
    finally:
        if own_policy:
            POLICY.unlink(missing_ok=True)
        if not had_munged and SYSTEM_MUNGED.exists():  # the machine's own policy lets daemons start
            pid = int(SYSTEM_MUNGED.read_text())
            with suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() == "munged":
                    os.kill(pid, signal.SIGTERM)
