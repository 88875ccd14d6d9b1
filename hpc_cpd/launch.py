"""The front door: ``python -m hpc_cpd.launch --stage {teachers,1,2,..,all}``.

Decides what is left to do and where (this machine, or Slurm), and has it done. Run it again at any time:
finished work is not redone, unfinished work goes on where it stood.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hpc_cpd.errors import explain_missing

try:  # the python of the system, in place of the environment's, has some of them or none
    import pydantic  # noqa: F401
    import yaml  # noqa: F401
    from rich.console import Console
except ModuleNotFoundError as missing:
    explain_missing(missing)

from hpc_cpd.cluster import submit
from hpc_cpd.cluster.preemption import StopFlag
from hpc_cpd.cluster.provenance import TESTED, describe_origin, untested_versions
from hpc_cpd.cluster.schedulers import local, slurm, slurm_allocation
from hpc_cpd.cluster.units import LaunchRequest
from hpc_cpd.config import load_config, taken_over
from hpc_cpd.errors import (
    EXIT_DONE,
    EXIT_FAULT,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    StopRequested,
    UserError,
    run_command,
)
from hpc_cpd.run.lock import Lock
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done

HERE = "python -m hpc_cpd.launch"
NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
SUBMISSION_SECONDS = 300.0  # most that another launch's submitting is waited for, as of two sbatch commands in a row


_PLACES = {"local": "on this machine", "allocation": "in this allocation", "slurm": "through Slurm"}


def main(words: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_intermixed_args(words)
    return run_command(lambda: launch(arguments))


def launch(arguments: argparse.Namespace) -> int:
    """Do what the command line asks for; returns the exit code."""
    stop = StopFlag().install()
    work = _settle(arguments)
    where = _where(arguments)
    _require_means(work, where)
    if arguments.dry_run:
        _announce(work, where)
        _dry_run(work, where)
        return EXIT_DONE
    _make_folder(work.run.folder)
    if work.run.stop_file.exists():
        raise UserError(f"{work.run.stop_file} asks every job of this run to stop; delete it, then run this again")
    wait = SUBMISSION_SECONDS if where == "slurm" else 0.0
    with Lock(work.run.folder, f"the run {work.run.folder}", wait_seconds=wait, stop=stop):
        _open(work, where)
        _announce(work, where)
        if where == "slurm":
            submit.submit_all(work, arguments.retry, _say, stop)
        else:
            submit.require_one_stage(work, set())
            _run_here(work, stop, where)
    if where == "slurm":
        if not arguments.wait:
            _say(f"\nNext: hpc-cpd status {work.run.folder}")
            return EXIT_DONE
        submit.wait_for(work, stop)
        if stop():
            raise StopRequested("the jobs stay in the queue; the same command with --wait waits for them again")
        if work.todo_units():
            raise UserError(
                f"these did not finish: {', '.join(work.todo_units())}; why: hpc-cpd status {work.run.folder}. "
                "Then run the same command again"
            )
    _finish(work)
    return EXIT_DONE


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence, as for any mistake, and what to write instead."""
        advice = f"see {HERE} --help"
        if message.endswith("required: --stage"):
            advice = "say what to do, for example --stage all"
        elif message.startswith("unrecognized"):
            advice = "settings are written without dashes, as key=value, for example seed=1; " + advice
        print(f"error: {message}; {advice}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=HERE,
        description="Train the teachers, learn stage K, or all of it. Run it again at any time: it goes on.",
        epilog="key=value overrides a setting, for example seed=1 or distill.ranks=4. "
        "Exit codes: 0 done or submitted, 2 a mistake you can mend, 3 stopped with work left, 1 a fault of ours.",
    )
    parser.add_argument("--stage", required=True, metavar="{teachers,1,2,..,all}", help="what to do")
    parser.add_argument("--config", help="settings (YAML), for example configs/quickstart.yaml")
    parser.add_argument("--run", help="run folder; default runs/NAME")
    parser.add_argument("--cluster", choices=["auto", "local", "slurm"], default="auto", help="default: auto")
    parser.add_argument("--ranks", type=int, help="ranks of each teacher and of each stage")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and the job scripts; submit nothing")
    parser.add_argument("--wait", action="store_true", help="return when the submitted jobs have ended")
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="a stage does without the tasks whose teachers are missing, for good",
    )
    parser.add_argument("--retry", action="store_true", help=argparse.SUPPRESS)  # what a caretaker's job runs
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that override the file's")
    return parser


