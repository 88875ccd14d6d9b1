"""The one table of a comparison: for the terminal, the HTML page and Markdown."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from hpc_cpd.report.comparison import Comparison, Group
from hpc_cpd.report.run_results import short_names
from hpc_cpd.report.table import percent, points

_RATES = ("average_success", "recovery", "recovery_of_means")
Cell = tuple[str, str]
"""A number, and its 95% interval or what else there is to say about it."""


def headings(comparison: Comparison) -> list[str]:
    forward = ["Forward transfer"] if _forward(comparison) else []
    untold = ["Task not told"] if _untold(comparison) else []
    numbers = ["Success at the end", "Recovery", "Recovery of means", "Mean forgetting", "Worst forgetting"]
    return ["Row", "Seeds", *numbers, *untold, *forward, "Stages"]


def cells(comparison: Comparison, group: Group) -> list[Cell]:
    """The cells of one row, as `headings` names them; the last is the wall-clock of a run's stages."""
    wanted, have = len(group.seeds), len(group.finished)
    m: dict[str, Any] = group.metrics or {}
    sure = m.get("intervals", {})
    worst = m.get("forgetting_worst_task") if (m.get("forgetting_worst") or 0) > 0 else None
    name = "" if worst is None else dict(zip(comparison.tasks, short_names(comparison.tasks), strict=True))[worst]
    row = [
        (group.name, group.title),
        (str(have) if have == wanted else f"{have} of {wanted}", ""),
        *((percent(m.get(key)), interval(sure.get(key), "%")) for key in _RATES),
        (points(m.get("forgetting_mean")), interval(sure.get("forgetting_mean"), " pp")),
        (points(m.get("forgetting_worst")), name),
    ]
    if _untold(comparison):
        found = group.untold or {"intervals": {}}
        row.append((percent(found.get("average_success")), interval(found["intervals"].get("average_success"), "%")))
    if _forward(comparison):
        key = "forward_transfer"
        row.append((points(m.get(key), signed=True), interval(sure.get(key), " pp")))
    return [*row, (duration(group.seconds), "")]


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print the table; beside each mean its 95% interval."""
    table = Table(title=comparison.name, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in headings(comparison):
        table.add_column(heading, justify="left" if heading == "Row" else "right", overflow="fold")
    for group in comparison.begun:
        row = cells(comparison, group)
        table.add_row(group.name, *(f"{value}\n[dim]{more}[/dim]" if more else value for value, more in row[1:]))
    (console or Console()).print(table)


def interval(bounds: list[float] | None, unit: str) -> str:
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f}{unit}" if bounds else ""


def duration(seconds: float | None) -> str:
    """As hours and minutes; a dash where it is not known."""
    if seconds is None:
        return "-"
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _untold(comparison: Comparison) -> bool:
    return any(group.untold for group in comparison.groups)


def _forward(comparison: Comparison) -> bool:
    return any(group.metrics and group.metrics["forward_transfer"] is not None for group in comparison.groups)
