"""Steps per second of our batched Meta-World against bare MuJoCo (the limit) and against the stock environments.

    python benchmarks/simulator.py [TASK ...] [--json OUT.json]

All play the same episodes: the same goals and the actions of the scripted policy with noise, recorded once. The limit
does nothing but the physics; the run fails unless it ends in our simulator's state, bit for bit, and unless the stock
environments see our observations. A piece of the episodes is played by one contender after the other, then the next
piece, so a machine that is busy for a while is fair to all; rates are medians over the pieces, and a ratio of two
contenders is the median of their ratios on the same piece.

One core: ours, limit and stock on one thread of one core. All cores: ours as threads of one process and as one process
per core (how MPI ranks use it), stock one after the other ("sync") and in a process each ("async").
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import mean, median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium
import metaworld
import mujoco
import numpy as np
from numpy.typing import NDArray

from hpc_cpd.cluster.provenance import describe_origin
from hpc_cpd.errors import UserError, run_command
from hpc_cpd.tasks.batch import BatchEnv
from hpc_cpd.tasks.families.metaworld import NAMES
from hpc_cpd.tasks.metaworld.batch import _STATE, MetaWorldBatch
from hpc_cpd.tasks.registry import describe
from hpc_cpd.teachers.starts._cloning import ScriptedPolicy

SEED, NOISE, PIECE = 1, 0.2, 5
FRAMES = 5
"""MuJoCo steps per environment step."""
TARGET_MEAN, TARGET_WORST, TARGET_STOCK = 0.80, 0.65, 1.8

FORK = multiprocessing.get_context("fork")

Play = Callable[[range], None]
"""Play these steps of the recorded episodes."""


@dataclass(frozen=True)
class Recording:
    """T steps of N episodes."""

    goals: NDArray[np.int64]
    """[N]"""
    actions: NDArray[np.float32]
    """[T, N, 4]"""
    mocap: NDArray[np.float64]
    """[T, N, 3]: where each action moved the hand's target"""


@lru_cache
def goals_of(name: str) -> tuple[Any, ...]:
    return tuple(metaworld.MT1(name, seed=SEED).train_tasks)


def our_batch(name: str, rows: int, threads: int) -> BatchEnv:
    """What make_batch makes, with the number of threads given."""
    return BatchEnv(describe(f"metaworld/{name}"), MetaWorldBatch(name, goals_of(name), rows, threads, {}), SEED)


def simulator_of(envs: BatchEnv) -> MetaWorldBatch:
    assert isinstance(envs._batch, MetaWorldBatch)
    return envs._batch


def record(envs: BatchEnv, steps: int) -> Recording:
    rng = np.random.default_rng(SEED)
    goals = rng.integers(envs.num_goals or 0, size=envs.num_envs)
    policy = ScriptedPolicy(envs.task.task_id)
    policy.reset(envs.task.task_id, envs.num_envs)
    observations, _ = envs.reset(options={"goal_index": goals})
    actions, mocap = [], []
    for _ in range(steps):
        noisy = policy.act(observations) + NOISE * rng.standard_normal((envs.num_envs, 4))
        actions.append(np.clip(noisy, -1.0, 1.0).astype(np.float32))
        observations = envs.step(actions[-1])[0]
        mocap.append(simulator_of(envs)._mocap.copy())
    return Recording(goals, np.array(actions), np.array(mocap))


def vector_contender(envs: Any, actions: NDArray[np.float32]) -> Play:
    """Ours or stock: what a caller of ``step`` waits for."""

    def play(steps: range) -> None:
        for step in steps:
            envs.step(actions[step])

    return play


