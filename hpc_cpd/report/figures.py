"""The pictures of a run and of a comparison. Each function returns a figure, or None: there is nothing to show yet."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, MaxNLocator

from hpc_cpd.report.comparison import Comparison
from hpc_cpd.report.run_results import Record, RunResults, short_names
from hpc_cpd.report.style import ROW_INCHES, Drawing, Theme, legend, new_figure, outline, task_figure, tiles

PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.0f}%")
POINTS = FuncFormatter(lambda value, _: f"{100 * value:+.0f}" if value else "0")
MAX_NUMBERED_COLUMNS = 30
_NAMES_INCHES = 2.6
_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))
_MARKS = "osD^vP*"
MOST_TICKS = 12


def success_matrix(facts: RunResults, theme: Theme) -> Figure | None:
    """Success per task (rows) after each stage (columns), the teacher beside it; own stages outlined."""
    if not facts.evaluations and not facts.teachers:
        return None
    tasks, total = facts.tasks, len(facts.stages)
    values = np.full((len(tasks), total), np.nan)
    if facts.evaluations:
        values[:, : len(facts.evaluations)] = facts.matrix().T
    cell = 0.56 if total <= 14 else 0.38
    figure, ax = task_figure(theme, facts.rows, max(6.0, _NAMES_INCHES + cell * (total + 1.5) + 0.6), bands=False)
    numbers = total <= MAX_NUMBERED_COLUMNS
    teacher = np.array([[row["teacher"] if row["teacher"] is not None else np.nan] for row in facts.rows])
    tiles(ax, teacher, theme.success_colours, theme, left=-1.4)
    tiles(ax, values, theme.success_colours, theme, numbers=numbers)
    top = 0
    for stage, members in enumerate(facts.stages):
        outline(ax, stage, top, 1, len(members), theme.text if stage < len(facts.evaluations) else theme.line)
        top += len(members)
    ax.set_xlim(-2.0, total - 0.4)
    marks = [k for k in range(total) if numbers or (k + 1) % 5 == 0]
    ax.set_xticks([-1.4, *marks], ["teacher", *(str(k + 1) for k in marks)])
    ax.set_xlabel("success in % after stage", x=(2.0 + (total - 1) / 2) / (total + 1.6), ha="center")
    return figure


def teacher_and_student(facts: RunResults, theme: Theme) -> Figure | None:
    """Per task: the teacher, the student after the task's own stage, and at the end."""
    rows = [row for row in facts.rows if row["teacher"] is not None or row.get("final") is not None]
    if not rows:
        return None
    figure, ax = task_figure(theme, rows, 8.2)
    for y, row in enumerate(rows):
        final, own = row.get("final"), row.get("after_own_stage")
        if interval := row.get("final_interval"):
            ax.plot(interval, [y, y], color=theme.student, alpha=0.25, linewidth=4, solid_capstyle="round", zorder=2)
        if final is not None and own is not None and own != final:
            colour = theme.loss if final < own else theme.gain
            ax.plot([own, final], [y, y], color=colour, linewidth=1.8, zorder=3)
    end = "student at the end" if facts.finished else "student now"
    marks: dict[str, dict[str, Any]] = {
        "teacher": {"label": "teacher", "marker": "D", "s": 46, "facecolors": "none", "edgecolors": theme.teacher},
        "after_own_stage": {"label": "after its own stage", "marker": "o", "s": 34, "color": theme.earlier},
        "final": {"label": end, "marker": "o", "s": 13, "color": theme.student},
    }
    for name, style in marks.items():
        points = [(row[name], y) for y, row in enumerate(rows) if row.get(name) is not None]
        if points:
            x, y_values = zip(*points, strict=True)
            ax.scatter(x, y_values, zorder=4, linewidths=1.3, clip_on=False, **style)
    ax.plot([], [], color=theme.student, alpha=0.25, linewidth=4, label="95% interval")
    ax.set(xlim=(-0.02, 1.02), xlabel="success rate")
    ax.xaxis.set_major_formatter(PERCENT)
    legend(ax, theme, columns=4)
    return figure


