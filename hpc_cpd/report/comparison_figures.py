"""The pictures of a comparison. Each function returns a figure, or None when there is nothing to show yet."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from hpc_cpd.report.comparison import Comparison
from hpc_cpd.report.figures import PERCENT, POINTS
from hpc_cpd.report.run_results import short_names
from hpc_cpd.report.style import ROW_INCHES, Theme, legend, new_figure, tiles

_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))
_MARKS = "osD^vP*"
MOST_TICKS = 12


def success_by_stage(comparison: Comparison, theme: Theme) -> Figure | None:
    """Mean success over the tasks learnt so far, against their number: bold per row, faint per seed."""
    rows = [group for group in comparison.groups if any(facts.metrics for facts in group.runs)]
    if not rows:
        return None
    figure, (ax,) = new_figure(theme, 8.2, 3.8 + 0.2 * -(-len(rows) // 3), grid="y")
    counts: set[int] = set()
    colours = [theme.student, theme.loss, theme.gain, theme.teacher, theme.muted]
    for number, group in enumerate(rows):
        colour, mark = colours[number % len(colours)], _MARKS[number % len(_MARKS)]
        dash = _DASHES[number // len(colours) % len(_DASHES)]
        curves = {}
        for facts in group.runs:
            if facts.metrics:
                learnt = np.cumsum([len(stage) for stage in facts.stages])[: len(facts.evaluations)]
                curves[facts.config.seed] = learnt, np.array(facts.metrics["success_by_stage"], dtype=float)
        if len(curves) > 1:
            for x, y in curves.values():
                ax.plot(x, y, color=colour, alpha=0.3, linewidth=0.8, zorder=2)
        shortest = min(len(y) for _, y in curves.values())
        x = next(iter(curves.values()))[0][:shortest]
        counts.update(x.tolist())
        mean = np.mean([y[:shortest] for _, y in curves.values()], axis=0)
        ax.plot(x, mean, color=colour, linestyle=dash, marker=mark, markersize=4, linewidth=1.6, label=group.name)
    # never less than ten points high: differences that are noise must not look like cliffs
    ax.set_ylim(bottom=max(-0.01, min(ax.get_ylim()[0], 0.9)), top=1.01)
    ax.yaxis.set_major_formatter(PERCENT)
    ax.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], min_n_ticks=3))
    ax.xaxis.set_major_locator(FixedLocator(sorted(counts)) if len(counts) <= MOST_TICKS else MaxNLocator(integer=True))
    ax.set_xlabel("tasks learnt so far, stage after stage")
    ax.set_ylabel("mean success over them")
    legend(ax, theme, columns=3)
    return figure


def forgetting(comparison: Comparison, theme: Theme) -> Figure | None:
    """Mean forgetting per row with its 95% interval, and its worst task."""
    rows = [g for g in comparison.groups if g.metrics and g.metrics["forgetting_mean"] is not None]
    if not rows:
        return None
    figure, (ax,) = new_figure(theme, 8.2, ROW_INCHES * 1.4 * len(rows) + 1.1, grid="x")
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_yticks(range(len(rows)), [group.name for group in rows])
    for y, group in enumerate(rows):
        m = group.metrics or {}
        mean, bounds = m["forgetting_mean"], m["intervals"].get("forgetting_mean")
        ax.barh(y, mean, height=0.56, color=theme.loss if mean > 0 else theme.gain, alpha=0.9, zorder=2)
        if bounds:
            ax.plot(bounds, [y, y], color=theme.text, linewidth=1.3, zorder=3)
        ax.plot([m["forgetting_worst"]], [y], "D", color=theme.muted, markersize=4, zorder=4)
    ax.axvline(0, color=theme.text, linewidth=1.0, zorder=3)
    ax.barh([0], [0], color=theme.loss, label="mean forgetting")
    ax.plot([], [], color=theme.text, linewidth=1.3, label="95% interval")
    ax.plot([], [], "D", color=theme.muted, markersize=4, label="worst task")
    ax.xaxis.set_major_formatter(POINTS)
    ax.set_xlabel("percentage points lost between a task's own stage and the last one")
    legend(ax, theme, columns=3)
    return figure


def final_success(comparison: Comparison, theme: Theme) -> Figure | None:
    """Success of every task (columns) after the last finished stage of every run (rows)."""
    runs = [(group, facts) for group, facts in comparison.runs if facts.evaluations]
    if not runs:
        return None
    tasks = comparison.tasks
    values = np.full((len(runs), len(tasks)), np.nan)
    for row, (_, facts) in enumerate(runs):
        for task, rate in zip(facts.tasks, facts.matrix()[-1], strict=True):
            values[row, tasks.index(task)] = rate
    names = [group.name if len(group.seeds) == 1 else f"{group.name}, {facts.config.seed}" for group, facts in runs]
    numbers = len(tasks) <= 30
    cell = 0.36 if numbers else 0.2
    figure, (ax,) = new_figure(theme, max(6.0, 2.6 + cell * len(tasks)), ROW_INCHES * len(runs) + 1.9)
    ax.set_ylim(len(runs) - 0.5, -0.5)
    ax.set_xlim(-0.5, len(tasks) - 0.5)
    ax.set_yticks(range(len(runs)), names)
    ax.set_xticks(range(len(tasks)), short_names(tasks), rotation=90)
    ax.xaxis.set_ticks_position("top")
    tiles(ax, values, theme.success_colours, theme, numbers=numbers)
    for row, ((above, _), (below, _)) in enumerate(pairwise(runs), 1):
        if above is not below:
            ax.axhline(row - 0.5, color=theme.line, linewidth=0.8, zorder=1)
    return figure


COMPARISON_FIGURES: dict[str, Callable[[Comparison, Theme], Figure | None]] = {
    draw.__name__: draw for draw in (success_by_stage, forgetting, final_success)
}
