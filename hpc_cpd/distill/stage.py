"""A stage of continual distillation, top to bottom.

Each step leaves a file or folder that is published by a rename; a stage that is run again takes up at the first
step whose result is not there. Section 4 of the design numbers the steps.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hpc_cpd.distill.batches import StageBatches, require_replay
from hpc_cpd.distill.dagger import open_new, relabel
from hpc_cpd.distill.finalize import episode_errors, keep_memory, routing_by_task, update_penalty
from hpc_cpd.distill.initialize import begin_stage, load_beginning
from hpc_cpd.distill.isolation import isolation_of_stage
from hpc_cpd.distill.learn import learn_stage
from hpc_cpd.distill.penalties import Penalty
from hpc_cpd.distill.phases import Phase, phases_of
from hpc_cpd.distill.validation import do_without_missing, require_settings, require_stage
from hpc_cpd.distributed.torch import (
    device_of_rank,
    finish_distributed,
    run_on_rank,
    start_distributed,
    stop_together,
)
from hpc_cpd.evaluation.episodes import EpisodeResult, evaluation_json, task_record
from hpc_cpd.progress import Progress
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done, mark_done, read_json, write_json
from hpc_cpd.settings import Config
from hpc_cpd.student.policy import StudentPolicy, TaskAgnosticPolicy, load_student, load_student_parts, save_student
from hpc_cpd.tasks.registry import run_plan
from hpc_cpd.trajectories.memory import open_memory
from hpc_cpd.trajectories.store import TrajectoryStore

Evaluate = Callable[[StudentPolicy | TaskAgnosticPolicy, str, int, int, list[int]], list[EpisodeResult]]
"""(policy, task id, episodes, seed, episode numbers of this rank) -> their results."""
Stop = Callable[[], bool]
"""Whether this rank was asked to stop."""


def run_stage(run: Run, stage: int, evaluate: Evaluate, stop: Stop, allow_missing: bool = False) -> None:
    """Learn stage `stage` (from 1) of `run`; called by every rank of the job.

    With `allow_missing`, tasks whose teachers are missing when the stage begins are left out for good.

    Publishes ``stages/K/student``, ``memory``, ``evaluation.json``, ``routing.json``, and ``DONE`` last. Does nothing
    when the stage is done. Raises UserError naming what is missing, StopRequested after all ranks saved.
    """
    config = run.config()
    if allow_missing:
        start_distributed()
        run_on_rank(lambda: do_without_missing(run, stage))
    plan = run_plan(run, config)
    require_stage(run, plan, stage)
    require_settings(config, len(plan))
    folder = run.stage(stage)
    if is_done(folder):
        return
    rank, _ = start_distributed()
    say = Progress(f"stage {stage}", every_seconds=0, enabled=rank == 0, folder=folder)
    seen = [task for tasks in plan[:stage] for task in tasks]
    tasks = plan[stage - 1]
    new = open_new(run, stage, tasks)
    memory = open_memory([run.stage(k) / "memory" for k in range(1, stage)], config.distill.in_memory_gigabytes)

    def lacks(name: str) -> bool:
        """Whether a step is to be done, as rank 0 sees it: a slower rank may look when its result is there already."""
        stop_together(stop, f"stage {stage} stops between two steps")
        return run_on_rank(lambda: not (folder / name).exists())

    if lacks("start"):
        say.update("task embeddings and growth")
        run_on_rank(lambda: begin_stage(run, config, plan, stage, new, memory))
    if config.evaluation.forward_transfer and lacks("evaluation_before.json"):
        say.update("evaluating the new tasks before they are learnt")
        _evaluate_before(run, config, stage, plan[stage - 1], evaluate, stop)
    if lacks("student"):
        beginning, phases = "start", phases_of(stage, config)
        if config.distill.relabelled_episodes:
            if lacks("draft"):
                _learn(run, config, plan, stage, new, memory, phases[:-1], ("start", "draft"), stop)
            say.update("playing the new tasks, for their teachers to answer")
            relabel(run, stage, tasks, folder / "draft", stop)
            beginning, phases, new = "draft", phases[-1:], open_new(run, stage, tasks)
        _learn(run, config, plan, stage, new, memory, phases, (beginning, "student"), stop)
        run_on_rank(lambda: shutil.rmtree(folder / "draft", ignore_errors=True))
    if lacks("memory"):
        say.update("choosing the replay memory")
        errors = episode_errors(folder / "student", new)
        run_on_rank(lambda: keep_memory(folder, config, stage, new, errors))
    if lacks("routing.json"):
        stores = [new] if memory is None else [new, memory]
        run_on_rank(lambda: write_json(folder / "routing.json", routing_by_task(folder / "student", stores)))
    if lacks("evaluation.json"):
        say.update(f"evaluating {len(seen)} tasks")
        records = _evaluate_all(load_student(folder / "student"), seen, config, evaluate, stop)
        evaluation = evaluation_json(stage, config.evaluation, records)
        run_on_rank(lambda: write_json(folder / "evaluation.json", evaluation))
    if config.evaluation.infer_task and lacks("evaluation_inferred.json"):
        say.update(f"evaluating {len(seen)} tasks that the student is not told")
        records = _evaluate_all(TaskAgnosticPolicy(load_student(folder / "student")), seen, config, evaluate, stop)
        inferred = evaluation_json(stage, config.evaluation, records)
        run_on_rank(lambda: write_json(folder / "evaluation_inferred.json", inferred))
    run_on_rank(lambda: mark_done(folder, {"stage": stage, "tasks": seen}))
    finish_distributed()


def _learn(
    run: Run,
    config: Config,
    plan: list[list[str]],
    stage: int,
    new: TrajectoryStore,
    memory: TrajectoryStore | None,
    phases: list[Phase],
    names: tuple[str, str],
    stop: Stop,
) -> None:
    """Run `phases` and publish the student; `names`: of the folders that it starts from and ends in."""
    folder = run.stage(stage)
    beginning, parts = load_beginning(folder / names[0], stage)
    batches = StageBatches(
        new,
        memory if config.distill.replay_fraction > 0 else None,
        parts.task_vectors,
        config.student.history,
        config.distill,
        seed=[config.seed, stage],
        device=device_of_rank(),
        past=load_student(run.stage(stage - 1) / "student") if stage > 1 else None,
        task_weights=_teacher_success(run, plan[:stage]) if config.distill.task_weights != "equal" else None,
    )
    require_replay(config.distill, stage, batches)
    penalty = None
    if config.distill.penalty != "none" and stage > 1:
        penalty = Penalty.load(run.stage(stage - 1) / "penalty.safetensors")
    isolation = isolation_of_stage(run, config, stage, len(plan), parts.state, parts.isolation)
    learnt = learn_stage(run, stage, config, phases, beginning, batches, penalty, isolation, stop)
    state, kept = isolation.published(learnt)

    if config.distill.penalty != "none" and names[1] == "student":
        update_penalty(folder, config, beginning, state, batches, penalty)

    def publish() -> None:
        metadata = {"stage": stage, "tasks_by_stage": plan[:stage], "seed": config.seed}
        save_student(
            folder / names[1],
            state,
            beginning.shape,
            beginning.experts_by_stage,
            parts.task_vectors,
            parts.task_encoder_state,
            metadata,
            parts.episode_facts,
            kept,
        )

    run_on_rank(publish)


def _teacher_success(run: Run, plan: list[list[str]]) -> dict[str, float]:
    """The success rate of every task's teacher, as it was evaluated when it was published."""
    rates = {}
    for task in (task for tasks in plan for task in tasks):
        record = read_json(run.teacher(task) / "evaluation.json")["tasks"][task]
        rates[task] = record["successes"] / record["episodes"]
    return rates