def forgetting(facts: RunResults, theme: Theme) -> Figure | None:
    """Per old task: success lost since its own stage, in percentage points, with 95% intervals."""
    rows = [row for row in facts.rows if row.get("forgetting") is not None]
    if not rows or not facts.metrics:
        return None
    figure, ax = task_figure(theme, rows, 8.2)
    for y, row in enumerate(rows):
        value, interval = row["forgetting"], row["forgetting_interval"]
        ax.barh(y, value, height=0.56, color=theme.loss if value > 0 else theme.gain, alpha=0.9, zorder=2)
        if interval:
            ax.plot(interval, [y, y], "|-", color=theme.muted, linewidth=1.1, markersize=4, zorder=3)
        if value == 0:
            ax.plot([0], [y], "o", color=theme.muted, markersize=3, zorder=4)
    mean, interval = facts.metrics["forgetting_mean"], facts.metrics["intervals"]["forgetting_mean"]
    ax.axvline(0, color=theme.text, linewidth=1.0, zorder=3)
    if interval:
        ax.axvspan(*interval, color=theme.student, alpha=0.12, zorder=1, linewidth=0)
    if mean is not None:  # of all old tasks; not all may have been evaluated yet
        style: dict[str, Any] = {"linewidth": 1.4, "linestyle": (0, (4, 2)), "label": "mean, 95% interval"}
        ax.axvline(mean, color=theme.student, zorder=3, **style)
    ax.bar([0], [0], color=theme.loss, label="forgotten")
    ax.bar([0], [0], color=theme.gain, label="improved")
    ax.plot([], [], color=theme.muted, linewidth=1.1, label="95% interval of a task")
    ax.xaxis.set_major_formatter(POINTS)
    ax.set_xlabel("forgetting: percentage points lost between the task's own stage and the last one")
    legend(ax, theme, columns=4)
    return figure


def stage_curves(facts: RunResults, theme: Theme) -> Figure | None:
    """Loss of the student over all stages, one after the other; colours tell the phases."""
    told = facts.stage_curves().items()
    losses = {stage: [one for one in lines if isinstance(one.get("loss"), int | float)] for stage, lines in told}
    curves = {stage: lines for stage, lines in losses.items() if lines}
    if not curves:
        return None
    figure, (ax,) = new_figure(theme, 9.0, 3.6, grid="y")
    names = list(dict.fromkeys(str(line.get("phase", "")) for lines in curves.values() for line in lines))
    palette = [theme.student, theme.teacher, theme.gain, theme.loss]
    start, above = 0.0, ax.get_xaxis_transform()
    for stage, lines in curves.items():
        x = start + _running_steps(lines)
        phases, loss = np.array([str(line.get("phase", "")) for line in lines]), _numbers(lines, "loss")
        replay = _numbers(lines, "replay_loss")
        if stage % 2:
            ax.axvspan(start, x[-1], color=theme.band, zorder=0, linewidth=0)
        if len(curves) <= 16 or stage % 5 == 0:
            label = f"stage {stage}" if len(curves) <= 10 else str(stage)
            ax.text((start + x[-1]) / 2, 1.01, label, ha="center", color=theme.muted, fontsize=8, transform=above)
        for number, phase in enumerate(names):
            part = phases == phase
            if not part.any():
                continue
            colour = palette[number % len(palette)]
            label = (f"phase {phase}" if phase.isdigit() else phase.replace("_", " ")) or "loss"
            ax.plot(x[part], loss[part], color=colour, alpha=0.22, linewidth=0.7, zorder=2)
            ax.plot(x[part], _smooth(loss[part]), color=colour, linewidth=1.6, zorder=3, label=label)
            part &= ~np.isnan(replay)
            if part.any():
                smooth = _smooth(replay[part])
                ax.plot(x[part], smooth, color=theme.muted, linewidth=1.1, linestyle=":", label="on replay")
        start = x[-1]
    if min(line["loss"] for lines in curves.values() for line in lines) > 0:
        ax.set_yscale("log")
        ax.tick_params(which="minor", length=0)
    ax.set(xlim=(0, start), xlabel="gradient steps, stage after stage", ylabel="distillation loss")
    handles, labels = ax.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))  # every stage has its phases
    ax.legend(once.values(), once.keys(), loc="upper right", frameon=False, fontsize=8, labelcolor=theme.text, ncols=4)
    return figure


