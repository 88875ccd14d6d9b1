"""The one table at the end of a run: task, stage, teacher, after its stage, at the end, forgetting."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from hpc_cpd.report.run_results import RunResults, read_results, short_names
from hpc_cpd.run.paths import Run


def print_table(run: Run, console: Console | None = None) -> None:
    """Print the table of `run`, with the means below. Raises UserError when `run` is not a run folder."""
    facts = read_results(run)
    title = f"{facts.config.name}: success on {facts.config.evaluation.episodes} episodes per task"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in headings(facts):
        left = name == "Task"
        width = max(map(len, name.split()))
        table.add_column(name, justify="left" if left else "right", no_wrap=left, min_width=width)
    for name, row in zip(short_names(facts.tasks), facts.rows, strict=True):
        rates = (percent(row.get(key)) for key in ("teacher", "after_own_stage", "final"))
        lost, ends_stage = points(row.get("forgetting")), row["task"] == facts.stages[row["stage"] - 1][-1]
        table.add_row(name, str(row["stage"]), *rates, lost, end_section=ends_stage)
    means = facts.metrics or {}
    rates = (percent(means.get(key)) for key in ("teacher_success", "average_after_own_stage", "average_success"))
    table.add_row("mean", "", *rates, points(means.get("forgetting_mean")), style="bold")
    if means and means["average_success"] is None:
        table.caption = "mean -: not all tasks were evaluated after this stage"
    (console or Console()).print(table)


def headings(facts: RunResults) -> list[str]:
    finished = len(facts.evaluations)
    end = "At the end" if finished in (0, len(facts.stages)) else f"After stage {finished}"
    return ["Task", "Stage", "Teacher", "After its stage", end, "Forgetting"]


def percent(value: float | None) -> str:
    """A rate in percent, with a decimal only where there is one; a dash where there is no rate."""
    return "-" if value is None else f"{_hundredfold(value)}%"


def points(value: float | None, signed: bool = False) -> str:
    """A difference of two rates in percentage points; a dash where there is none."""
    return "-" if value is None else f"{'+' if signed and value > 0 else ''}{_hundredfold(value)} pp"


def interval(bounds: list[float] | None, unit: str, decimals: int) -> str:
    """Two rates or differences in hundredths, as ``12 to 34%``; nothing where there are none."""
    return f"{100 * bounds[0]:.{decimals}f} to {100 * bounds[1]:.{decimals}f}{unit}" if bounds else ""


def _hundredfold(value: float) -> str:
    return f"{round(100 * value, 1) + 0.0:g}"  # no minus sign before a zero
