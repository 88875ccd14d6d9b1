"""One owner for one folder: a lock file with a heartbeat, made for clusters.

Clocks of nodes and file servers differ, so nobody compares them: whether the owner lives is seen by watching whether
its heartbeat moves. A scheduler may start a job again while the old one lives on where it cannot be reached, so the
later start takes over at once and the earlier one, which finds out before each publication, publishes no more.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from hpc_cpd.errors import LockLost, StopRequested, UserError
from hpc_cpd.run.job import JobStart, this_job
from hpc_cpd.run.publish import guards

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
# Every other duration follows from these two: a look every 1/20 heartbeat, and never fewer than 2.5 heartbeats of them.

_held: set[str] = set()  # tokens of this process: its own process id says nothing about them


@dataclass(frozen=True)
class _Seen:
    """A lock file at one moment. `owner` is empty when the file is damaged."""

    mtime_ns: int
    owner: Mapping[str, Any]


@dataclass(eq=False)
class Lock:
    """One owner for one folder; the lock of an owner that is gone is taken over.

    Use as a context manager. An owner is gone when its process is (same host); when its heartbeat was watched and
    stood still, for 2.5 heartbeats at least (another host); or when its job was started again, as this
    process (`hpc_cpd.run.job`).
    While the lock is held, nothing is published below the folder (`hpc_cpd.run`) without a look whether it still is.
    That leaves the instant between the look and the rename, which no file system can close.
    """

    folder: Path
    what: str
    """The work, as messages name it."""
    _: KW_ONLY
    wait_seconds: float = 0.0
    """How long to wait for an owner that is known to be alive."""
    on_lost: Callable[[], object] = lambda: None
    """Called once, in the heartbeat's thread, when the lock turns out to be another's."""
    stop: Callable[[], bool] = lambda: False
    """Ends the waiting with StopRequested when it becomes true."""
    also: Sequence[Path] = ()
    """Further folders that the lock speaks for."""

    def __post_init__(self) -> None:
        self.path = (self.folder / "lock.json").absolute()
        self.token = secrets.token_hex(8)
        self._gate = self.path.with_name(".lock.takeover")
        self._announced = False
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock heartbeat", daemon=True)

    def __enter__(self) -> Lock:
        """Raises UserError naming the owner when another live process holds the lock."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._covered = [Path(os.path.realpath(folder)) for folder in (self.path.parent, *self.also)]
        began = time.monotonic()
        _held.add(self.token)
        try:
            while (now_ns := self._claim(self.path)) is not None:
                self._outlast(now_ns, began)
        except BaseException:
            _held.discard(self.token)
            raise
        guards.append(self._check)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()
        with suppress(ValueError):
            guards.remove(self._check)
        patience = time.monotonic() + HEARTBEAT_SECONDS / 10
        with suppress(OSError):  # left behind, the lock stands still and is taken over; the work's own error counts
            while (seen := _look(self.path)) is not None and seen.owner.get("token") == self.token:
                if self._remove(seen, still=False) or time.monotonic() > patience:
                    break
                time.sleep(HEARTBEAT_SECONDS / 200)
        _held.discard(self.token)

    def _claim(self, path: Path) -> int | None:
        """Try to make `path` ours. None: done. Else the file system's own time, in ns, at which it was another's."""
        temporary = path.with_name(f".lock.{secrets.token_hex(4)}.tmp")
        job, pid = this_job(), os.getpid()
        owner = {"host": socket.gethostname(), "space": process_space(), "pid": pid, "born": _birth(pid)}
        temporary.write_text(json.dumps(owner | {"token": self.token, "job": job.id, "restart": job.restart}))
        try:
            os.link(temporary, path)  # fails if the name exists: the one atomic claim NFS offers too
        except FileExistsError:
            seen = _look(path)
            if seen is None or seen.owner.get("token") != self.token:  # NFS, asked twice, may call success a failure
                return temporary.stat().st_mtime_ns
        finally:
            temporary.unlink(missing_ok=True)
        return None

    def _outlast(self, now_ns: int, began: float) -> None:
        """Watch the present owner until the lock is worth claiming again. Raises UserError when the owner stays.

        `now_ns`: the time by the file system's clock. `began`: when the waiting began, by the monotonic clock.
        """
        seen = _look(self.path)
        if seen is None:
            return
        fenced = _outranks(this_job(), seen.owner)
        # Only a lower bound of the watching comes from clocks, so a wrong one costs time and never the owner.
        age = max(0.0, (now_ns - seen.mtime_ns) / 1e9)
        shortest = 2.5 * HEARTBEAT_SECONDS
        needed = max(STALE_SECONDS - age, shortest)
        pause = HEARTBEAT_SECONDS / 20
        quiet, blocked, looked, beaten = 0.0, 0.0, time.monotonic(), False
        while True:
            process = lives_here(seen.owner)
            over = fenced or process is False or (process is None and quiet >= needed)
            if over and self._remove(seen, still=not fenced):
                return
            if blocked >= shortest:
                self._gate.unlink(missing_ok=True)  # whoever shut it is dead: it takes moments
                blocked = 0.0
            waited = time.monotonic() - began
            if not over and (process or beaten) and waited >= self.wait_seconds:
                raise UserError(
                    f"{self.what} is being worked on by {_words(seen.owner)} ({self.path}); "
                    "wait for it, or stop it and try again"
                )
            if self.stop():
                raise StopRequested(f"{self.what} was not begun; {_words(seen.owner)} still holds {self.path}")
            if waited > HEARTBEAT_SECONDS / 10 and not self._announced:
                self._announced = True
                left = shortest - blocked if over else 0.0 if process else needed - quiet
                limit = max(self.wait_seconds - waited, left)
                text = f"waiting for {_words(seen.owner)}, which holds {self.path}, for at most {limit:.0f} s"
                print(text, file=sys.stderr, flush=True)
            time.sleep(pause)
            current = _look(self.path)
            if current is None or current.owner != seen.owner:
                return
            now = time.monotonic()
            passed = min(now - looked, 4 * pause)  # while the file server was away nobody could beat, nor look
            looked = now
            blocked = blocked + passed if over else 0.0
            if current.mtime_ns == seen.mtime_ns:
                quiet += passed
            else:
                seen, quiet, needed, beaten = current, 0.0, STALE_SECONDS, True

    def _remove(self, seen: _Seen, still: bool) -> bool:
        """Delete the lock file if it is the one that was `seen`, with `still` also no heartbeat later.

        False: somebody else is just about to. One at a time passes the gate and looks again, so nobody deletes the
        file of the next owner. A gate left shut by the dead is broken open; should that let in two at once, the later
        one notices what it caught and puts it back.
        """
        if self._claim(self._gate) is not None:
            return False
        try:
            if _same(_look(self.path), seen, still):
                caught = self.path.with_name(f".lock.{secrets.token_hex(4)}.stale")
                os.rename(self.path, caught)
                if not _same(_look(caught), seen, still):
                    with suppress(FileExistsError):  # claimed meanwhile: whoever was caught cannot publish
                        os.link(caught, self.path)
                caught.unlink(missing_ok=True)
        except FileNotFoundError:
            pass
        finally:
            self._gate.unlink(missing_ok=True)
        return True

    def _check(self, target: Path) -> None:
        """Raise LockLost when `target` lies in a folder of this lock, and the lock is another's."""
        place = Path(os.path.realpath(target.parent)) / target.name
        if any(place.is_relative_to(folder) for folder in self._covered):
            self._hold(f"nothing was written to {target}")

    def _hold(self, consequence: str, touch: bool = False) -> None:
        """Look whether the lock is still ours, with `touch` renew its heartbeat; raise LockLost when it is not."""
        patience = time.monotonic() + HEARTBEAT_SECONDS / 10  # a lock caught by mistake is put back within moments
        while (seen := _look(self.path, self.token if touch else None)) is None and time.monotonic() < patience:
            time.sleep(HEARTBEAT_SECONDS / 200)
        if seen is None:
            raise LockLost(f"the lock of {self.what} was deleted by somebody ({self.path}); {consequence}")
        if seen.owner.get("token") != self.token:
            raise LockLost(f"{self.what} was taken over by {_words(seen.owner)} ({self.path}); {consequence}")

    def _beat(self) -> None:
        while not self._left.wait(HEARTBEAT_SECONDS):
            try:
                self._hold("this process writes nothing there any more", touch=True)
            except LockLost:
                self.on_lost()
                return
            except OSError:
                continue  # the file server is away; it may come back


