"""Look at runs, check them, compare them, and list what a config may name.

Runs are started by another command: python -m hpc_cpd.launch --help
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

import hpc_cpd
from hpc_cpd.errors import UserError, run_command
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import atomic_folder, is_done

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="a run folder, for example runs/quickstart")]


def main() -> None:
    """Entry point of the ``hpc-cpd`` command: exit codes as everywhere (0, 1, 2, 3)."""
    options = {"export": "--out", "sweep": "--run"}
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    # typer leaves by SystemExit, with 2 for words it does not know
    sys.exit(run_command(app, options.get(command)))


def _version(asked: bool) -> None:
    if asked:
        print(f"hpc_cpd {hpc_cpd.__version__}")
        raise typer.Exit


@app.callback(help=__doc__)
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


@app.command()
def status(
    run: RunFolder,
    watch: Annotated[bool, typer.Option("--watch", help="draw it again every 10 s until everything is done")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document instead of the table")] = False,
) -> None:
    """What every teacher and stage of a run is doing: from its files, and one question to the scheduler of its jobs.

    The keys of the JSON document (with --watch: one per line, when something changed):

    - run; scheduler: who answered (squeue, sacct, ...), "not answering", or null if nobody was asked
    - units, in order of work, each with
      unit: "teacher TASK" (with its trajectories) or "stage K"
      state: done, running, waiting, stopped, failed, given up, not started
      job, reason (in the scheduler's words), node, seconds_left (of its time limit)
      restarts; failures: in a row, those above cluster.max_retries are given up
      progress: null or phase, step, total, loss; steps_per_second (of a
      teacher in training: rounds, where it is recorded: episodes)
      success (0 to 1), success_estimated: only some old tasks of a stage were
      evaluated (~); error: one line; log: the file that ends with it
    - done, total: counts of teachers, trajectories and stages
    - next: the command to run, or null; notes: sentences
    """
    from hpc_cpd.cluster.status import snapshot
    from hpc_cpd.report import status_table

    if watch:
        status_table.watch(lambda: snapshot(Run(run)), Console(), as_json)
    else:
        status_table.show(snapshot(Run(run)), Console(), as_json)


@app.command()
def evaluate(
    run: RunFolder,
    stage: Annotated[int | None, typer.Option(help="which student; default: the last that is published")] = None,
    episodes: Annotated[int | None, typer.Option(min=1, help="per task; default: as in the run")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="of the goals; default: as in the run")] = None,
    infer_task: Annotated[bool, typer.Option("--infer-task", help="do not tell the student its task")] = False,
) -> None:
    """Evaluate a published student once more. Writes nothing."""
    at = Run(run)
    settings = at.config().evaluation
    number = _published_stage(at, stage)

    from hpc_cpd.evaluation.rollouts import evaluate_policy, task_record
    from hpc_cpd.student.policy import TaskAgnosticPolicy, load_student

    policy = load_student(at.stage(number) / "student")
    player = TaskAgnosticPolicy(policy) if infer_task else policy
    count, goals = episodes or settings.episodes, settings.seed if seed is None else seed
    told = ", the task not told" if infer_task else ""
    numbers = (Column(heading, justify="right") for heading in ("Success", "Mean steps to success"))
    title = f"{run}: student of stage {number}, {count} episodes per task, seed {goals}{told}"
    table = Table("Task", *numbers, title=title)
    console, rates = Console(), []
    for task in policy.task_ids:
        with console.status(task):
            record = task_record(evaluate_policy(player, task, count, goals))
        rates.append(record["successes"] / record["episodes"])
        steps = record["mean_steps_to_success"]
        table.add_row(task, f"{rates[-1]:.0%}", "-" if steps is None else f"{steps:.0f}")
    table.add_section()
    table.add_row("mean", f"{sum(rates) / len(rates):.1%}", "", style="bold")
    console.print(table)


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="for example configs/sweeps/ablations.yaml")],
    run: Annotated[Path | None, typer.Option(metavar="DIR", help="folder of its runs; default: runs/NAME")] = None,
    cluster: Annotated[str, typer.Option(metavar="{auto,local,slurm,..}", help="where")] = "auto",
    at_once: Annotated[int, typer.Option("--at-once", min=1, help="runs side by side, on this machine")] = 1,
    only: Annotated[list[str] | None, typer.Option("--only", metavar="ROW", help="this row; may be repeated")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print rows, seeds and commands; run nothing")] = False,
    publish: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="copy what is finished there, run nothing")
    ] = None,
) -> None:
    """Run every row of a sweep with every seed, then compare them. Run it again at any time: it goes on."""
    from hpc_cpd.sweep.plan import choose, read_sweep
    from hpc_cpd.sweep.publish import publish_sweep
    from hpc_cpd.sweep.runner import note_rows, run_sweep, show_plan

    plan = read_sweep(file, run)
    rows = choose(plan, only or [])
    if dry_run:
        show_plan(plan, rows)
        return
    if publish is not None:
        from hpc_cpd.report.comparison_page import write_results

        note_rows(plan)
        copied = publish_sweep(plan, rows, publish)
        Console().print(f"Runs copied: {len(copied)}. Page: {write_results(publish)}", soft_wrap=True)
        return
    code = run_sweep(plan, rows, cluster, at_once)
    _compare([plan.folder], plan.folder / "report")
    if code:
        raise typer.Exit(code)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="a run; or several, or a sweep: a comparison")],
    out: Annotated[
        Path | None, typer.Option(help="folder of the comparison; default: SWEEP/report or comparison")
    ] = None,
) -> None:
    """Build the report of a run again and print its table; or compare several runs, or those of a sweep."""
    from hpc_cpd.report.comparison import is_sweep

    if len(runs) > 1 or out is not None or is_sweep(runs[0]):
        _compare(runs, out or (runs[0] / "report" if len(runs) == 1 else Path("comparison")))
        return
    from hpc_cpd.report.page import build_report
    from hpc_cpd.report.table import print_table

    page = build_report(Run(runs[0]))
    print_table(Run(runs[0]))
    Console().print(f"Report: {page}", soft_wrap=True)


@app.command()
def results(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="published sweeps")] = Path("docs/results"),
) -> None:
    """Write the page of published results, FOLDER.md, from the files under FOLDER."""
    from hpc_cpd.report.comparison_page import write_results

    Console().print(f"Page: {write_results(folder)}", soft_wrap=True)


@app.command()
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Option(help="new folder to write")],
    stage: Annotated[int | None, typer.Option(help="which student; default: the last that is published")] = None,
    trajectories: Annotated[bool, typer.Option(help="also the trajectories, in robomimic's HDF5 form")] = False,
) -> None:
    """Copy a published student out of its run: OUT/student (and OUT/trajectories/TASK.hdf5)."""
    from hpc_cpd.tasks.registry import run_plan
    from hpc_cpd.trajectories.formats.robomimic import export_robomimic

    at = Run(run)
    number = _published_stage(at, stage)
    if out.exists():
        raise UserError(f"{out} exists already; give another folder with --out")
    with atomic_folder(out) as folder:
        shutil.copytree(at.stage(number) / "student", folder / "student")
        for task in chain(*run_plan(at)) if trajectories else ():
            if is_done(at.trajectories(task)):
                file = folder / "trajectories" / f"{task}.hdf5"
                file.parent.mkdir(parents=True, exist_ok=True)
                export_robomimic(at.trajectories(task), file)
    Console().print(f"Student of stage {number}: {out / 'student'}", soft_wrap=True)


@app.command()
def verify(run: RunFolder) -> None:
    """Check every published file of a run against its checksum; exit code 2 when something is wrong."""
    from hpc_cpd.tasks.registry import run_plan

    at = Run(run)
    plan = run_plan(at)

    from hpc_cpd.plugins import load
    from hpc_cpd.student.policy import load_student  # imports torch: only once there is a run
    from hpc_cpd.teachers.sources.student import load_any_teacher
    from hpc_cpd.trajectories.store import verify_folder

    problems: list[str] = []
    checked: Counter[str] = Counter()

    def check(kind: str, published: Path, find: Callable[..., list[str]], *arguments: object) -> None:
        if is_done(published):
            checked[kind] += 1
            problems.extend(find(*arguments))

    for task in chain(*plan):
        check("teachers", at.teacher(task), _problem, load_any_teacher, at.teacher(task))
        check("trajectory folders", at.trajectories(task), verify_folder, at.trajectories(task), task)
    keeps_memory = load("methods", at.config().method.name).keeps_memory
    for stage, new in enumerate(plan, 1):
        check("students", at.stage(stage), _problem, load_student, at.stage(stage) / "student")
        if keeps_memory:
            check("memories", at.stage(stage), verify_folder, at.stage(stage) / "memory")
        for task in new:
            check("DAgger folders", at.dagger(stage, task), verify_folder, at.dagger(stage, task), task)
    console = Console()
    for problem in problems:
        console.print(f"- {problem}", soft_wrap=True, markup=False)
    counts = ", ".join(f"{count} {name}" for name, count in checked.items()) or "nothing is published yet"
    if problems:
        raise UserError(f"{run} is damaged, problems: {len(problems)} (checked: {counts})")
    console.print(f"{run}: all is well (checked: {counts})")


@app.command()
def tasks(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="MT10, MT25, MT50, MT50x2 (halves of the goals), a family, or a task id"),
    ] = None,
) -> None:
    """The task sets and families; the tasks of one family; or the tasks of one set with their spaces."""
    from hpc_cpd import plugins
    from hpc_cpd.report.plugin_table import print_family
    from hpc_cpd.tasks.registry import TASK_SETS, describe, resolve_tasks
    from hpc_cpd.tasks.spaces import shown

    console, families = Console(), plugins.names("tasks")
    if name is None:
        for known, size in TASK_SETS.items():
            console.print(f"{known}: {size} tasks; {known}x2: {2 * size}, each with half of a task's goals")
        console.print("Or a list of task ids. They begin with the word of a family:")
        for family in families:
            console.print(f"  {family}/... ({plugins.origin('tasks', family)})", markup=False)
        console.print("for example metaworld/reach-v3, or gymnasium/MODULE:ID where MODULE registers ID")
        console.print("The tasks of one family: hpc-cpd tasks FAMILY")
        return
    if name.rstrip("/") in families:
        print_family(name.rstrip("/"), console)
        return
    if "/" not in name and not name.startswith(tuple(TASK_SETS)):
        names = [*TASK_SETS, *families]
        hint = plugins.hint(name, names)
        raise UserError(f"there is no task set or family '{name}'; {hint}known: {', '.join(names)}")
    columns = (Column(heading, overflow="fold") for heading in ("Task", "Observation", "Action"))
    table = Table(*columns, Column("Horizon", justify="right"), title=name)
    for task in resolve_tasks(name):
        spec = describe(task)
        table.add_row(task, shown(spec.observation_space), shown(spec.action_space), str(spec.horizon))
    console.print(table)


@app.command()
def plugins(
    kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help="for example methods")] = None,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="one of that kind: print its settings")] = None,
) -> None:
    """What a config may name: methods, teacher algorithms, parts of the student, and so on; or the settings of one."""
    from hpc_cpd.plugins import KINDS, hint
    from hpc_cpd.report.plugin_table import print_kind, print_settings

    if kind is not None and kind not in KINDS:
        raise UserError(f"there is no kind of plug-in '{kind}'; {hint(kind, KINDS)}known: {', '.join(KINDS)}")
    console = Console()
    if kind is not None and name is not None:
        print_settings(kind, name, console)
        return
    for one in KINDS if kind is None else (kind,):
        print_kind(one, console)
    console.print("The settings of one: hpc-cpd plugins KIND NAME")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="demonstrations, in robomimic's HDF5 form")],
    task: Annotated[str, typer.Argument(metavar="TASK", help="the task they were recorded on")],
    out: Annotated[Path, typer.Option(help="folder of TASK folders: teachers.start.folder")],
    observation_keys: Annotated[
        str | None, typer.Option(metavar="KEY,KEY,...", help="obs/KEY that make up an observation, in the task's order")
    ] = None,
    action_range: Annotated[
        tuple[float, float] | None, typer.Option(metavar="LOW HIGH", help="of the file's actions; default: -1 1")
    ] = None,
) -> None:
    """Make trajectories of a task from external (robomimic) demonstrations: OUT/TASK."""
    from hpc_cpd.trajectories.formats.robomimic import import_trajectories

    keys = None if observation_keys is None else observation_keys.split(",")
    count = import_trajectories(file, task, out / task, keys, action_range)
    Console().print(f"Episodes: {count}. Trajectories: {out / task}", soft_wrap=True)


def _compare(folders: list[Path], out: Path) -> None:
    from hpc_cpd.report.comparison import compare, print_comparison
    from hpc_cpd.report.comparison_page import build_comparison

    comparison = compare(folders)
    page = build_comparison(comparison, out)
    print_comparison(comparison)
    for note in comparison.notes:
        Console().print(f"- {note}", soft_wrap=True, markup=False)
    Console().print(f"Comparison: {page}", soft_wrap=True)


def _problem(load: Callable[[Path], object], folder: Path) -> list[str]:
    """What is wrong with something that checks itself when it is loaded."""
    try:
        load(folder)
    except UserError as error:
        return [str(error)]
    return []


def _published_stage(run: Run, stage: int | None) -> int:
    from hpc_cpd.tasks.registry import run_plan

    stages = range(1, len(run_plan(run)) + 1)
    if stage is not None and stage not in stages:
        raise UserError(f"--stage is {stage}, but {run.folder} has the stages 1 to {len(stages)}")
    published = [number for number in stages if is_done(run.stage(number))]
    if found := [number for number in published if stage in (None, number)]:
        return found[-1]
    wanted = f"the student of stage {stage}" if stage is not None else "a student"
    have = f"published: {', '.join(map(str, published))}" if published else "no stage is done"
    again = f"python -m hpc_cpd.launch --stage {stage or 'all'} --run {run.folder}"
    raise UserError(f"{run.folder} has not published {wanted} ({have}); make it with: {again}")


if __name__ == "__main__":
    main()