class Limit:
    """Bare MuJoCo on the rows of `envs`: targets and grip are known beforehand, nothing is read.

    Rows of a goal follow each other, so the places of its bodies are written into the model once per goal.
    """

    def __init__(self, envs: BatchEnv, recording: Recording) -> None:
        ours = simulator_of(envs)
        self._model = ours._models[0]
        starts = [ours._starts.get(int(goal)) or ours._begin(int(goal)) for goal in recording.goals]
        self.datas = [mujoco.MjData(self._model) for _ in starts]
        for start, data in zip(starts, self.datas, strict=True):
            mujoco.mj_setState(self._model, data, start.state, _STATE)
            data.mocap_quat[0] = (1.0, 0.0, 1.0, 0.0)
        grip = recording.actions[..., 3].astype(np.float64)
        self._controls = np.stack([grip, -grip], axis=-1)
        self._mocap = recording.mocap
        self._rows = [
            (starts[goal_rows[0]], [(row, self.datas[row]) for row in goal_rows.tolist()])
            for goal in np.unique(recording.goals)
            for goal_rows in [np.flatnonzero(recording.goals == goal)]
        ]

    def play(self, steps: range) -> None:
        model, mj_step, mj_forward = self._model, mujoco.mj_step, mujoco.mj_forward
        for step in steps:
            mocap, controls = self._mocap[step], self._controls[step]
            for start, rows in self._rows:
                model.body_pos[...], model.site_pos[...] = start.body_places, start.site_places
                for row, data in rows:
                    data.mocap_pos[0] = mocap[row]
                    data.ctrl[:] = controls[row]
                    mj_step(model, data, FRAMES)
                    mj_forward(model, data)


