"""How a run stands, as a table that fits its place, as JSON, and watched.

The table is laid out here and not by rich.table, which takes longer for 1,000 tasks than reading all their files.
"""

from __future__ import annotations

import json
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import get_args

from rich.console import Console, ConsoleOptions
from rich.segment import Segment
from rich.style import Style

from hpc_cpd.cluster.status import RunStatus, State, UnitStatus
from hpc_cpd.cluster.units import TeacherUnit
from hpc_cpd.report.run_results import short_names

Row = dict[str, str]

_STYLES = dict(zip(get_args(State), ("green", "cyan", "blue", "yellow", "red", "bold red", "dim"), strict=True))
_HEADINGS = ("Task", "State", "Progress", "Speed", "Success", "Time left", "Node", "Restarts")
_RIGHT = {"Speed", "Success", "Time left", "Restarts"}
_NARROW = ("Task", "State", "Success", "Progress")  # where all do not fit; the last column tells the rest in words
_GAP = "  "
_ERRORS_SHOWN = 20
_LEAST_PROGRESS = len("DependencyNeverSatisfied")


@dataclass(frozen=True)
class StatusTable:
    """What rich draws. `watched`: on a screen of one size, so long lines are wrapped and dull rows left out."""

    status: RunStatus
    watched: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        width, height = options.max_width, options.size.height
        below = [line for text in self._below() for line in (_wrap(text, width) if self.watched else [text])]
        units, hidden = list(self.status.units), 0
        if self.watched and len(units) + len(below) + 5 > height:
            units = [unit for unit in units if unit.state not in ("done", "not started")]
            units = units[: max(1, height - len(below) - 6)]
            hidden = len(self.status.units) - len(units)
        yield from _line(self.status.run, "bold")
        yield from _lay_out(_rows(units), width)
        if hidden:
            yield from _line(f"and {hidden} more, which fit no screen: hpc-cpd status without --watch", "dim")
        for text in ["", *below]:
            yield from _line(text)

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


def _lay_out(rows: list[Row], width: int) -> Iterator[Segment]:
    """The lines of the table."""
    widths = _widths(rows, _HEADINGS, width, {"Progress": _LEAST_PROGRESS})
    if _total(widths) > width:
        rows = [_merged(row) for row in rows]
        widths = _widths(rows, _NARROW, width, {"Progress": _LEAST_PROGRESS, "Task": 12})
    yield from _cells({heading: heading for heading in widths}, widths, Style.parse("bold"))
    yield from _line("─" * min(_total(widths), width), "dim")
    for row in rows:
        yield from _cells(row, widths, Style.parse(_STYLES[row["State"]]))


def _widths(rows: list[Row], headings: Sequence[str], width: int, least: Mapping[str, int]) -> dict[str, int]:
    """Of the columns that somebody fills. Those of `least` give up, in turn, what is too much for `width`; their cells
    are wrapped.
    """
    filled = [heading for heading in headings if heading in ("Task", "State") or any(row[heading] for row in rows)]
    widths = {heading: max([len(heading), *(len(row[heading]) for row in rows)]) for heading in filled}
    for heading, enough in least.items():
        excess = _total(widths) - width
        if heading in widths and excess > 0:
            widths[heading] = max(min(enough, widths[heading]), widths[heading] - excess)
    return widths


def _total(widths: Mapping[str, int]) -> int:
    return sum(widths.values()) + len(_GAP) * (len(widths) - 1)


def _cells(row: Row, widths: Mapping[str, int], style: Style) -> Iterator[Segment]:
    """One row, of as many lines as its longest cell takes. `style` is that of the state, or of all headings."""
    for texts in zip_longest(*(_wrap(row[heading], width) for heading, width in widths.items()), fillvalue=""):
        task, word, *others = (
            text.rjust(width) if heading in _RIGHT else text.ljust(width)
            for (heading, width), text in zip(widths.items(), texts, strict=True)
        )
        rest = _GAP + _GAP.join(others) if others else ""
        yield Segment(task + _GAP, style if row["State"] == "State" else None)
        yield Segment(word if rest.strip() else word.rstrip(), style)
        yield Segment(rest.rstrip(), style if row["State"] == "State" else None)
        yield Segment.line()


def _wrap(text: str, width: int) -> list[str]:
    return [text] if len(text) <= width else textwrap.wrap(text, max(1, width), break_on_hyphens=False)


def _line(text: str, style: str | None = None) -> Iterator[Segment]:
    yield Segment(text, None if style is None else Style.parse(style))
    yield Segment.line()