def _settle(arguments: argparse.Namespace) -> LaunchRequest:
    """Settings, run folder and tasks, all checked before anything is written."""
    from hpc_cpd.distill.validation import check_settings
    from hpc_cpd.tasks.probe import check_tasks
    from hpc_cpd.tasks.registry import run_plan

    overrides = list(arguments.settings)
    if arguments.ranks is not None:
        overrides += [f"teachers.ranks={arguments.ranks}", f"distill.ranks={arguments.ranks}"]
    source = arguments.config
    if source is None and arguments.run is not None:
        stored = Run(arguments.run).config_file
        if not stored.is_file():
            raise UserError(f"there is no run in {arguments.run}; give --config to start one there")
        source = stored
    config = load_config(source, overrides)
    run = Run(arguments.run or Path("runs") / config.name)
    plan = run_plan(run, config)
    tasks = [task for tasks in plan for task in tasks]
    check_tasks(plan, config)
    check_settings(config, plan)
    asked: str = arguments.stage
    if asked == "teachers":
        return LaunchRequest(run, config, plan, asked, tasks, [], arguments.allow_missing)
    if asked == "all":
        return LaunchRequest(run, config, plan, asked, tasks, list(range(1, len(plan) + 1)), arguments.allow_missing)
    if not asked.isdecimal() or not 1 <= int(asked) <= len(plan):
        raise UserError(
            f"--stage is '{asked}', but this stream has the stages 1 to {len(plan)}; or say teachers, or all"
        )
    return LaunchRequest(run, config, plan, asked, [], [int(asked)], arguments.allow_missing)


def _require_means(work: LaunchRequest, where: str) -> None:
    """Refuse what jobs would find out one by one, some of them after hours."""
    from hpc_cpd.teachers.sources.base import check_teachers

    if where == "local" and work.todo_stages and NVIDIA_GPUS.is_dir():
        from hpc_cpd.distributed.torch import require_gpus

        require_gpus(work.config.distill.ranks)
    check_teachers(work.config, work.todo_tasks)


def _open(work: LaunchRequest, where: str) -> None:
    """Make the run, or tell in what this launch differs from the one before."""
    from hpc_cpd.distill.validation import lengthens

    old = work.run.config() if work.run.config_file.is_file() else None
    shared = (work.run.folder / "teachers").is_symlink()  # another run's must not get teachers from here
    longer = old is not None and not shared and lengthens(old, work.config)
    work.run.open(work.config, _provenance(work), longer)
    if old is not None and longer:
        _say(f"{len(work.plan)} stages, there were fewer: {work.run.folder} goes on with further tasks")
    for sentence in taken_over(old, work.config) if old is not None else ():
        queued = " (jobs in the queue keep what they were submitted with)" if where == "slurm" else ""
        _say(f"From now on: {sentence}{queued}")


def _where(arguments: argparse.Namespace) -> str:
    """``local``, ``slurm``, or ``slurm_allocation``: inside one the work runs at once, it is not submitted again."""
    cluster: str = arguments.cluster
    inside = "SLURM_JOB_ID" in os.environ
    if cluster == "auto":
        if inside:
            return "allocation" if slurm_allocation.nodes() > 1 else "local"
        return "slurm" if slurm.slurm_answers() else "local"
    if cluster == "slurm" and not arguments.dry_run and not slurm.slurm_answers():
        raise UserError("sbatch does not answer here; log in to a node of the cluster, or use --cluster local")
    return cluster


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
        raise UserError(f"cannot make the run folder {folder}: {error.strerror}; choose another with --run") from None


def _announce(work: LaunchRequest, where: str) -> None:
    def part(what: str, total: int, left: int) -> str:
        return f"{what}: {total - left} of {total} done" + (f", {left} to do" if left else "")

    _say(f"Run {work.run.folder} ({_PLACES[where]})")
    for name, version in untested_versions().items():
        _say(f"  {name} {version} has not been tested, {TESTED[name]} has: rewards and success may differ")
    if work.tasks:
        _say(f"  {part('teachers and trajectories', len(work.tasks), len(work.todo_tasks))}")
    if work.asked == "all":
        _say(f"  {part('stages', len(work.stages), len(work.todo_stages))}")
    elif work.stages:
        _say(f"  stage {work.asked}: {'to do' if work.todo_stages else 'done'}")
    if not work.todo_tasks and not work.todo_stages:
        _say("Everything asked for is done already.")


# ---- on this machine


