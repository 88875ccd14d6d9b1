"""What a stage needs before it can start, and the command that makes each missing thing."""

from __future__ import annotations

from hpc_cpd import plugins
from hpc_cpd.errors import UserError
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done, read_json, write_json
from hpc_cpd.settings import Config
from hpc_cpd.tasks.registry import run_plan, stage_plan

MOST_PACKNET_STAGES = 255  # PackNet's owners are kept as uint8


def require_settings(config: Config, stages: int) -> None:
    """Raise UserError when settings contradict each other over this many stages: now, not when a stage finds out."""
    require_isolation(config, stages)
    student, settings = config.student, config.distill
    embedding = student.task_embedding.name
    if config.evaluation.infer_task and not plugins.load("embeddings", embedding).infers_tasks:
        raise UserError(
            "evaluation.infer_task asks for a student that finds out its task, which it cannot with "
            f"student.task_embedding={embedding}; set evaluation.infer_task=false"
        )
    if stages > 1 and student.top_k and student.grow and settings.phase1_steps == 0:
        raise UserError(
            f"student.top_k is {student.top_k}, so new experts get work in phase 1 alone, but distill.phase1_steps is "
            "0; give it steps, or set student.top_k=0"
        )
    if settings.target == "executed" and settings.relabelled_episodes:
        raise UserError(
            f"distill.relabelled_episodes is {settings.relabelled_episodes}, in which the executed actions are the "
            "student's own, so it must not imitate them; set distill.target=mean"
        )
    if settings.penalty != "none" and student.grow and settings.freeze_shared and settings.freeze_old:
        raise UserError(
            f"distill.penalty is '{settings.penalty}', but what was learnt before a stage does not move in it, so "
            "there is nothing to hold; set student.grow=false and distill.freeze_shared=false, as in "
            "configs/sweeps/baselines.yaml"
        )


def lengthens(old: Config, new: Config) -> bool:
    """Whether `new` only adds stages behind those of `old`, so that a run may go on with it.

    A task embedding may depend on every task of the stream (one-hot vectors do), and PackNet shares its weights out
    among all stages: theirs may not.
    """
    before, after = stage_plan(old.stream), stage_plan(new.stream)
    fixed = (
        plugins.load("embeddings", old.student.task_embedding.name).needs_all_tasks
        or old.distill.isolation == "packnet"
    )
    return len(after) > len(before) and after[: len(before)] == before and not fixed


def require_isolation(config: Config, stages: int) -> None:
    """Raise UserError when distill.isolation asks for what the other settings, or this many stages, contradict."""
    settings = config.distill
    method = f"distill.isolation is '{settings.isolation}'"
    if settings.isolation == "none":
        return
    if config.student.grow:
        raise UserError(f"{method}, which shares one student that does not grow out; set student.grow=false")
    if settings.penalty != "none":
        raise UserError(
            f"{method}, which holds the weights of past stages entirely, but distill.penalty is '{settings.penalty}'; "
            "set one of them to 'none'"
        )
    if settings.gradient_projection:
        raise UserError(
            f"{method}, which holds the weights of past stages entirely, so there is nothing to project a gradient "
            "for; set distill.gradient_projection=false"
        )
    if config.evaluation.infer_task:
        raise UserError(
            f"{method}, which puts the weights of a task in place by its name, but evaluation.infer_task asks for a "
            "student that is not told it; set evaluation.infer_task=false"
        )
    if settings.replay_targets == "past_student":
        raise UserError(
            f"{method}, so no stage can unlearn what the student before it did, and there is nothing to ask it for; "
            "set distill.replay_targets=teacher"
        )
    if settings.replay_fraction > 0 and settings.anchor_fraction > 0:
        raise UserError(
            f"{method}, so no stage can unlearn what the student before it did, and there is nothing to anchor; set "
            "distill.anchor_fraction=0 (or distill.replay_fraction=0, to replay nothing at all)"
        )
    if settings.relabelled_episodes:
        raise UserError(
            f"{method}, whose stages end with phase 2, but distill.relabelled_episodes is "
            f"{settings.relabelled_episodes}; set it to 0"
        )
    if settings.isolation == "packnet" and settings.phase1_steps == 0:
        raise UserError(
            f"{method}, which chooses a stage's weights by what phase 1 made of them, but distill.phase1_steps is 0; "
            "give it steps"
        )
    if settings.isolation == "packnet" and stages > MOST_PACKNET_STAGES:
        raise UserError(
            f"{method}, which shares its weights out among {MOST_PACKNET_STAGES} stages at most, but the stream has "
            f"{stages}; raise stream.tasks_per_stage"
        )


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
