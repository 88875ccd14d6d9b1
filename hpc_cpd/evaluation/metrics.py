"""The numbers of continual learning, as pure functions of the success matrix.

R[i][j] is the success rate on task j after stage i, s(j) the stage that taught j, T the number of stages,
t_j the teacher's success rate on the same goals and R[0] the untrained student.

- average success: mean_j R[T][j]
- recovery: mean_j R[T][j] / t_j (tasks whose teacher never succeeds are left out and listed), and the
  ratio of the means, mean_j R[T][j] / mean_j t_j
- forgetting of j: R[s(j)][j] - R[T][j], over s(j) < T; also from the best of R[s(j)..T-1][j]. Of fewer stages the
  best would be too small, so it exists only where j was evaluated after all of them
- backward transfer: minus the mean forgetting (arXiv 1706.08840)
- forward transfer: mean_j (R[s(j)-1][j] - R[0][j]). A task of stage 1 adds 0 by definition, so the mean
  over the later stages alone is given as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc_cpd.evaluation.schedule import mean_over_learnt

Rates = npt.ArrayLike
CONFIDENCE_Z = 1.959963984540054
"""Standard normal quantile of a two-sided 95% interval."""

STUDENT_FIELDS = (
    *("after_own_stage", "after_own_stage_interval", "final", "final_interval", "recovery", "before", "untrained"),
    *("forgetting", "forgetting_interval", "forgetting_from_best", "forgetting_from_best_interval"),
)
"""Keys of a per-task row that are None until the student has learnt the task."""


def continual_metrics(
    success: Rates,
    stages: Sequence[int] | np.ndarray,
    teacher: Rates,
    *,
    before: Rates | None = None,
    untrained: Rates | None = None,
    episodes: Rates | None = None,
    teacher_episodes: Rates | None = None,
    resamples: int = 2000,
    bootstrap_seed: int = 0,
) -> dict[str, Any]:
    """Compute every number of the module's docstring; JSON-able, a number that does not exist is None.

    Args:
        success: rates in [0, 1], [T, J]; row i-1 is after stage i, NaN where not evaluated. With several
            seeds of one experiment [S, T, J]: rates are averaged over the seeds first. Where a learnt task has no
            rate after stage T, the means that ask for it are None, for the others would be other tasks' means.
        stages: int [J], s(j) counted from 1. A task with s(j) > T has not been learnt: it is left out of
            every mean and listed in ``not_learnt``.
        teacher: rates [J] or [S, J]; NaN where unknown.
        before: R[s(j)-1][j], [J] or [S, J]; where NaN or absent, `success` is asked.
        untrained: R[0][j], [J] or [S, J]; NaN where unknown.
        episodes: episodes behind each rate (a number, or anything that broadcasts to `success`; the same
            for `before` and `untrained`: their number is that of the task's own stage). None: no intervals.
        teacher_episodes: the same for `teacher`; None: the teacher's rates are taken as exact.
        resamples: bootstrap resamples.
        bootstrap_seed: seed of the bootstrap.

    Returns:
        Plain numbers by name, ``per_task`` (a list of rows in the given order), ``success_by_stage`` (mean over
        the tasks learnt so far, [T]; where tasks of earlier stages were not evaluated, the evaluated ones stand for
        all of them: an estimate, unbiased if they were drawn at random), ``success_by_stage_error`` (its standard error
        due to that draw, [T], 0: all were evaluated), ``evaluated_by_stage`` (how many tasks were evaluated, [T]; the
        fewest of any seed) and ``intervals`` (name -> [low, high], 95%). Intervals of means are
        percentiles of a stratified bootstrap: within each task, stage and seed the episodes are drawn
        again, and the seeds too when there are several. Intervals of one task are score intervals
        (Wilson; Newcombe for differences), as resampling 20 successes out of 20 would claim certainty.

    Raises:
        ValueError: shapes that do not fit, rates outside [0, 1], or a learnt task that was not evaluated
            after its own stage.
    """
    other = {"teacher": teacher, "before": before, "untrained": untrained}
    table, counts, plan = _table(success, stages, other, episodes, teacher_episodes)
    rates = table.mean(axis=0)
    point = _summary(rates, plan)
    rows = _rows(rates, counts, plan)
    result: dict[str, Any] = {
        "stages": plan.last,
        "tasks": int(plan.learnt.sum()),
        "seeds": len(table),
        **{name: _plain(value) for name, value in point.items()},
        **_by_stage(table, plan),
        "not_learnt": np.flatnonzero(~plan.learnt).tolist(),
        "recovery_excluded": np.flatnonzero(plan.learnt & (rates[plan.teacher] == 0)).tolist(),
        "teacher_unknown": np.flatnonzero(plan.learnt & np.isnan(rates[plan.teacher])).tolist(),
    }
    intervals: dict[str, list[float] | None] = {}
    if episodes is not None:
        draws = _bootstrap(table, counts, resamples, bootstrap_seed)
        intervals = {name: _percentiles(value) for name, value in _summary(draws, plan).items()}
    for kind in ("forgetting", "forgetting_from_best"):
        old = [row for row in rows if row[kind] is not None]
        known = old if len(old) == plan.old.sum() else []  # the worst of some is not the worst
        worst: dict[str, Any] = max(known, key=lambda row: row[kind], default={})
        result |= {f"{kind}_worst": worst.get(kind), f"{kind}_worst_task": worst.get("index")}
        if episodes is not None:
            intervals[f"{kind}_worst"] = worst.get(f"{kind}_interval")
    return {**result, "intervals": intervals, "per_task": rows}


def wilson(rate: Rates, count: Rates) -> tuple[np.ndarray, np.ndarray]:
    """95% score interval (low, high) of a success rate seen over `count` episodes (Wilson 1927)."""
    p, n = np.asarray(rate, dtype=np.float64), np.asarray(count, dtype=np.float64)
    z2 = CONFIDENCE_Z**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = CONFIDENCE_Z / (1 + z2 / n) * np.sqrt(p * (1 - p) / n + z2 / (4 * n**2))
    return np.clip(np.minimum(centre - half, p), 0, 1), np.clip(np.maximum(centre + half, p), 0, 1)


def newcombe(first: float, first_count: float, second: float, second_count: float) -> tuple[float, float]:
    """95% interval of the difference first - second of two independent rates (Newcombe 1998, method 10)."""
    low1, high1 = wilson(first, first_count)
    low2, high2 = wilson(second, second_count)
    difference = first - second
    low = difference - np.hypot(first - low1, high2 - second)
    high = difference + np.hypot(high1 - first, second - low2)
    return max(float(low), -1.0), min(float(high), 1.0)


class _Plan:
    """Which row of the table holds what: T stages, then teacher, before, untrained."""

    def __init__(self, stages: np.ndarray, last: int) -> None:
        self.stages = stages
        self.last = last
        self.teacher, self.before, self.untrained = last, last + 1, last + 2
        self.own = np.clip(stages, 1, last) - 1, np.arange(len(stages))
        self.learnt = stages <= last
        self.old = stages < last
        self.best = np.zeros(len(stages), dtype=np.int64)
        self.followed = np.ones(len(stages), dtype=bool)  # evaluated after all stages from its own to the last but one
        self.complete = True  # all that was learnt was evaluated after the last stage


def _table(
    success: Rates, stages: Any, other: dict[str, Rates | None], episodes: Rates | None, teacher_episodes: Rates | None
) -> tuple[np.ndarray, np.ndarray, _Plan]:
    """Check the arguments; return rates and episode counts [S, T+3, J] (count inf: exact) and the plan.

    `other`: the rates of teacher, before and untrained, in this order.
    """
    matrix = np.asarray(success, dtype=np.float64)
    matrix = matrix[None] if matrix.ndim == 2 else matrix
    if matrix.ndim != 3 or 0 in matrix.shape:
        raise ValueError(f"success must be [T, J] or [S, T, J] and not empty, got shape {matrix.shape}")
    seeds, last, tasks = matrix.shape
    s = np.asarray(stages)
    if s.shape != (tasks,) or not np.issubdtype(s.dtype, np.integer) or (s < 1).any():
        raise ValueError(f"stages must be {tasks} integers from 1, got {s!r}")
    plan = _Plan(s, last)
    table = np.full((seeds, last + 3, tasks), np.nan)
    table[:, :last] = matrix
    for row, (name, values) in enumerate(other.items(), start=last):
        if values is not None:
            table[:, row] = _fit(name, values, (seeds, tasks))
    known = table[:, np.clip(s - 2, 0, last - 1), np.arange(tasks)]
    table[:, plan.before] = np.where(np.isnan(table[:, plan.before]) & (s > 1), known, table[:, plan.before])
    with np.errstate(invalid="ignore"):
        if ((table < 0) | (table > 1)).any():
            raise ValueError("success rates must lie in [0, 1]")
    missing = plan.learnt & np.isnan(table[:, *plan.own]).any(axis=0)
    if missing.any():
        raise ValueError(f"tasks {np.flatnonzero(missing).tolist()} lack a rate after their own stage")
    plan.complete = not np.isnan(table[:, last - 1, plan.learnt]).any()

    counts = np.full(table.shape, np.inf)
    if episodes is not None:
        counts[:, :last] = _fit("episodes", episodes, (seeds, last, tasks))
        counts[:, plan.before] = counts[:, plan.untrained] = counts[:, *plan.own]
    if teacher_episodes is not None:
        counts[:, plan.teacher] = _fit("teacher_episodes", teacher_episodes, (seeds, tasks))
    if (counts[~np.isnan(table)] < 1).any():
        raise ValueError("a rate must stand on at least one episode")

    past = table.mean(axis=0)[:last].copy()
    index = np.arange(last)[:, None]
    between = (index >= s - 1) & (index < last - 1)
    plan.followed = ~(between & np.isnan(past)).any(axis=0)
    past[~between | np.isnan(past)] = -1.0
    plan.best = past.argmax(axis=0)
    return table, counts, plan


def _fit(name: str, values: Rates, shape: tuple[int, ...]) -> np.ndarray:
    try:
        return np.broadcast_to(np.asarray(values, dtype=np.float64), shape)
    except ValueError:
        raise ValueError(f"{name} has shape {np.shape(values)}, which does not fit {shape}") from None


def _summary(rates: np.ndarray, plan: _Plan) -> dict[str, np.ndarray]:
    """Means over tasks of rates [..., T+3, J]; NaN where there is nothing to average, or a rate is missing."""
    columns = np.arange(len(plan.stages))
    own = rates[..., *plan.own]
    unknown = np.full_like(own, np.nan)
    final = rates[..., plan.last - 1, :] if plan.complete else unknown
    # the stage is chosen once: a maximum over resamples would be biased
    best = rates[..., plan.best, columns] if plan.followed[plan.old].all() else unknown
    teacher = rates[..., plan.teacher, :]
    untrained = rates[..., plan.untrained, :]
    zero_shot = np.where(plan.stages == 1, untrained, rates[..., plan.before, :])
    known = plan.learnt & ~np.isnan(teacher).reshape(-1, len(columns)).any(axis=0)
    moved = plan.learnt & ~np.isnan(zero_shot - untrained).reshape(-1, len(columns)).any(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(teacher > 0, final / teacher, np.nan)
        of_means = _mean(final, known) / _mean(teacher, known)
    forgetting = _mean(own - final, plan.old)
    return {
        "average_success": _mean(final, plan.learnt),
        "average_after_own_stage": _mean(own, plan.learnt),
        "teacher_success": _mean(teacher, known),
        "recovery": _mean(ratio, known),
        "recovery_of_means": np.where(np.isfinite(of_means), of_means, np.nan),
        "forgetting_mean": forgetting,
        "forgetting_from_best_mean": _mean(best - final, plan.old),
        "backward_transfer": 0.0 - forgetting,
        "forward_transfer": _mean(zero_shot - untrained, moved),
        "forward_transfer_later_stages": _mean(zero_shot - untrained, moved & (plan.stages > 1)),
    }


def _by_stage(table: np.ndarray, plan: _Plan) -> dict[str, list[Any]]:
    """The mean over the tasks learnt so far after every stage, its error, and how many tasks were evaluated.

    Each seed has its own draw of tasks, so the mean over tasks comes first and that over seeds last.
    """
    found: dict[str, list[Any]] = {"success_by_stage": [], "success_by_stage_error": [], "evaluated_by_stage": []}
    for i in range(plan.last):
        new, old = plan.stages == i + 1, plan.stages <= i
        means, errors = np.array([mean_over_learnt(seed[i, new], seed[i, old]) for seed in table]).T
        found["success_by_stage"].append(_plain(means.mean()))
        found["success_by_stage_error"].append(_plain(np.sqrt((errors**2).sum()) / len(errors)))
        found["evaluated_by_stage"].append(int((~np.isnan(table[:, i, new | old])).sum(axis=1).min()))
    return found


def _mean(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean over the masked columns that are not NaN; NaN when there are none."""
    chosen = values[..., mask]
    count = (~np.isnan(chosen)).sum(axis=-1)
    return np.where(count > 0, np.nansum(chosen, axis=-1) / np.maximum(count, 1), np.nan)


def _bootstrap(table: np.ndarray, counts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Resampled mean over seeds, [resamples, T+3, J]. Episodes drawn again are a binomial count."""
    rng = np.random.default_rng([seed, 0xB007])
    seeds = len(table)
    total = np.zeros((resamples, *table.shape[1:]))
    for _ in range(seeds):
        picked = rng.integers(seeds, size=resamples)
        rates, n = table[picked], counts[picked]
        exact = np.isinf(n) | np.isnan(rates)
        drawn = rng.binomial(np.where(exact, 1, n).astype(np.int64), np.where(exact, 0.0, rates))
        total += np.where(exact, rates, drawn / np.where(exact, 1, n))
    return total / seeds


def _rows(rates: np.ndarray, counts: np.ndarray, plan: _Plan) -> list[dict[str, Any]]:
    """One JSON-able row per task; intervals pool the episodes of all seeds."""
    pooled = counts.sum(axis=0)
    rows = []
    for j, stage in enumerate(plan.stages.tolist()):
        teacher = rates[plan.teacher, j]
        row: dict[str, Any] = {"index": j, "stage": stage, "teacher": _plain(teacher)}
        row |= {"teacher_interval": _score(rates, pooled, plan.teacher, j), **dict.fromkeys(STUDENT_FIELDS)}
        rows.append(row)
        if not plan.learnt[j]:
            continue
        own, final, best = stage - 1, plan.last - 1, int(plan.best[j])
        last = rates[final, j]
        zero_shot = plan.untrained if stage == 1 else plan.before
        at = {"after_own_stage": own, "final": final, "before": zero_shot, "untrained": plan.untrained}
        row |= {name: _plain(rates[i, j]) for name, i in at.items()}
        row |= {f"{name}_interval": _score(rates, pooled, at[name], j) for name in ("after_own_stage", "final")}
        row["recovery"] = _plain(last / teacher) if teacher > 0 else None
        for kind, past in (("forgetting", own), ("forgetting_from_best", best)):
            exists = plan.old[j] and not np.isnan(last) and (kind == "forgetting" or plan.followed[j])
            row[kind] = _plain(rates[past, j] - last) if exists else None
            if exists and not np.isinf(pooled[[past, final], j]).any():
                row[f"{kind}_interval"] = [*newcombe(rates[past, j], pooled[past, j], last, pooled[final, j])]
    return rows


def _score(rates: np.ndarray, pooled: np.ndarray, row: int, task: int) -> list[float] | None:
    if np.isnan(rates[row, task]) or np.isinf(pooled[row, task]):
        return None
    return [float(bound) for bound in wilson(rates[row, task], pooled[row, task])]


def _percentiles(draws: np.ndarray) -> list[float] | None:
    there = draws[~np.isnan(draws)]
    return np.percentile(there, [2.5, 97.5]).tolist() if len(there) else None


def _plain(value: Any) -> float | None:
    """A float without the noise of binary fractions (0.30000000000000004), None for NaN."""
    return None if np.isnan(value) else round(float(value), 12)