class Processes:
    """Ours as MPI ranks use it: a process per core, each with its own batch of an equal share of the rows."""

    def __init__(self, name: str, rows: int, cores: int) -> None:
        self._shares = [range(rows * core // cores, rows * (core + 1) // cores) for core in range(cores)]
        self._pipes = []
        for share in self._shares:
            ours, theirs = FORK.Pipe()
            FORK.Process(target=_serve, args=(theirs, name, len(share)), daemon=True).start()
            self._pipes.append(ours)

    def begin(self, recording: Recording) -> None:
        for pipe, share in zip(self._pipes, self._shares, strict=True):
            pipe.send((recording.goals[share], recording.actions[:, share]))
        self._wait()

    def play(self, steps: range) -> None:
        for pipe in self._pipes:
            pipe.send(steps)
        self._wait()

    def _wait(self) -> None:
        for pipe in self._pipes:
            pipe.recv()


def _serve(pipe: Any, name: str, rows: int) -> None:
    envs = our_batch(name, rows, 1)
    goals, actions = pipe.recv()
    envs.reset(options={"goal_index": goals})
    play = vector_contender(envs, actions)
    while True:
        pipe.send(True)
        play(pipe.recv())


def stock_environments(name: str, rows: int, mode: str) -> Any:
    # vector_strategy="async", as Meta-World's MT10 takes it, is ignored for MT1: gymnasium's own argument decides
    return gymnasium.make_vec(
        "Meta-World/MT1",
        num_envs=rows,
        vectorization_mode=mode,
        disable_env_checker=True,
        env_name=name,
        seed=SEED,
    )


def begin_stock(envs: Any, name: str, goals: NDArray[np.int64]) -> float:
    """Let each stock environment begin our episode; milliseconds per reset."""
    envs.set_attr("tasks", [[goals_of(name)[goal]] for goal in goals])
    began = time.perf_counter()
    envs.reset()
    return (time.perf_counter() - began) * 1000 / len(goals)


def interleave(contenders: dict[str, tuple[Play, int]], steps: int) -> dict[str, list[float]]:
    """Environment steps per second of each contender (what it plays, its rows) on each piece."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    gc.disable()
    for first in range(0, steps, PIECE):
        piece = range(first, min(first + PIECE, steps))
        for name, (play, rows) in contenders.items():
            began = time.perf_counter()
            play(piece)
            rates[name].append(len(piece) * rows / (time.perf_counter() - began))
    gc.enable()
    return rates


def ratio(ours: list[float], theirs: list[float]) -> float:
    return median(one / other for one, other in zip(ours, theirs, strict=True))


def our_resets(name: str, rows: int) -> tuple[float, float]:
    """Milliseconds per reset: a goal seen for the first time, and later."""
    envs = our_batch(name, rows, 1)
    goals = {"goal_index": 1 + np.arange(rows)}  # goal 0 was begun when the batch was made
    times = []
    for _ in range(4):
        began = time.perf_counter()
        envs.reset(options=goals)
        times.append((time.perf_counter() - began) * 1000 / rows)
    return times[0], median(times[1:])


def measure(name: str, rows: int, stock_rows: int, steps: int, cores: list[int]) -> dict[str, Any]:
    """All figures of one task."""
    warnings.simplefilter("ignore")
    os.sched_setaffinity(0, cores)
    draw = lru_cache(metaworld.MT1)
    metaworld.MT1 = draw  # every stock environment would draw the same goals again: a second each
    draw(name, seed=SEED)
    goals_of(name)
    # what forks comes first: afterwards this process has threads
    processes = Processes(name, rows, len(cores))
    stock = {mode: stock_environments(name, stock_rows, mode) for mode in ("async", "sync")}
    threads = our_batch(name, rows, len(cores))
    recording = record(threads, steps)
    short = recording.actions[:, :stock_rows]

    os.sched_setaffinity(0, cores[:1])
    one = our_batch(name, rows, 1)
    limit = Limit(one, recording)
    one.reset(options={"goal_index": recording.goals})
    reset_ms = begin_stock(stock["sync"], name, recording.goals[:stock_rows])
    play_stock = vector_contender(stock["sync"], short), stock_rows
    on_one = {
        "ours": (vector_contender(one, recording.actions), rows),
        "limit": (limit.play, rows),
        "sync": play_stock,
    }
    core = interleave(on_one, steps)
    for mine, bare in zip(simulator_of(one)._datas, limit.datas, strict=True):
        if not np.array_equal(mine.qpos, bare.qpos):
            raise RuntimeError(f"{name}: the limit went elsewhere than our simulator, so it is no limit")
    seen = np.array([env.unwrapped._last_stable_obs for env in stock["sync"].envs]).astype(np.float32)
    if not np.array_equal(seen, one._observations[:stock_rows]):
        raise RuntimeError(f"{name}: the stock environments see something else than ours")
    first_ms, later_ms = our_resets(name, stock_rows)

    os.sched_setaffinity(0, cores)
    threads.reset(options={"goal_index": recording.goals})
    processes.begin(recording)
    for envs in stock.values():
        begin_stock(envs, name, recording.goals[:stock_rows])
    on_all = {
        "threads": (vector_contender(threads, recording.actions), rows),
        "processes": (processes.play, rows),
        "sync": play_stock,
        "async": (vector_contender(stock["async"], short), stock_rows),
    }
    every = interleave(on_all, steps)
    stock["async"].close(terminate=True)
    mine = max(("threads", "processes"), key=lambda kind: median(every[kind]))
    peer = max(("sync", "async"), key=lambda kind: median(every[kind]))
    return {
        "one_core": {kind: round(median(rates), 1) for kind, rates in core.items()},
        "all_cores": {kind: round(median(rates), 1) for kind, rates in every.items()},
        "ours_to_limit": round(ratio(core["ours"], core["limit"]), 3),
        "stock_to_limit": round(ratio(core["sync"], core["limit"]), 3),
        "ours_to_stock": round(ratio(every[mine], every[peer]), 2),
        "faster_of_ours": mine,
        "faster_of_stock": peer,
        "reset_ms": {
            "stock": round(reset_ms, 2),
            "ours_first_visit_of_a_goal": round(first_ms, 2),
            "ours_later": round(later_ms, 3),
        },
    }


def in_own_process(work: Callable[..., dict[str, Any]], name: str, *arguments: Any) -> dict[str, Any]:
    """Its memory goes with it (a model takes 21 MB), and so does its binding to cores."""
    ours, theirs = FORK.Pipe(duplex=False)
    child = FORK.Process(target=lambda: theirs.send(work(name, *arguments)))
    child.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise RuntimeError(f"{name} could not be measured; see above") from None
    finally:
        child.join()


def columns(figures: dict[str, Any]) -> dict[str, str]:
    """What the table shows of a task, by heading; threads, processes, sync and async have all cores."""
    core, every = figures["one_core"], figures["all_cores"]
    return {
        "ours": f"{core['ours']:,.0f}",
        "limit": f"{core['limit']:,.0f}",
        "ours/limit": f"{figures['ours_to_limit']:.2f}",
        "stock/limit": f"{figures['stock_to_limit']:.2f}",
        "threads": f"{every['threads']:,.0f}",
        "processes": f"{every['processes']:,.0f}",
        "stock sync": f"{every['sync']:,.0f}",
        "stock async": f"{every['async']:,.0f}",
        "ours/stock": f"{figures['ours_to_stock']:.2f}",
    }


def show(name: str, figures: dict[str, Any], with_headings: bool) -> None:
    cells = columns(figures)
    if with_headings:
        print(f"{'task':30s}" + "".join(f"{heading:>12s}" for heading in cells))
    print(f"{name:30s}" + "".join(f"{cell:>12s}" for cell in cells.values()), flush=True)


def summary(tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    to_limit = {name: figures["ours_to_limit"] for name, figures in tasks.items()}
    to_stock = {name: figures["ours_to_stock"] for name, figures in tasks.items()}
    worst, least = min(to_limit, key=to_limit.__getitem__), min(to_stock, key=to_stock.__getitem__)
    resets = {kind: [figures["reset_ms"][kind] for figures in tasks.values()] for kind in tasks[worst]["reset_ms"]}
    return {
        "mean_ours_to_limit": round(mean(to_limit.values()), 3),
        "worst_ours_to_limit": {"task": worst, "ratio": to_limit[worst]},
        "mean_stock_to_limit": round(mean(figures["stock_to_limit"] for figures in tasks.values()), 3),
        "mean_ours_to_stock": round(mean(to_stock.values()), 2),
        "least_ours_to_stock": {"task": least, "ratio": to_stock[least]},
        "mean_reset_ms": {kind: round(mean(values), 3) for kind, values in resets.items()},
    }


def report(result: dict[str, Any]) -> None:
    worst, least = result["worst_ours_to_limit"], result["least_ours_to_stock"]
    rows = (
        ("ours/limit on one core, mean", "", result["mean_ours_to_limit"], TARGET_MEAN),
        ("ours/limit on one core, worst", f" ({worst['task']})", worst["ratio"], TARGET_WORST),
        ("ours/faster stock on all cores, mean", "", result["mean_ours_to_stock"], TARGET_STOCK),
        ("ours/faster stock on all cores, least", f" ({least['task']})", least["ratio"], TARGET_STOCK),
    )
    for what, task, value, target in rows:
        print(f"{what}: {value:.2f}{task}, target {target:.2f}: {'met' if value >= target else 'MISSED'}")
    print(f"stock/limit on one core, mean: {result['mean_stock_to_limit']:.2f}")
    print("ms per reset:", ", ".join(f"{kind} {value}" for kind, value in result["mean_reset_ms"].items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="such as reach-v3; none: all 50")
    parser.add_argument("--rows", type=int, default=64, help="environments of ours and of the limit")
    parser.add_argument("--stock-rows", type=int, default=16, help="stock environments (64 are no faster)")
    parser.add_argument("--steps", type=int, default=100, help="environment steps of each row")
    parser.add_argument("--json", type=Path, help="write all figures here")
    given = parser.parse_args()
    names = given.tasks or list(NAMES)
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise UserError(f"there is no task {unknown[0]}; 'hpc-cpd tasks MT50' lists them, without 'metaworld/'")
    if not 0 < given.stock_rows <= min(given.rows, 49) or given.steps < 1:
        raise UserError("--stock-rows must lie between 1 and --rows, and below 50, and --steps above 0")
    cores = sorted(os.sched_getaffinity(0))
    print(
        f"{len(cores)} cores; {given.rows} rows, stock {given.stock_rows}; {given.steps} steps of each row", flush=True
    )
    tasks: dict[str, dict[str, Any]] = {}
    for name in names:
        tasks[name] = in_own_process(measure, name, given.rows, given.stock_rows, given.steps, cores)
        show(name, tasks[name], with_headings=len(tasks) == 1)
    result = summary(tasks)
    report(result)
    if given.json is not None:
        settings = {"cores": len(cores), "rows": given.rows, "stock_rows": given.stock_rows, "steps": given.steps}
        everything = {"settings": settings, "summary": result, "tasks": tasks, "origin": describe_origin()}
        given.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
