"""What a stage needs before it can start, and the command that makes each missing thing."""

from __future__ import annotations

from collections.abc import Sequence

from hpc_cpd import plugins
from hpc_cpd.errors import UserError
from hpc_cpd.methods.base import method_of, phases_of
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done, read_json, write_json
from hpc_cpd.settings import Config
from hpc_cpd.tasks.registry import run_plan, stage_plan


def check_settings(config: Config, plan: Sequence[Sequence[str]]) -> None:
    """Raise UserError when settings contradict each other over this plan: now, not when a stage finds out."""
    method = method_of(config)
    if config.evaluation.infer_task and config.student.task_embedding == "one_hot":
        raise UserError(
            "evaluation.infer_task asks for a student that finds out its task, but student.task_embedding is "
            "'one_hot': a name cannot be found out; set evaluation.infer_task=false"
        )
    if config.evaluation.infer_task and method.needs_task:
        raise UserError(
            f"evaluation.infer_task asks for a student that is not told its task, but with method {config.method.name} "
            "it acts with weights that belong to the task's stage; set evaluation.infer_task=false"
        )
    method.check(len(plan))
    for number in range(1, len(plan) + 1):
        phases_of(method, number)


def lengthens(old: Config, new: Config) -> bool:
    """Whether `new` only adds stages behind those of `old`, so that a run may go on with it.

    One-hot vectors have a place for every task, and some methods plan for all stages: theirs may not.
    """
    before, after = stage_plan(old.stream), stage_plan(new.stream)
    fixed = plugins.load("methods", old.method.name).fixed_number_of_stages or old.student.task_embedding == "one_hot"
    return len(after) > len(before) and after[: len(before)] == before and not fixed


def missing_for_stage(run: Run, plan: list[list[str]], stage: int) -> list[str]:
    """One sentence for each thing that `stage` (from 1) lacks, with the command that makes it; empty: ready."""
    launch = f"python -m hpc_cpd.launch --run {run.folder}"
    missing = []
    teachers = [task for task in plan[stage - 1] if not is_done(run.teacher(task))]
    trajectories = [task for task in plan[stage - 1] if not is_done(run.trajectories(task)) and task not in teachers]
    if teachers:
        missing.append(f"the teachers of {', '.join(teachers)} (make them with: {launch} --stage teachers)")
    if trajectories:
        missing.append(f"the trajectories of {', '.join(trajectories)} (make them with: {launch} --stage teachers)")
    if stage > 1 and not is_done(run.stage(stage - 1)):
        missing.append(f"the student of stage {stage - 1} (make it with: {launch} --stage {stage - 1})")
    return missing


def refusal(run: Run, plan: list[list[str]], stage: int) -> str | None:
    """Why `stage` (from 1) cannot start, in one sentence; None: it can."""
    missing = missing_for_stage(run, plan, stage)
    if not missing:
        return None
    without = [task for task in plan[stage - 1] if not has_teacher(run, task)]
    hint = (
        ", or add --allow-missing to do without these tasks for good" if 0 < len(without) < len(plan[stage - 1]) else ""
    )
    return f"stage {stage} cannot start; it needs {'; and '.join(missing)}{hint}"


def require_stage(run: Run, plan: list[list[str]], stage: int) -> None:
    """Raise UserError naming everything that `stage` lacks, or that there is no such stage."""
    if not 1 <= stage <= len(plan):
        raise UserError(f"there is no stage {stage}; this run has stages 1 to {len(plan)}")
    sentence = refusal(run, plan, stage)
    if sentence is not None:
        raise UserError(sentence)


def has_teacher(run: Run, task: str) -> bool:
    """Whether the teacher and the trajectories of `task` are published."""
    return is_done(run.teacher(task)) and is_done(run.trajectories(task))


def do_without_missing(run: Run, stage: int) -> list[str]:
    """Leave the tasks of `stage` whose teachers are missing out of the run for good; returns them.

    Does nothing once the stage has begun. Raises UserError when no task would be left.
    """
    if (run.stage(stage) / "start").exists() or is_done(run.stage(stage)):
        return []
    tasks = run_plan(run)[stage - 1]
    missing = [task for task in tasks if not has_teacher(run, task)]
    if len(missing) == len(tasks):
        raise UserError(f"stage {stage} cannot start: --allow-missing leaves none of its tasks, no teacher is finished")
    if missing:
        file = run.left_out_file(stage)
        before = read_json(file)["tasks"] if file.is_file() else []
        write_json(file, {"tasks": [*before, *missing]})
    return missing
