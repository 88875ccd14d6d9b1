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
    embedding = config.student.task_embedding.name
    if config.evaluation.infer_task and not plugins.load("embeddings", embedding).infers_tasks:
        raise UserError(
            "evaluation.infer_task asks for a student that finds out its task, which it cannot with "
            f"student.task_embedding={embedding}; set evaluation.infer_task=false"
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

    Some methods and task embeddings depend on the number of stages or on all tasks (one-hot vectors): theirs may not.
    """
    before, after = stage_plan(old.stream), stage_plan(new.stream)
    needs_all_tasks = plugins.load("embeddings", old.student.task_embedding.name).needs_all_tasks
    fixed = needs_all_tasks or plugins.load("methods", old.method.name).fixed_number_of_stages
    return len(after) > len(before) and after[: len(before)] == before and not fixed


def refusal(run: Run, plan: list[list[str]], stage: int) -> str | None:
    """Why `stage` (from 1) cannot start, in one sentence with the commands that mend it; None: it can."""
    launch = f"python -m hpc_cpd.launch --run {run.folder} --stage"
    without = [task for task in plan[stage - 1] if not has_teacher(run, task)]
    teachers = [task for task in without if not is_done(run.teacher(task))]
    lacking = {"teachers": teachers, "trajectories": [task for task in without if task not in teachers]}
    lacked = {what: ", ".join(tasks) for what, tasks in lacking.items() if tasks}
    missing = [f"the {what} of {tasks} (make them with: {launch} teachers)" for what, tasks in lacked.items()]
    if stage > 1 and not is_done(run.stage(stage - 1)):
        missing.append(f"the student of stage {stage - 1} (make it with: {launch} {stage - 1})")
    if not missing:
        return None
    some = 0 < len(without) < len(plan[stage - 1])
    hint = ", or add --allow-missing to do without these tasks for good" if some else ""
    return f"stage {stage} cannot start; it needs {'; and '.join(missing)}{hint}"


def require_stage(run: Run, plan: list[list[str]], stage: int) -> None:
    """Raise UserError naming everything that `stage` lacks, or that there is no such stage."""
    if not 1 <= stage <= len(plan):
        raise UserError(f"there is no stage {stage}; this run has stages 1 to {len(plan)}")
    if sentence := refusal(run, plan, stage):
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
