"""Do what a sweep's file asks for: teachers first, each kind once, then every row, one seed of each after the other.

Each launcher is a process of its own with a log. A signal to the sweep reaches the sweep alone, which passes it on:
every launcher then saves and leaves, as if it had been asked itself. Launchers of a killed sweep are killed by the
kernel, and end their ranks.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_cpd.cluster.preemption import STOP_SIGNALS, StopFlag
from hpc_cpd.cluster.ranks import LAST_LINES, Outcome, end_in_words, tethered
from hpc_cpd.cluster.schedulers.base import choose, scheduler_of
from hpc_cpd.cluster.schedulers.local import supervise
from hpc_cpd.cluster.units import Unit, not_done, request_of
from hpc_cpd.config import changed_keys, config_as_yaml
from hpc_cpd.errors import EXIT_DONE, EXIT_FAULT, EXIT_STOPPED, EXIT_USER_ERROR, StopRequested, UserError
from hpc_cpd.progress import Reader, say
from hpc_cpd.report.comparison import write_sweep_file
from hpc_cpd.run.cores import usable_cores
from hpc_cpd.run.lock import Lock
from hpc_cpd.run.publish import is_done, write_bytes
from hpc_cpd.sweep.plan import Entry, Row, Shared, Sweep, in_turn, link, shared_by
from hpc_cpd.tasks.registry import run_plan

LOOK_EVERY_SECONDS = 1.0


@dataclass(eq=False)
class Launch:
    """A launcher to start. `argv`: the words after ``python``; `threads`: of each rank, None: the launcher decides.

    `units`: what it works on, whose progress is shown.
    """

    name: str
    argv: Sequence[str]
    log: Path
    threads: int | None = None
    units: Sequence[Unit] = ()

    def start(self) -> None:
        """Start its process."""
        self._began = time.monotonic()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        threads = {} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}
        with open(self.log, "ab") as log:
            self._from = log.tell()
            self._process = subprocess.Popen(
                tethered([sys.executable, *self.argv]),
                env={**threads, **os.environ, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._lines = [f"begins; its log: {self.log}"]
        self._readers = {unit: Reader(unit.folder) for unit in not_done(self.units)}
        self._phases: dict[Unit, str] = {}
        self._looked_at = float("-inf")
        self._stopped = False

    def pass_on(self, stop: StopFlag) -> None:
        """The same signal: the first makes it save and leave, a second Ctrl-C kills its ranks."""
        self._stopped = True
        if self._process.poll() is None and stop.last is not None:
            self._process.send_signal(stop.last)

    def news(self) -> list[str]:
        """What each unit does, when that is something else than before, and how the launch began and ended."""
        lines, self._lines = self._lines, []
        return lines

    def poll(self) -> Outcome | None:
        code, now = self._process.poll(), time.monotonic()
        if code is not None or now - self._looked_at >= LOOK_EVERY_SECONDS:
            self._looked_at = now
            for unit, reader in self._readers.items():
                news = reader.read()
                if news is not None and news.phase != self._phases.get(unit):
                    self._phases[unit] = news.phase
                    self._lines.append(f"{unit.name}: {news.phase}")
        if code is None:
            return None
        outcome = self._outcome(code)
        word = {EXIT_DONE: "done", EXIT_STOPPED: "stopped, saved"}.get(outcome.code, "failed")
        self._lines.append(f"{word} after {now - self._began:.0f} s")
        return outcome

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _outcome(self, code: int) -> Outcome:
        if code == EXIT_DONE:
            return Outcome(self.name, code)
        if self._stopped and (code == EXIT_STOPPED or -code in STOP_SIGNALS):  # may come before it can catch any
            return Outcome(self.name, EXIT_STOPPED)
        with open(self.log, "rb") as file:
            file.seek(self._from)
            text = "\n" + file.read().decode(errors="replace").strip()
        _, found, sentence = text.rpartition("\nstopped: " if code == EXIT_STOPPED else "\nerror: ")
        if not found:
            shown = "\n".join(f"    {line}" for line in text.splitlines()[-LAST_LINES:])
            sentence = f"its launcher {end_in_words(code)}; its log {self.log} ends with\n{shown}"
        return Outcome(self.name, EXIT_FAULT if code < 0 else code, sentence)


def run_sweep(sweep: Sweep, rows: Sequence[Row], cluster: str, at_once: int) -> int:
    """Make what is missing of `rows`; returns the exit code. Raises StopRequested after everything saved.

    `cluster`: as the launcher has it. `at_once`: launchers side by side, on this machine. With a scheduler the teachers
    are waited for; the rows are then submitted, and the same command tells later what is left.
    """
    if (sweep.folder / "config.yaml").is_file():
        raise UserError(f"{sweep.folder} is a run, so no sweep can be there; choose another folder with --run")
    stop = StopFlag().install()
    where, queues = _where(cluster, sweep)
    with Lock(sweep.folder, f"the sweep {sweep.folder}", stop=stop):
        note_rows(sweep)
        entries = in_turn(rows)
        todo = [entry for entry in entries if not finished(entry)]
        say(f"Sweep {sweep.folder}: {len(entries) - len(todo)} of {len(entries)} runs done, {len(todo)} to do")
        failed = _make(sweep, todo, where, queues, at_once, stop)
    for outcome in failed:
        print(f"error: {outcome.name}: {outcome.sentence or 'stopped'}", file=sys.stderr, flush=True)
    codes = {outcome.code for outcome in failed}
    if bad := codes - {EXIT_STOPPED}:
        return EXIT_USER_ERROR if bad == {EXIT_USER_ERROR} else EXIT_FAULT
    if stop() or codes:
        raise StopRequested("the same command goes on from here")
    for entry in todo if queues else ():
        if not finished(entry):
            say(f"{entry.name}: submitted; look: hpc-cpd status {shlex.quote(str(entry.run.folder))}")
    return EXIT_DONE


def show_plan(sweep: Sweep, rows: Sequence[Row]) -> None:
    """Print rows, seeds and commands; writes nothing.

    A launch shown here has the sweep's teachers only when the sweep made the links: ``--only ROW`` does both.
    """
    entries = [entry for row in rows for entry in row.entries]
    shared = shared_by(sweep, entries)
    for one in dict.fromkeys(shared.values()):
        for_ = ", ".join(entry.name for entry in entries if shared[entry.name] is one)
        say(f"# teachers and trajectories, seed {sweep.data_seed}{' (done)' * one.done}, for: {for_}")
        say(shlex.join(one.command))
    for row in rows:
        say(f"\n# {row.name}{f': {row.title}' if row.title else ''} (teachers included: {sweep.command(row.name)})")
        for entry in row.entries:
            say(f"{shlex.join(entry.command)}{'  # done' if finished(entry) else ''}")


def note_rows(sweep: Sweep) -> None:
    """Write ``sweep.json`` beside the runs, for the pages."""
    rows: dict[str, dict[str, Any]] = {}
    for row in sweep.rows:
        launches = {str(entry.seed): shlex.join(entry.command) for entry in row.entries}
        said = {"title": row.title, "teaches": row.teaches, "command": sweep.command(row.name), "launches": launches}
        rows[row.name] = {"seeds": [entry.seed for entry in row.entries], **said}
    write_sweep_file(sweep.folder, sweep.name, rows)


def finished(entry: Entry) -> bool:
    """Whether all stages are published, with these settings: else the launcher has something to do, or to say."""
    if not entry.run.config_file.is_file() or changed_keys(entry.run.config(), entry.config):
        return False
    return all(is_done(entry.run.stage(k)) for k in range(1, len(run_plan(entry.run, entry.config)) + 1))


def _make(sweep: Sweep, todo: Sequence[Entry], where: str, queues: bool, at_once: int, stop: StopFlag) -> list[Outcome]:
    """Teachers, then rows; returns what failed or was stopped."""
    shared = shared_by(sweep, todo)
    kinds = [one for one in dict.fromkeys(shared.values()) if not one.done]
    for one in kinds:
        write_bytes(one.run.folder.with_suffix(".yaml"), config_as_yaml(one.config).encode())  # which its command names
    words = [where, *(["--wait"] if queues else [])]
    teachers = [_launch(one, "teachers", f"teachers {one.run.folder.name}", words) for one in kinds]
    outcomes = supervise(teachers, 1, stop, _show)  # each uses all the cores
    launches = []
    for entry in todo if not stop() else ():
        if not shared[entry.name].done:
            continue  # told by its teachers' failure
        try:
            link(entry, shared[entry.name])
        except UserError as error:
            outcomes.append(Outcome(entry.name, EXIT_USER_ERROR, str(error)))
        else:
            threads = max(1, usable_cores() // (at_once * entry.config.distill.ranks)) if at_once > 1 else None
            launches.append(_launch(entry, "all", entry.name, [where], threads))
    outcomes += supervise(launches, 1 if queues else at_once, stop, _show)
    return [outcome for outcome in outcomes if outcome.code != EXIT_DONE]


def _launch(one: Entry | Shared, asked: str, name: str, words: Sequence[str], threads: int | None = None) -> Launch:
    units = request_of(one.run, one.config, run_plan(one.run, one.config), asked).units
    return Launch(name, [*one.command[1:], "--cluster", *words], one.run.logs / "sweep.log", threads, units)


def _where(cluster: str, sweep: Sweep) -> tuple[str, bool]:
    """What to tell the launchers, and whether they submit; inside an allocation they find out for themselves."""
    config = sweep.entries[0].config
    scheduler = choose(cluster, config)
    if cluster == "auto" and scheduler_of(config).inside():
        return "auto", False
    return scheduler.name, scheduler.queues


def _show(name: str, line: str) -> None:
    say(f"{name}: {line}")
