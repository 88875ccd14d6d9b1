"""A stage of continual distillation, top to bottom.

Each step leaves a file or folder that is published by a rename; a stage that is run again takes up at the first
step whose result is not there.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from functools import partial

from hpc_cpd.distill.batches import StageBatches, shares_of
from hpc_cpd.distill.dagger import open_new, play_and_answer
from hpc_cpd.distill.evaluate import evaluate, evaluate_before
from hpc_cpd.distill.finalize import episode_errors, routing_by_task, samples_of
from hpc_cpd.distill.initialize import initialize_stage
from hpc_cpd.distill.train import expert_parallel_size, train_phases
from hpc_cpd.distill.validation import check_settings, do_without_missing, require_stage
from hpc_cpd.distributed.torch import (
    device_of_rank,
    finish_distributed,
    run_on_rank,
    start_distributed,
    stop_together,
)
from hpc_cpd.evaluation.schedule import tasks_after
from hpc_cpd.methods.base import Method, Phase, Stage, StageData, method_of, phases_of
from hpc_cpd.progress import Progress
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done, mark_done, read_json, write_json
from hpc_cpd.student.checkpoint import MethodState, gather_method_state, of_this_rank
from hpc_cpd.student.network import Student
from hpc_cpd.student.policy import TaskAgnosticPolicy, load_student, load_student_parts, save_student
from hpc_cpd.tasks.registry import run_plan
from hpc_cpd.trajectories.store import TrajectoryStore

Stores = tuple[TrajectoryStore, TrajectoryStore | None]


def run_stage(run: Run, number: int, stop: Callable[[], bool], allow_missing: bool = False) -> None:
    """Learn stage `number` (from 1) of `run`; called by every rank of the job.

    `stop`: whether this rank was asked to stop. With `allow_missing`, tasks whose teachers are missing when the stage
    begins are left out for good.

    Publishes ``stages/K/student``, ``evaluation.json``, ``routing.json``, what the method keeps, and ``DONE`` last.
    Does nothing when the stage is done. Raises UserError naming what is missing, StopRequested after all ranks saved.
    """
    config = run.config()
    if allow_missing:
        start_distributed()
        run_on_rank(lambda: do_without_missing(run, number))
    plan = run_plan(run, config)
    require_stage(run, plan, number)
    check_settings(config, plan)
    folder = run.stage(number)
    if is_done(folder):
        return
    rank, _ = start_distributed()
    stage, method = Stage(run, config, plan, number, stop), method_of(config)
    progress = Progress(f"stage {number}", every_seconds=0, enabled=rank == 0, folder=folder)
    new, memory = open_new(stage), method.open_memory(stage)

    def lacks(name: str) -> bool:
        """Whether a step is to be done, as rank 0 sees it: a slower rank may look when its result is there already."""
        stop_together(stop, f"stage {number} stops between two steps")
        return run_on_rank(lambda: not (folder / name).exists())

    if lacks("start"):
        progress.update("task embeddings and growth")
        run_on_rank(lambda: initialize_stage(stage, method, new, memory))
    if config.evaluation.forward_transfer and lacks("evaluation_before.json"):
        progress.update("evaluating the new tasks before they are learnt")
        evaluate_before(stage)
    if lacks("student"):
        *parts, last = _cut_before_dagger(phases_of(method, number))
        begin = "start"
        for part in parts:
            if lacks("draft"):
                _learn(stage, method, (new, memory), part, begin, "draft")
            progress.update("playing the new tasks, for their teachers to answer")
            play_and_answer(stage, folder / "draft", last[0].dagger_episodes)
            begin, new = "draft", open_new(stage)
        _learn(stage, method, (new, memory), last, begin, "student")
        run_on_rank(lambda: shutil.rmtree(folder / "draft", ignore_errors=True))
    due = tasks_after(config, plan, number)
    if method.keeps_memory and lacks("memory"):
        progress.update("choosing the replay memory")
        errors = episode_errors(folder / "student", new)
        run_on_rank(lambda: method.keep_memory(stage, new, errors))
    if lacks("routing.json"):
        stores = [new] if memory is None else [new, memory]
        run_on_rank(lambda: write_json(folder / "routing.json", routing_by_task(folder / "student", stores, due)))
    if lacks("evaluation.json"):
        progress.update(f"evaluating {len(due)} tasks")
        evaluate(stage, load_student(folder / "student", device_of_rank()), "evaluation.json")
    if config.evaluation.infer_task and lacks("evaluation_inferred.json"):
        progress.update(f"evaluating {len(due)} tasks that the student is not told")
        untold = TaskAgnosticPolicy(load_student(folder / "student", device_of_rank()))
        evaluate(stage, untold, "evaluation_inferred.json")
    # a published student needs no checkpoints, and those of every stage would stay for ever
    run_on_rank(lambda: shutil.rmtree(folder / "checkpoints", ignore_errors=True))
    run_on_rank(lambda: mark_done(folder, {"stage": number, "tasks": stage.seen}))
    run_on_rank(lambda: forget_beginning(stage))
    finish_distributed()


def forget_beginning(stage: Stage) -> None:
    """Remove the student that a finished stage began with; forward transfer asks for that of stage 1 again."""
    if stage.number > 1:
        shutil.rmtree(stage.run.stage(stage.number) / "start", ignore_errors=True)


def _cut_before_dagger(phases: Sequence[Phase]) -> list[list[Phase]]:
    """The phases in parts, of which each but the first begins with a phase that the student plays for."""
    parts: list[list[Phase]] = [[]]
    for phase in phases:
        if phase.dagger_episodes and parts[-1]:
            parts.append([])
        parts[-1].append(phase)
    return parts


def _learn(stage: Stage, method: Method, stores: Stores, phases: Sequence[Phase], begin: str, end: str) -> None:
    """Run `phases` on `stores` (new, remembered) from the student of the folder `begin`; publish that of `end`."""
    config, folder = stage.config, stage.run.stage(stage.number)
    start, past = load_student_parts(folder / begin), None
    if stage.number > 1:
        past = load_student(stage.run.stage(stage.number - 1) / "student", device_of_rank())
    weights = _teacher_success(stage) if config.distill.task_weights == "teacher_success" else None
    target = "teacher_mean" if config.distill.target == "mean" else "actions"
    shares = partial(shares_of, task_weights=weights)
    data = StageData(*stores, start.task_vectors, config.student.history, target, shares, past)
    before = start.method_state.tensors if start.method_state is not None else {}
    method.load_state_dict(of_this_rank(before, expert_parallel_size(config)))
    method.begin_stage(stage)
    rows = method.rows(data, config.distill.batch_size)
    batches = StageBatches(rows, data, config.seed, stage.number, device_of_rank())
    state = train_phases(stage, method, phases, start, batches)

    def student() -> Student:
        whole = Student(start.shape, start.experts_by_stage, executor="functional").to(device_of_rank())
        whole.load_canonical(state)
        return whole

    published = dict(state)
    if end == "student":
        published = dict(method.end_stage(state, student, lambda count: samples_of(batches, count)))
    kept = gather_method_state(method.state_dict())
    parts = dataclasses.replace(
        start,
        state=published,
        metadata={"stage": stage.number, "tasks_by_stage": stage.plan[: stage.number], "seed": config.seed},
        method_state=MethodState(config.method.name, kept) if kept or method.needs_task else None,
    )
    run_on_rank(lambda: save_student(folder / end, parts, folder / begin))


def _teacher_success(stage: Stage) -> dict[str, float]:
    """The success rate of every task's teacher, as it was evaluated when it was published."""
    records = {task: read_json(stage.run.teacher(task) / "evaluation.json")["tasks"][task] for task in stage.seen}
    return {task: record["successes"] / record["episodes"] for task, record in records.items()}