def _run_here(work: LaunchRequest, stop: StopFlag, where: str) -> None:
    """Teachers first, then one stage after another. Raises StopRequested or UserError, or leaves by SystemExit(1)."""
    logs = (work.run.logs / time.strftime("%Y%m%d-%H%M%S")).absolute()
    folder, config, cores = str(work.run.folder), work.config, local.usable_cores()
    ranks = config.teachers.ranks
    at_once, threads = max(1, cores // ranks), 0
    srun: tuple[str, ...] = ()
    if where == "allocation":
        at_once, threads = slurm_allocation.teachers_at_once(config), config.cluster.cpus_per_rank
        srun = slurm_allocation.teacher_words(config)
    teachers = []
    for task in work.todo_tasks:
        words = ["teacher", "--run", folder, "--task", task]
        at = logs / "teachers" / task
        share = threads or max(1, cores // (ranks * at_once))
        teachers.append(local.Job(f"teacher {task}", words, ranks, mpi=True, logs=at, threads=share, srun=srun))
    _run_jobs(teachers, at_once, stop, work.allow_missing)
    ranks = config.distill.ranks
    srun, threads = (), 0
    if where == "allocation":
        srun, threads = slurm_allocation.stage_words(config), config.cluster.cpus_of_stage_rank
    for stage in work.todo_stages:
        words = ["stage", "--run", folder, "--stage", str(stage)] + ["--allow-missing"] * work.allow_missing
        at, share = logs / f"stage-{stage}", threads or max(1, cores // ranks)
        job = local.Job(f"stage {stage}", words, ranks, mpi=False, logs=at, threads=share, srun=srun)
        _run_jobs([job], 1, stop)


def _run_jobs(jobs: Sequence[local.Job], at_once: int, stop: StopFlag, go_on: bool = False) -> None:
    """Run and show `jobs`. With `go_on`, those that fail are told and left behind."""
    console = Console()
    live = console.is_terminal
    with console.status("starting") as status:
        if not live:
            status.stop()

        def show(job: local.Job, line: str) -> None:
            if live:
                status.update(f"{len(jobs)} jobs, {line}" if len(jobs) > 1 else line)
            else:
                _say(line)

        outcomes = local.run_jobs(jobs, at_once, stop, show, go_on)
    for outcome in outcomes:
        if outcome.code == EXIT_FAULT or (go_on and outcome.code == EXIT_USER_ERROR):
            print(f"error: {outcome.sentence}", file=sys.stderr, flush=True)
    codes = {outcome.code for outcome in outcomes}
    if EXIT_FAULT in codes and not go_on:
        raise SystemExit(EXIT_FAULT)
    if EXIT_USER_ERROR in codes and not go_on:
        raise UserError(next(outcome.sentence for outcome in outcomes if outcome.code == EXIT_USER_ERROR))
    if EXIT_STOPPED in codes or stop():
        raise StopRequested("the same command goes on from here")


def _dry_run(work: LaunchRequest, where: str) -> None:
    tasks = work.todo_tasks
    for index, task in enumerate(tasks):
        _say(f"  teacher {index}: {task}")
    for stage in work.todo_stages:
        _say(f"  stage {stage}: {', '.join(work.plan[stage - 1])}")
    if where != "slurm":
        _say(f"  {work.config.teachers.ranks} ranks per teacher, {work.config.distill.ranks} per stage")
        return
    site = slurm.ask_site() if slurm.slurm_answers() else slurm.Site()
    logs = submit.slurm_logs(work.run)
    for plan in submit.plan_jobs(work, tasks, site):
        after = submit.dependency_of(work, {unit: f"<job of {unit}>" for unit in plan.needs})
        _say(f"\n# ---- {plan.script.name}\n{plan.script.text(logs, after)}")


# ---- before and after


def _provenance(work: LaunchRequest) -> dict[str, object]:
    """Written once, when the run begins."""
    from hpc_cpd.tasks.registry import describe

    if work.run.config_file.is_file():
        return {}
    specs = [describe(task) for tasks in work.plan for task in tasks]
    return describe_origin() | {
        "seed": work.config.seed,
        "evaluation_seed": work.config.evaluation.seed,
        "reward_versions": sorted({spec.reward_version for spec in specs}),
        "environment_versions": sorted({spec.environment_version for spec in specs}),
    }


def _finish(work: LaunchRequest) -> None:
    """The table, the report, and what to run next."""
    from hpc_cpd.report.page import build_report
    from hpc_cpd.report.table import print_table

    page = build_report(work.run)
    print_table(work.run)
    _say(f"Report: {page}")
    missing = [stage for stage in range(1, len(work.plan) + 1) if not is_done(work.run.stage(stage))]
    folder = work.run.folder
    last = work.run.stage(len(work.plan)) / "student"
    _say(f"Next: {HERE} --stage {missing[0]} --run {folder}" if missing else f"Student: {last}")


def _say(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # whoever read along has gone (head, a lost terminal): the work goes on unheard
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    sys.exit(main())