def _evaluate_before(run: Run, config: Config, stage: int, tasks: list[str], evaluate: Evaluate, stop: Stop) -> None:
    """Zero-shot success of the student so far, and of one that never learnt: what forward transfer compares."""
    folder: Path = run.stage(stage)
    start = load_student_parts(folder / "start")
    first = load_student_parts(run.stage(1) / "start")
    untrained = dataclasses.replace(first, task_vectors=start.task_vectors, episode_facts=start.episode_facts)
    records = {"untrained": _evaluate_all(StudentPolicy(untrained), tasks, config, evaluate, stop)}
    if stage == 1:
        records["before"] = records["untrained"]
    else:
        records["before"] = _evaluate_all(StudentPolicy(start), tasks, config, evaluate, stop)
    run_on_rank(lambda: write_json(folder / "evaluation_before.json", {"stage": stage - 1, **records}))


def _evaluate_all(
    policy: StudentPolicy | TaskAgnosticPolicy, tasks: list[str], config: Config, evaluate: Evaluate, stop: Stop
) -> dict[str, dict[str, Any]]:
    """The record of every task; the episodes are shared out over the ranks (a collective)."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    episodes, seed = config.evaluation.episodes, config.evaluation.seed
    mine = {}
    for task in tasks:
        stop_together(stop, "an evaluation stops and will be played again")
        mine[task] = evaluate(policy, task, episodes, seed, list(range(episodes))[rank::world_size])
    gathered: list[dict[str, list[EpisodeResult]]] = [{} for _ in range(world_size)]
    torch.distributed.all_gather_object(gathered, mine)
    results = {task: [result for part in gathered for result in part[task]] for task in tasks}
    return {task: task_record(sorted(results[task], key=lambda result: result.episode)) for task in tasks}
