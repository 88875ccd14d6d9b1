"""A stream of 200 stages on two ranks: memory, time of a step, seconds of a stage and bytes on disk, over the stages.

    python benchmarks/long_stream.py RUN [--stages 200] [--minutes 60] [--json OUT.json] [--plot OUT.png]

One toy task per stage (a point that is to be led to a place of its own, written down below), a tiny student that grows
by one expert per stage and mixes two, and everything else as in a run of any size: every stage is the product's own, in
two processes that begin with it and end with it. Teachers are linear policies, so that only the stages take time.

Run it again and it goes on where it stood, in the middle of a stage too; `--minutes` lets it stop before the next
stage. RUN/long_stream.jsonl has a line per stage: the largest memory of a rank (ru_maxrss), the median time of a step
of the last phase (wall-clock on rank 0; processor time, of the rank that needs more), the seconds of the stage, and the
bytes of the run, of which hard links count once.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box

HERE = Path(__file__).resolve().parent
OBSERVATION, STEPS, EPISODES = 6, 12, 10
MODULE = "long_stream"


# ---- the tasks


class Point(gymnasium.Env[Any, Any]):
    """A point in four dimensions that is to be led to a place of the task's own; it sees a clock besides."""

    observation_space = Box(-np.inf, np.inf, (OBSERVATION,), np.float32)
    action_space = Box(-1.0, 1.0, (4,), np.float32)

    def __init__(self, number: int) -> None:
        self.place = place_of(number)

    def _seen(self) -> np.ndarray:
        clock = np.array([self.clock / STEPS, 1.0])
        return np.concatenate([self.point, clock]).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.point, self.clock = self.np_random.uniform(-1.0, 1.0, 4), 0
        return self._seen(), {"is_success": False}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.point = self.point + 0.5 * np.clip(action, -1.0, 1.0)
        self.clock += 1
        distance = float(np.abs(self.point - self.place).max())
        return self._seen(), -distance, False, False, {"is_success": distance < 0.25}


def place_of(number: int) -> np.ndarray:
    return np.random.default_rng([19, number]).uniform(-2.0, 2.0, 4)


def task_of(number: int) -> str:
    return f"gymnasium/{MODULE}:Point{number:03d}-v0"


if __name__ != "__main__":  # imported for its tasks
    for _number in range(1000):
        gymnasium.register(
            f"Point{_number:03d}-v0", f"{MODULE}:Point", max_episode_steps=STEPS, kwargs={"number": _number}
        )


# ---- the run


def settings_of(stages: int) -> list[str]:
    return [
        f"stream.tasks=[{','.join(map(task_of, range(stages)))}]",
        "stream.tasks_per_stage=1",
        "student.width=32",
        "student.backbone.heads=2",
        "student.expert_hidden=32",
        "student.top_k=2",
        "student.task_embedding.gradient_steps=30",
        "student.task_embedding.size=8",
        "distill.batch_size=64",
        "distill.phase1_steps=60",
        "distill.phase2_steps=60",
        "distill.warmup_steps=5",
        "method.memory.budget_fraction=0.1",
        "evaluation.episodes=4",
        "evaluation.forward_transfer=false",
        "evaluation.old_tasks_per_stage=4",
        "checkpoint_every_seconds=1",
    ]


def make_run(folder: Path, stages: int) -> Any:
    """A run whose teachers and trajectories are done."""
    from hpc_cpd.config import load_config
    from hpc_cpd.run.paths import Run
    from hpc_cpd.run.publish import is_done, mark_done
    from hpc_cpd.trajectories.schema import Episode, Origin
    from hpc_cpd.trajectories.shard import write_manifest, write_shard

    run = Run(folder)
    run.open(load_config(None, settings_of(stages)), {})
    for number in range(stages):
        task = task_of(number)
        if is_done(run.trajectories(task)):
            continue
        rng, place, episodes = np.random.default_rng([7, number]), place_of(number), []
        for index in range(EPISODES):
            points, actions = [rng.uniform(-1.0, 1.0, 4)], []
            for _ in range(STEPS):
                actions.append(np.clip(2.0 * (place - points[-1]), -1.0, 1.0))
                points.append(points[-1] + 0.5 * actions[-1])
            clocks = np.stack([np.arange(STEPS + 1) / STEPS, np.ones(STEPS + 1)], axis=1)
            seen = np.concatenate([np.array(points), clocks], axis=1).astype(np.float32)
            acted = np.array(actions, np.float32)
            success, rewards = np.arange(STEPS) == STEPS - 1, np.ones(STEPS, np.float32)
            episodes.append(Episode(seen[:-1], acted, acted, rewards, success, seen[-1], index, index))
        origin = Origin(task, "0" * 64, 0, "native", f"gymnasium {gymnasium.__version__}")
        write_shard(run.trajectories(task), 0, 0, origin, episodes)
        write_manifest(run.trajectories(task))
        mark_done(run.trajectories(task), {})
        mark_done(run.teacher(task), {})
    return run


