"""How a run stands, as a table that fits its place, as JSON, and watched."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import get_args

from rich import box
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from hpc_cpd.cluster.status import RunStatus, State, UnitStatus
from hpc_cpd.cluster.units import TeacherUnit
from hpc_cpd.report.run_results import short_names

Row = dict[str, str]

_STYLES = dict(zip(get_args(State), ("green", "cyan", "blue", "yellow", "red", "bold red", "dim"), strict=True))
_HEADINGS = ("Task", "State", "Progress", "Speed", "Success", "Time left", "Node", "Restarts")
_RIGHT = {"Speed", "Success", "Time left", "Restarts"}
_NARROW = ("Task", "State", "Success", "Progress")  # where all do not fit; the last column tells the rest in words
_ERRORS_SHOWN = 20
_BOUNDLESS = 10_000


@dataclass(frozen=True)
class StatusTable:
    """What rich draws. `watched`: on a screen of one size, so long lines are wrapped and dull rows left out."""

    status: RunStatus
    watched: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        below = Text("\n".join(["", *self._below()]))
        units, hidden = list(self.status.units), 0
        if self.watched:
            room = options.size.height - len(console.render_lines(below, options))
            if len(units) + 4 > room:
                units = [unit for unit in units if unit.state not in ("done", "not started")]
                units = units[: max(1, room - 5)]
                hidden = len(self.status.units) - len(units)
        yield Text(self.status.run, "bold")
        rows = _rows(units)
        table = _table(rows, _HEADINGS, ["Progress"])
        if console.measure(table, options=options.update(width=_BOUNDLESS)).minimum > options.max_width:
            table = _table([_merged(row) for row in rows], _NARROW, ["Progress", "Task"])
        yield table
        if hidden:
            yield Text(f"and {hidden} more, which fit no screen: hpc-cpd status without --watch", "dim")
        yield below

    def _below(self) -> list[str]:
        status, lines = self.status, []
        broken = [unit for unit in status.units if unit.error]
        for unit in broken[:_ERRORS_SHOWN]:
            lines += [f"- {unit.unit.name}: {unit.error}", f"  log: {unit.log or 'none'}"]
        if len(broken) > _ERRORS_SHOWN:
            lines.append(f"- and {len(broken) - _ERRORS_SHOWN} more: see --json")
        done = ", ".join(f"{status.done[name]} of {total} {name}" for name, total in status.total.items())
        states = Counter(unit.state for unit in status.units if unit.state not in ("done", "not started"))
        now = ", ".join(f"{states[state]} {state}" for state in get_args(State) if states[state])
        lines += [f"Done: {done}" + (f". Now: {now}" if now else ""), *status.notes]
        if status.next is not None and not (self.watched and status.next.endswith("--watch")):
            lines.append(f"Go on with: {status.next}")
        return lines


def watch(
    snapshot: Callable[[], RunStatus], console: Console, as_json: bool = False, every_seconds: float = 10.0
) -> None:
    """Show what `snapshot` finds until everything is done, or until Ctrl-C.

    On a terminal in place; elsewhere, and as JSON (one document per line), whenever something has changed.
    """
    from rich.live import Live

    shown, in_place = None, console.is_terminal and not as_json
    try:
        with Live(console=console, auto_refresh=False) if in_place else nullcontext() as live:
            while True:
                status = snapshot()
                units = [replace(unit, seconds_left=None, steps_per_second=None) for unit in status.units]  # no clocks
                if live is not None:
                    live.update(StatusTable(status, watched=True), refresh=True)
                elif (news := replace(status, units=units).document()) != shown:
                    shown = news
                    show(status, console, as_json, indent=None)
                if status.finished:
                    return
                time.sleep(every_seconds)
    except KeyboardInterrupt:
        return


def show(status: RunStatus, console: Console, as_json: bool = False, indent: int | None = 1) -> None:
    """Print it once."""
    if as_json:
        print(json.dumps(status.document(), indent=indent, allow_nan=False), file=console.file, flush=True)
    else:
        console.print(StatusTable(status), soft_wrap=True)


def short_duration(seconds: float) -> str:
    """For example ``2d03h``, ``3h58m``, ``58m`` or ``45s``."""
    minutes, rest = divmod(max(0, int(seconds)), 60)
    hours = minutes // 60
    if hours:
        return f"{hours // 24}d{hours % 24:02d}h" if hours >= 24 else f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m" if minutes else f"{rest}s"


def _rows(units: Sequence[UnitStatus]) -> list[Row]:
    tasks = [one.unit.task for one in units if isinstance(one.unit, TeacherUnit)]
    names = dict(zip(tasks, short_names(tasks), strict=True))
    return [_row(one, names[one.unit.task] if isinstance(one.unit, TeacherUnit) else one.unit.name) for one in units]


def _row(unit: UnitStatus, task: str) -> Row:
    row = dict.fromkeys(_HEADINGS, "") | {"Task": task, "State": unit.state}
    if unit.state != "done":
        said = [None if unit.reason == "FAILED" else unit.reason, unit.progress.place if unit.progress else None]
        row |= {"Progress": "; ".join(filter(None, said)), "Node": unit.node or ""}
        row["Time left"] = "" if unit.seconds_left is None else short_duration(unit.seconds_left)
    if unit.steps_per_second is not None:
        counted = unit.progress.counted if unit.progress else "steps"
        row["Speed"] = f"{unit.steps_per_second:{'.1f' if unit.steps_per_second >= 1 else '.2g'}} {counted}/s"
    if unit.success is not None:
        row["Success"] = f"{'~' if unit.success_estimated else ''}{unit.success:.0%}"
    return row | ({"Restarts": str(unit.restarts)} if unit.restarts else {})


def _merged(row: Row) -> Row:
    """All that has no column of its own in a narrow table, told in the column of the progress."""
    restarts = "{} restart" if row["Restarts"] == "1" else "{} restarts"
    words = {"Progress": "{}", "Speed": "{}", "Time left": "{} left", "Node": "on {}", "Restarts": restarts}
    return {**row, "Progress": ", ".join(told.format(row[name]) for name, told in words.items() if row[name])}


def _table(rows: list[Row], headings: Sequence[str], wrapped: Sequence[str]) -> Table:
    """Of the columns that somebody fills. Those of `wrapped` give up what is too much for the width."""
    filled = [heading for heading in headings if heading in ("Task", "State") or any(row[heading] for row in rows)]
    table = Table(box=box.SIMPLE_HEAD, border_style="dim", show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in filled:
        widest = max([len(heading), *(len(row[heading]) for row in rows)])
        least = None if heading in wrapped else widest
        justify: JustifyMethod = "right" if heading in _RIGHT else "left"
        table.add_column(heading, justify=justify, overflow="fold", min_width=least, no_wrap=heading not in wrapped)
    for row in rows:
        table.add_row(*(Text(row[heading], _STYLES[row["State"]] if heading == "State" else "") for heading in filled))
    return table