def teacher_curves(facts: RunResults, theme: Theme) -> Figure | None:
    """Evaluated success of every teacher against its environment steps, one small plot each.

    A teacher that never succeeded has the mean return instead, which tells whether it learns at all.
    """
    curves = {task: points for task, lines in facts.teacher_curves().items() if (points := _evaluations(lines))}
    if not any(len({step for step, *_ in points}) > 1 for points in curves.values()):  # the table has single points
        return None
    columns = min(5, len(curves))
    rows, width = -(-len(curves) // columns), 1.9 * columns + 0.4 if columns > 2 else 6.0
    figure, axes = new_figure(theme, width, 1.25 * rows + 0.35, rows, columns, grid="y")
    last = max(point[0] for points in curves.values() for point in points)
    for ax in axes[len(curves) :]:
        ax.set_visible(False)
    names = short_names(list(curves))
    for number, (ax, name, points) in enumerate(zip(axes, names, curves.values(), strict=False)):
        steps, success, returns = zip(*points, strict=True)
        title = f"{name}{'' if any(success) else ': return'}"
        ax.set_title(title, fontsize=7 if len(title) > 22 else 8, loc="left", pad=4, color=theme.text)
        if any(success):
            ax.set_ylim(0, 1)
            ax.set_yticks([0, 0.5, 1], ["0", "50", "100%"] if number % columns == 0 else ["", "", ""])
            ax.fill_between(steps, success, color=theme.teacher, alpha=0.15, linewidth=0)
        values = success if any(success) else returns
        ax.plot(steps, values, color=theme.teacher, linewidth=1.5, clip_on=False)
        ax.plot(steps[-1:], values[-1:], "o", color=theme.teacher, markersize=3.6, clip_on=False)
        ax.set_xlim(-0.02 * max(last, 1), 1.02 * max(last, 1))
        ax.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.tick_params(labelsize=7)
        if number + columns < len(curves):
            ax.set_xticklabels([])
    figure.supxlabel("environment steps", color=theme.muted, fontsize=8.5)
    return figure


def routing(facts: RunResults, theme: Theme) -> Figure | None:
    """Mean gate probability of every expert (columns) for every task (rows); a task's own experts outlined."""
    record = facts.routing()
    experts: list[Record] = record.get("experts") or []
    answer: dict[str, list[float]] = record.get("tasks") or {}
    rows = [row for row in facts.rows if row["task"] in answer]
    tasks = [row["task"] for row in rows]
    if not experts or not tasks:
        return None
    values = np.full((len(tasks), len(experts)), np.nan)
    for y, task in enumerate(tasks):
        shares = answer[task][: len(experts)]
        values[y, : len(shares)] = shares
    cell = 0.46 if len(experts) <= 16 else 0.26
    figure, ax = task_figure(theme, rows, max(6.0, _NAMES_INCHES + cell * len(experts) + 0.6), bands=False)
    tiles(ax, values, theme.share_colours, theme, numbers=len(experts) <= 16)
    for column, expert in enumerate(experts):
        if expert.get("task") in tasks:
            outline(ax, column, tasks.index(str(expert["task"])), 1, 1, theme.text)
        if column and expert.get("stage") != experts[column - 1].get("stage"):
            ax.axvline(column - 0.5, color=theme.line, linewidth=0.8, zorder=1)
    ax.set_xlim(-0.6, len(experts) - 0.4)
    marks = range(0, len(experts), 1 if len(experts) <= 30 else 5)
    ax.set_xticks(list(marks), [str(experts[i].get("id", i)) for i in marks])
    ax.set_xlabel("expert, oldest first: mean gate probability in %")
    return figure


_OF_A_RUN = (success_matrix, teacher_and_student, forgetting, routing, stage_curves, teacher_curves)
FIGURES: dict[str, Drawing[RunResults]] = {draw.__name__: draw for draw in _OF_A_RUN}


def success_by_stage(comparison: Comparison, theme: Theme) -> Figure | None:
    """Mean success over the tasks learnt so far, against their number: bold per row, faint per seed.

    A stage after which it is estimated has a hollow mark with a bar of two standard errors, one after which it is not
    known has none.
    """
    rows = [group for group in comparison.groups if any(facts.metrics for facts in group.runs)]
    if not rows:
        return None
    figure, (ax,) = new_figure(theme, 8.2, 3.8 + 0.2 * -(-len(rows) // 3), grid="y")
    counts: set[int] = set()
    colours = [theme.student, theme.loss, theme.gain, theme.teacher, theme.muted]
    for number, group in enumerate(rows):
        colour, mark = colours[number % len(colours)], _MARKS[number % len(_MARKS)]
        dash = _DASHES[number // len(colours) % len(_DASHES)]
        curves = [_curve(facts) for facts in group.runs if facts.metrics]
        for x, y in (curve[:2] for curve in curves if len(curves) > 1):
            ax.plot(x[~np.isnan(y)], y[~np.isnan(y)], color=colour, alpha=0.3, linewidth=0.8, zorder=2)
        shortest = min(len(curve[0]) for curve in curves)
        x = curves[0][0][:shortest]
        counts.update(x.tolist())
        means, errors, partly = (np.stack([curve[i][:shortest] for curve in curves]) for i in (1, 2, 3))
        mean, known = means.mean(axis=0), ~np.isnan(means).any(axis=0)
        style: dict[str, Any] = {"color": colour, "marker": mark, "markersize": 4}
        ax.plot(x[known], mean[known], linestyle=dash, linewidth=1.6, label=group.name, **style)
        if (guess := known & partly.any(axis=0)).any():
            bars = 2 * np.sqrt((errors[:, guess] ** 2).sum(axis=0)) / len(curves)
            style |= {"markerfacecolor": theme.background, "linestyle": "none", "elinewidth": 0.9, "zorder": 3}
            ax.errorbar(x[guess], mean[guess], np.nan_to_num(bars), **style)
    # never less than ten points high: differences that are noise must not look like cliffs
    ax.set_ylim(bottom=max(-0.01, min(ax.get_ylim()[0], 0.9)), top=1.01)
    ax.yaxis.set_major_formatter(PERCENT)
    ax.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], min_n_ticks=3))
    ax.xaxis.set_major_locator(FixedLocator(sorted(counts)) if len(counts) <= MOST_TICKS else MaxNLocator(integer=True))
    ax.set(xlabel="tasks learnt so far, stage after stage", ylabel="mean success over them")
    legend(ax, theme, columns=3)
    return figure


def _curve(facts: RunResults) -> tuple[np.ndarray, ...]:
    """Of every finished stage: tasks learnt, mean success over them, its error, and whether it is not that of all."""
    m, keys = facts.metrics or {}, ("success_by_stage", "success_by_stage_error")
    mean, error = (np.array(m[key], dtype=float) for key in keys)
    return np.cumsum([len(stage) for stage in facts.stages])[: len(mean)], mean, error, np.array(facts.partly)


def forgetting_of_rows(comparison: Comparison, theme: Theme) -> Figure | None:
    """Mean forgetting per row with its 95% interval, and its worst task."""
    rows = [g for g in comparison.groups if g.metrics and g.metrics["forgetting_mean"] is not None]
    if not rows:
        return None
    figure, (ax,) = new_figure(theme, 8.2, ROW_INCHES * 1.4 * len(rows) + 1.1, grid="x")
    ax.set(ylim=(len(rows) - 0.5, -0.5), yticks=range(len(rows)), yticklabels=[group.name for group in rows])
    for y, m in enumerate(group.metrics or {} for group in rows):
        mean = m["forgetting_mean"]
        ax.barh(y, mean, height=0.56, color=theme.loss if mean > 0 else theme.gain, alpha=0.9, zorder=2)
        if bounds := m["intervals"].get("forgetting_mean"):
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
        values[row, [tasks.index(task) for task in facts.tasks]] = facts.matrix()[-1]
    names = [group.name if len(group.seeds) == 1 else f"{group.name}, {facts.config.seed}" for group, facts in runs]
    numbers = len(tasks) <= 30
    width = max(6.0, 2.6 + (0.36 if numbers else 0.2) * len(tasks))
    figure, (ax,) = new_figure(theme, width, ROW_INCHES * len(runs) + 1.9)
    ax.set(xlim=(-0.5, len(tasks) - 0.5), ylim=(len(runs) - 0.5, -0.5), yticks=range(len(runs)), yticklabels=names)
    ax.set_xticks(range(len(tasks)), short_names(tasks), rotation=90)
    tiles(ax, values, theme.success_colours, theme, numbers=numbers)
    for row, ((above, _), (below, _)) in enumerate(pairwise(runs), 1):
        if above is not below:
            ax.axhline(row - 0.5, color=theme.line, linewidth=0.8, zorder=1)
    return figure


COMPARISON_FIGURES: dict[str, Drawing[Comparison]] = dict(
    success_by_stage=success_by_stage, forgetting=forgetting_of_rows, final_success=final_success
)


def _evaluations(lines: list[Record]) -> list[tuple[float, ...]]:
    """(environment steps, success, mean return) of a teacher's evaluations; noisy rollouts do not count."""
    keys = ("environment_steps", "success", "mean_return")
    found: list[list[Any]] = [[line.get(key) for key in keys] for line in lines if line.get("phase") == "evaluation"]
    return [tuple(map(float, values)) for values in found if all(isinstance(value, int | float) for value in values)]


def _numbers(lines: list[Record], key: str) -> np.ndarray:
    """What stands under `key` in each line; NaN where it is no number."""
    values = (line.get(key) for line in lines)
    return np.array([float(value) if isinstance(value, int | float) else np.nan for value in values])


def _running_steps(lines: list[Record]) -> np.ndarray:
    """Steps since the start of the stage, also where each phase counts from its own zero."""
    steps = np.array([float(line["step"]) for line in lines])
    gone = np.diff(steps, prepend=0.0)
    return np.cumsum(np.where(gone < 0, steps, gone))


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over about a twentieth of the curve, shorter at the ends."""
    window = np.ones(2 * (len(values) // 40) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
