"""The entry point: ``python -m hpc_cpd.launch --stage {teachers,1,2,..,all}``.

Decides what is left to do and where (this machine, or a scheduler), and has it done. Run it again at any time:
finished work is not redone, unfinished work goes on where it stood.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from hpc_cpd.errors import explain_missing

try:  # the python of the system, in place of the environment's, has some of them or none
    import pydantic  # noqa: F401
    import rich  # noqa: F401
    import yaml  # noqa: F401
except ModuleNotFoundError as missing:
    explain_missing(missing)

from hpc_cpd.cluster import submit
from hpc_cpd.cluster.preemption import StopFlag
from hpc_cpd.cluster.provenance import TESTED, describe_origin, untested_versions
from hpc_cpd.cluster.schedulers.base import Scheduler, choose, find_rank
from hpc_cpd.cluster.schedulers.local import Local
from hpc_cpd.cluster.snapshot import live_owner
from hpc_cpd.cluster.units import LaunchRequest, not_done, request_of
from hpc_cpd.config import load_config, taken_over
from hpc_cpd.errors import EXIT_USER_ERROR, StopRequested, UserError, run_command
from hpc_cpd.progress import say
from hpc_cpd.run.job import set_this_job
from hpc_cpd.run.lock import Lock
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done

HERE = "python -m hpc_cpd.launch"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    return run_command(partial(launch, arguments))


def launch(arguments: argparse.Namespace) -> None:
    """Do what the command line asks for. Raises StopRequested and UserError, or leaves by SystemExit."""
    stop = StopFlag().install()
    set_this_job(find_rank(os.environ).job)
    request = read_request(arguments)
    scheduler = choose(arguments.cluster, request.config)
    if not arguments.dry_run and not scheduler.available():
        advice = "log in to a node of the cluster, or use --cluster local"
        raise UserError(f"{scheduler.name} does not answer here; {advice}")
    check(request, scheduler)
    if arguments.dry_run:
        _announce(request, scheduler)
        _print_plan(request, scheduler)
        return
    try:
        request.run.folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
        raise _no_place(request.run.folder, str(error.strerror)) from None
    wait = 300.0 if scheduler.queues else 0.0  # for another launch that submits, as of two sbatch commands in a row
    with Lock(request.run.folder, f"the run {request.run.folder}", wait_seconds=wait, stop=stop):
        _open(request, scheduler)
        _announce(request, scheduler)
        if isinstance(scheduler, Local):
            submit.require_one_stage(request, set())
            scheduler.run(request, stop)
        else:
            submit.submit_all(request, scheduler, arguments.retry, stop)
    if scheduler.queues:
        if not arguments.wait:
            say(f"\nNext: hpc-cpd status {request.run.folder}")
            return
        submit.wait_for(request, scheduler, stop)
        if stop():
            raise StopRequested("the jobs stay in the queue; the same command with --wait waits for them again")
        if request.todo:
            raise UserError(
                f"these did not finish: {', '.join(unit.name for unit in request.todo)}; why: hpc-cpd status "
                f"{request.run.folder}. Then run the same command again"
            )
    _finish(request)


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
        "Exit codes: 0 done or submitted, 2 user error, 3 interrupted (run it again to continue), 1 internal error.",
    )
    add, flag = parser.add_argument, partial(parser.add_argument, action="store_true")
    where = "a scheduler (see hpc-cpd plugins); auto, the default: the configured one where it answers, else local"
    add("--stage", required=True, metavar="{teachers,1,2,..,all}", help="what to do")
    add("--config", help="settings (YAML), for example configs/quickstart.yaml")
    add("--run", help="run folder; default runs/NAME")
    add("--cluster", metavar="{auto,local,slurm,..}", default="auto", help=where)
    add("--ranks", type=int, help="ranks of each teacher and of each stage")
    flag("--dry-run", help="print the plan and the job scripts; submit nothing")
    flag("--wait", help="return when the submitted jobs have ended")
    flag("--allow-missing", help="a stage does without the tasks whose teachers are missing, for good")
    flag("--retry", help=argparse.SUPPRESS)  # what a resubmitter's job runs
    add("settings", nargs="*", metavar="key=value", help="settings that override the file's")
    return parser


# ---- before anything is written


def read_request(arguments: argparse.Namespace) -> LaunchRequest:
    """Settings, run folder and units that the command line means. Raises UserError for what does not exist."""
    from hpc_cpd.tasks.registry import run_plan

    overrides = list(arguments.settings)
    if arguments.ranks is not None:
        overrides += [f"teachers.ranks={arguments.ranks}", f"distill.ranks={arguments.ranks}"]
    source = arguments.config
    if source is None and arguments.run is not None:
        source = Run(arguments.run).config_file
        if not source.is_file():
            raise UserError(f"there is no run in {arguments.run}; give --config to start one there")
    config = load_config(source, overrides)
    run = Run(arguments.run or Path("runs") / config.name)
    plan = run_plan(run, config)
    asked: str = arguments.stage
    if asked not in ("teachers", "all") and (not asked.isdecimal() or not 1 <= int(asked) <= len(plan)):
        raise UserError(
            f"--stage is '{asked}', but this stream has the stages 1 to {len(plan)}; or say teachers, or all"
        )
    return request_of(run, config, plan, asked if not asked.isdecimal() else str(int(asked)), arguments.allow_missing)


def check(request: LaunchRequest, scheduler: Scheduler) -> None:
    """Raise UserError for everything that can be found out before anything is written.

    A launch and ``--dry-run`` both do all of it, so what one accepts the other does too.
    """
    from hpc_cpd.distill.validation import check_settings
    from hpc_cpd.tasks.probe import check_tasks
    from hpc_cpd.teachers.sources.base import check_teachers

    run, config = request.run, request.config
    check_tasks(request.plan, config)
    check_settings(config, request.plan)
    if run.config_file.is_file():
        run.require_same_settings(config, _goes_on_longer(request))
    if run.stop_file.exists():
        raise UserError(f"{run.stop_file} asks every job of this run to stop; delete it, then run this again")
    check_teachers(config, [unit.task for unit in not_done(request.teachers)])
    if live_owner(run.folder) is None:  # else another launch may be submitting what is missing: asked again after it
        submit.require_one_stage(request, submit.queued(request, scheduler) if scheduler.available() else set())
    scheduler.check(request)
    there = next(path for path in (run.folder, *run.folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise _no_place(run.folder, f"{there} is a file")


def _no_place(folder: Path, why: str) -> UserError:
    return UserError(f"cannot make the run folder {folder}: {why}; choose another with --run")


def _goes_on_longer(request: LaunchRequest) -> bool:
    """Whether this launch adds stages to a run that has fewer of them."""
    from hpc_cpd.distill.validation import lengthens

    shared = (request.run.folder / "teachers").is_symlink()  # another run's must not get teachers from here
    return not shared and lengthens(request.run.config(), request.config)


# ---- what is done


def _open(request: LaunchRequest, scheduler: Scheduler) -> None:
    """Make the run, or tell in what this launch differs from the one before."""
    run, config = request.run, request.config
    if not run.config_file.is_file():
        run.open(config, _provenance(request))
        return
    old, longer = run.config(), _goes_on_longer(request)
    run.open(config, {}, longer)
    if longer:
        say(f"{len(request.plan)} stages, there were fewer: {run.folder} goes on with further tasks")
    for sentence in taken_over(old, config):
        queued = " (jobs in the queue keep what they were submitted with)" if scheduler.queues else ""
        say(f"From now on: {sentence}{queued}")


def _provenance(request: LaunchRequest) -> dict[str, object]:
    """Written once, when the run begins."""
    from hpc_cpd.tasks.registry import describe

    specs = [describe(task) for tasks in request.plan for task in tasks]
    return describe_origin() | {
        "seed": request.config.seed,
        "evaluation_seed": request.config.evaluation.seed,
        "reward_versions": sorted({spec.reward_version for spec in specs}),
        "environment_versions": sorted({spec.environment_version for spec in specs}),
    }


def _finish(request: LaunchRequest) -> None:
    """The table, the report, and what to run next."""
    from hpc_cpd.report.page import build_report
    from hpc_cpd.report.table import print_table

    run = request.run
    page = build_report(run)
    print_table(run)
    say(f"Report: {page}")
    missing = [stage for stage in range(1, len(request.plan) + 1) if not is_done(run.stage(stage))]
    last = run.stage(len(request.plan)) / "student"
    say(f"Next: {HERE} --stage {missing[0]} --run {run.folder}" if missing else f"Student: {last}")


# ---- what is said


def _announce(request: LaunchRequest, scheduler: Scheduler) -> None:
    def part(what: str, total: int, left: int) -> str:
        return f"{what}: {total - left} of {total} done" + (f", {left} to do" if left else "")

    where = f"through {scheduler.name}"
    if isinstance(scheduler, Local):
        where = "on this machine" if scheduler.around is None else "in this allocation"
    say(f"Run {request.run.folder} ({where})")
    for name, version in untested_versions().items():
        say(f"  {name} {version} has not been tested, {TESTED[name]} has: rewards and success may differ")
    left = not_done(request.stages)
    if request.teachers:
        say(f"  {part('teachers and trajectories', len(request.teachers), len(not_done(request.teachers)))}")
    if request.asked == "all":
        say(f"  {part('stages', len(request.stages), len(left))}")
    elif request.stages:
        say(f"  stage {request.asked}: {'to do' if left else 'done'}")
    if not request.todo:
        say("Everything asked for is done already.")


def _print_plan(request: LaunchRequest, scheduler: Scheduler) -> None:
    """What ``--dry-run`` shows: the units, and the exact text of each job."""
    for index, unit in enumerate(not_done(request.teachers)):
        say(f"  teacher {index}: {unit.task}")
    for stage in not_done(request.stages):
        say(f"  {stage.name}: {', '.join(request.plan[stage.stage - 1])}")
    if not scheduler.queues:
        say(f"  {request.config.teachers.ranks} ranks per teacher, {request.config.distill.ranks} per stage")
        return
    for job in scheduler.jobs(request, request.todo):
        after = {unit: f"<job of {unit.name}>" for unit in job.needs}
        say(f"\n# ---- {job.name}\n{scheduler.describe(job, after)}")


if __name__ == "__main__":
    sys.exit(main())
