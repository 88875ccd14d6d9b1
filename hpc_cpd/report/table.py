"""The one table at the end of a run: task, stage, teacher, after its stage, at the end, forgetting."""

from __future__ import annotations

from itertools import islice

from rich import box
from rich.console import Console
from rich.table import Table

from hpc_cpd.report.run_results import Row, RunResults, read_results, short_names
from hpc_cpd.run.paths import Run

HEADINGS = ("Task", "Stage", "Teacher", "After its stage", "At the end", "Forgetting")


def final_table(run: Run) -> list[Row]:
    """One row per task in the order of learning.

    Keys: task, stage, episodes, teacher, after_own_stage, final, forgetting (rates, None where not known
    yet), each rate with a NAME_interval. Raises UserError when `run` is not a run folder.
    """
    return read_results(run).rows


def print_table(run: Run, console: Console | None = None) -> None:
    """Print the table of `run`, with the means below."""
    facts = read_results(run)
    (console or Console()).print(_rich(facts))


def percent(value: float | None) -> str:
    """A rate in percent, with a decimal only where there is one; a dash where there is no rate."""
    return "-" if value is None else f"{_hundredfold(value)}%"


def points(value: float | None, signed: bool = False) -> str:
    """A difference of two rates in percentage points; a dash where there is none."""
    if value is None:
        return "-"
    return f"{'+' if signed and value > 0 else ''}{_hundredfold(value)} pp"


def _hundredfold(value: float) -> str:
    rounded = round(100 * value, 1) + 0.0  # no minus sign before a zero
    return f"{rounded:.0f}" if rounded == int(rounded) else f"{rounded:.1f}"


def _rich(facts: RunResults) -> Table:
    finished, total = len(facts.evaluations), len(facts.stages)
    end = HEADINGS[4] if finished == total else f"After stage {finished}" if finished else HEADINGS[4]
    table = Table(
        title=f"{facts.config.name}: success on {facts.config.evaluation.episodes} episodes per task",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for heading in HEADINGS:
        first = heading == HEADINGS[0]
        name = end if heading == HEADINGS[4] else heading
        table.add_column(
            name, justify="left" if first else "right", no_wrap=first, min_width=max(map(len, name.split()))
        )
    keys = ("teacher", "after_own_stage", "final")
    rows = iter(zip(short_names(facts.tasks), facts.rows, strict=True))
    for stage, tasks in enumerate(facts.stages, 1):
        for name, row in islice(rows, len(tasks)):
            table.add_row(name, str(stage), *(percent(row.get(key)) for key in keys), points(row.get("forgetting")))
        table.add_section()
    means = facts.metrics or {}
    cells = [percent(means.get(key)) for key in ("teacher_success", "average_after_own_stage", "average_success")]
    table.add_row("mean", "", *cells, points(means.get("forgetting_mean")), style="bold")
    return table