def _look(path: Path, touch: str | None = None) -> _Seen | None:
    """What the lock file holds now; None when there is none. `touch`: renew its time if that is its token.

    The file is opened, because NFS asks its server on opening, while os.stat may answer from a cache for a minute.
    Read and renewed through one descriptor, a successor's file cannot be renewed by mistake.
    """
    try:
        with open(path, "rb") as file:
            owner: dict[str, Any] = {}
            with suppress(ValueError, TypeError):  # damaged
                owner |= json.loads(file.read())
            if touch is not None and owner.get("token") == touch:
                os.utime(file.fileno())  # no time given: the file server's own
            return _Seen(os.fstat(file.fileno()).st_mtime_ns, owner)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return None
        raise


def _same(now: _Seen | None, before: _Seen, still: bool) -> bool:
    """Whether the lock is of the same owner, with `still` not even renewed."""
    return now is not None and now.owner == before.owner and (not still or now.mtime_ns == before.mtime_ns)


def lives_here(owner: Mapping[str, Any]) -> bool | None:
    """Whether the owner's process is alive; None when that cannot be told from this host."""
    pid, born = owner.get("pid"), owner.get("born")
    here = owner.get("host") == socket.gethostname() and owner.get("space") == process_space()
    if not here or not isinstance(pid, int) or born is None:
        return None
    if _birth(pid) != born:
        return False
    return pid != os.getpid() or owner.get("token") in _held


def process_space() -> str:
    """Where a process id means the same process: containers may share the host's name, but not its ids."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid") + Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _birth(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot (a reused pid has another), None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _outranks(start: JobStart, owner: Mapping[str, Any]) -> bool:
    """Whether `start` is a later start of the owner's job: then the scheduler holds the owner's start to be over."""
    before = owner.get("restart")
    return start.id is not None and start.id == owner.get("job") and isinstance(before, int) and start.restart > before


def _words(owner: Mapping[str, Any]) -> str:
    """The owner in words, for example ``process 12 on node3 (job 5_1)``."""
    if not owner:
        return "an unknown process"
    job = f" (job {owner['job']})" if owner.get("job") else ""
    return f"process {owner.get('pid')} on {owner.get('host')}{job}"