def rank() -> None:
    """A rank of the product, which notes when steps were made and what memory it took."""
    from hpc_cpd import worker
    from hpc_cpd.distill.engine import PhaseEngine
    from hpc_cpd.errors import EXIT_DONE

    ends: list[list[tuple[float, float]]] = []
    step, begin, leave = PhaseEngine.step, PhaseEngine.__init__, worker.leave

    def noted_begin(self: Any, *given: Any) -> None:
        ends.append([])
        begin(self, *given)

    def noted_step(self: Any, *given: Any) -> float:
        norm = step(self, *given)
        ends[-1].append((time.perf_counter(), time.process_time()))
        return norm

    def noted_leave(code: int) -> Any:
        if code == EXIT_DONE:
            usage = resource.getrusage(resource.RUSAGE_SELF)
            facts = {"rank_mb": usage.ru_maxrss / 1024, "cpu": usage.ru_utime + usage.ru_stime}
            if ends and len(ends[-1]) > 1:
                wall, processor = np.diff(np.array(ends[-1]), axis=0).T
                facts |= {"step_ms": 1000.0 * median(wall), "step_cpu_ms": 1000.0 * median(processor)}
            Path(os.environ["LONG_STREAM_OUT"] + os.environ["RANK"]).write_text(json.dumps(facts))
        leave(code)

    PhaseEngine.__init__, PhaseEngine.step, worker.leave = noted_begin, noted_step, noted_leave  # type: ignore
    worker.main()


def bytes_of(folder: Path, seen: set[int], students: bool) -> int:
    """Bytes of files under `folder` whose inodes are not in `seen` yet; `students`: of the published ones alone."""
    total = 0
    for path in folder.rglob("*"):
        if ("stages" in path.parts and path.parent.name == "student") == students and path.is_file():
            facts = path.stat()
            if facts.st_ino not in seen:
                seen.add(facts.st_ino)
                total += facts.st_size
    return total


def learn(run: Any, stage: int) -> dict[str, Any] | None:
    """Learn one stage as the launcher does; None: it was stopped."""
    from hpc_cpd.cluster.preemption import StopFlag
    from hpc_cpd.cluster.ranks import RankedJob
    from hpc_cpd.cluster.schedulers.local import supervise
    from hpc_cpd.errors import EXIT_DONE

    out = run.folder / ".long_stream."
    os.environ["LONG_STREAM_OUT"] = str(out.absolute())
    words = ["stage", "--run", str(run.folder), "--stage", str(stage)]
    job = RankedJob(f"stage {stage}", words, 2, False, run.logs / f"stage-{stage}", run.stage(stage), module=MODULE)
    began = time.perf_counter()
    (outcome,) = supervise([job], 1, StopFlag().install(), lambda name, line: None)
    seconds = time.perf_counter() - began
    if outcome.code != EXIT_DONE:
        print(outcome.sentence, file=sys.stderr)
        return None
    ranks = [json.loads(Path(f"{out}{number}").read_text()) for number in range(2)]
    return {
        "stage": stage,
        "rank_mb": max(one["rank_mb"] for one in ranks),
        "step_ms": ranks[0].get("step_ms"),
        # the rank with the newest expert has more to do, and each stage's is on another
        "step_cpu_ms": max(one.get("step_cpu_ms", 0.0) for one in ranks),
        "seconds": seconds,
        "cpu_seconds": sum(one["cpu"] for one in ranks),
    }


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    stages = [line["stage"] for line in lines]
    axes[0].plot(stages, [line["rank_mb"] for line in lines])
    axes[0].set(title="largest memory of a rank", ylabel="MB")
    axes[1].plot(stages, [line["step_ms"] for line in lines], linewidth=0.6, label="wall-clock")
    axes[1].plot(stages, [line["step_cpu_ms"] for line in lines], label="processor time")
    axes[1].set(title="a gradient step of the last phase (median)", ylabel="ms")
    axes[1].legend()
    axes[2].plot(stages, [line["run_bytes"] / 1e6 for line in lines], label="run without published students")
    axes[2].plot(stages, [line["student_bytes"] / 1e6 for line in lines], label="published students")
    axes[2].set(title="on disk (hard links count once)", ylabel="MB")
    axes[2].legend()
    for one in axes:
        one.set_xlabel("stage")
        one.set_ylim(bottom=0)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--stages", type=int, default=200, help="of the stream, when the run begins")
    parser.add_argument("--until", type=int, help="stop after this stage")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop before the next stage")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ.update({"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"})
    from hpc_cpd.cluster.provenance import describe_origin
    from hpc_cpd.run.publish import is_done

    until, began, notes = given.until or given.stages, time.monotonic(), given.run / "long_stream.jsonl"
    run = make_run(given.run, given.stages)
    for stage in range(1, until + 1):
        if is_done(run.stage(stage)):
            continue
        line = learn(run, stage) if time.monotonic() - began < 60.0 * given.minutes else None
        if line is None:
            break
        seen: set[int] = set()
        line["student_bytes"] = bytes_of(run.folder / "stages", seen, students=True)
        line["run_bytes"] = bytes_of(run.folder, seen, students=False)
        line["load"] = os.getloadavg()[0]
        with open(notes, "a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
    lines = [json.loads(text) for text in notes.read_text().splitlines()]
    if given.json is not None:
        everything = {"settings": settings_of(0)[1:], "ranks": 2, "stages": lines, "origin": describe_origin()}
        given.json.write_text(json.dumps(everything, indent=1) + "\n")
    if given.plot is not None:
        plot(lines, given.plot)


if __name__ == "__main__":
    # the product starts a rank as `python -m long_stream stage --run RUN --stage K`
    rank() if "HPC_CPD_RANKS" in os.environ else main()
