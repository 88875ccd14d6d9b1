"""Do what a sweep's file asks for: teachers first, each kind once, then every row, one seed of each after the other."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from hpc_cpd.cluster.preemption import StopFlag
from hpc_cpd.cluster.ranks import usable_cores
from hpc_cpd.cluster.schedulers.base import choose, scheduler_of
from hpc_cpd.cluster.supervisor import Outcome, supervise
from hpc_cpd.cluster.units import request_of
from hpc_cpd.config import changed_keys
from hpc_cpd.errors import EXIT_DONE, EXIT_FAULT, EXIT_STOPPED, EXIT_USER_ERROR, StopRequested, UserError
from hpc_cpd.report.comparison import write_sweep_file
from hpc_cpd.run.lock import Lock
from hpc_cpd.run.publish import is_done
from hpc_cpd.sweep.launches import Launch
from hpc_cpd.sweep.plan import Entry, Row, Sweep, in_turn
from hpc_cpd.sweep.sharing import Shared, link, shared_by
from hpc_cpd.tasks.registry import run_plan


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
        _say(f"Sweep {sweep.folder}: {len(entries) - len(todo)} of {len(entries)} runs done, {len(todo)} to do")
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
            _say(f"{entry.name}: submitted; look: hpc-cpd status {shlex.quote(str(entry.run.folder))}")
    return EXIT_DONE


def show_plan(sweep: Sweep, rows: Sequence[Row]) -> None:
    """Print rows, seeds and commands; writes nothing.

    A launch shown here has the sweep's teachers only when the sweep made the links: ``--only ROW`` does both.
    """
    entries = [entry for row in rows for entry in row.entries]
    shared = shared_by(sweep, entries)
    for one in dict.fromkeys(shared.values()):
        for_ = ", ".join(entry.name for entry in entries if shared[entry.name] is one)
        _say(f"# teachers and trajectories, seed {sweep.data_seed}{' (done)' * one.done}, for: {for_}")
        _say(shlex.join(one.command))
    for row in rows:
        _say(f"\n# {row.name}{f': {row.title}' if row.title else ''} (teachers included: {sweep.command(row.name)})")
        for entry in row.entries:
            _say(f"{shlex.join(entry.command)}{'  # done' if finished(entry) else ''}")


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
        one.write_config()
    outcomes = supervise([_teachers(one, where, queues) for one in kinds], 1, stop, _show)  # each uses all the cores
    launches = []
    for entry in todo if not stop() else ():
        if not shared[entry.name].done:
            continue  # told by its teachers' failure
        try:
            link(entry, shared[entry.name])
        except UserError as error:
            outcomes.append(Outcome(entry.name, EXIT_USER_ERROR, str(error)))
        else:
            launches.append(_launch(entry, where, at_once))
    outcomes += supervise(launches, 1 if queues else at_once, stop, _show)
    return [outcome for outcome in outcomes if outcome.code != EXIT_DONE]


def _teachers(shared: Shared, where: str, queues: bool) -> Launch:
    argv = [*shared.command[1:], "--cluster", where, *(["--wait"] if queues else [])]
    units = request_of(shared.run, shared.config, run_plan(shared.run, shared.config), "teachers").units
    return Launch(f"teachers {shared.run.folder.name}", argv, shared.run.logs / "sweep.log", units=units)


def _launch(entry: Entry, where: str, at_once: int) -> Launch:
    threads = max(1, usable_cores() // (at_once * entry.config.distill.ranks)) if at_once > 1 else None
    units = request_of(entry.run, entry.config, run_plan(entry.run, entry.config), "all").units
    argv = [*entry.command[1:], "--cluster", where]
    return Launch(entry.name, argv, entry.run.logs / "sweep.log", threads, units)


def _where(cluster: str, sweep: Sweep) -> tuple[str, bool]:
    """What to tell the launchers, and whether they submit; inside an allocation they find out for themselves."""
    config = sweep.entries[0].config
    scheduler = choose(cluster, config)
    if cluster == "auto" and scheduler_of(config).inside():
        return "auto", False
    return scheduler.name, scheduler.queues


def _show(name: str, line: str) -> None:
    _say(f"{name}: {line}")


def _say(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # whoever read along has gone: the work goes on unheard
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
