"""The small files of a sweep's finished runs, copied to where they can be committed.

The copy has the layout of the sweep itself, so that whatever reads runs reads it too: ``hpc-cpd report`` compares it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from hpc_cpd.errors import UserError
from hpc_cpd.report.comparison import SWEEP_FILE, is_sweep
from hpc_cpd.report.page import report_numbers
from hpc_cpd.report.run_results import read_results
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import DONE, atomic_folder, is_done, read_json, write_json
from hpc_cpd.sweep.plan import SHARED, Entry, Row, Sweep, shared_by, target_of

_TEACHERS = "teachers"
_OF_STAGE = ("evaluation.json", "evaluation_before.json", "evaluation_inferred.json", DONE)


def publish_sweep(sweep: Sweep, rows: Sequence[Row], folder: Path) -> list[Entry]:
    """Copy what is finished of `rows` into FOLDER/NAME, replacing earlier copies; returns the runs copied.

    Titles and sentences are brought up to date, also of rows that were published before and are not here any more.
    Raises UserError when nothing is finished nor was published, or a run has other data than the sweep's.
    """
    begun = [entry for row in rows for entry in row.entries if entry.run.config_file.is_file()]
    done = [entry for entry in begun if read_results(entry.run).finished]
    target = folder / sweep.name
    if not done and not is_sweep(target):
        raise UserError(f"no run of {sweep.file} is finished, so there is nothing to publish; run the sweep first")
    shared = shared_by(sweep, done)
    for entry in done:
        path, shared_path = entry.run.folder / _TEACHERS, target_of(entry, shared[entry.name], _TEACHERS)
        if not path.is_symlink() or os.readlink(path) != shared_path:
            raise UserError(
                f"{path} is not the teachers that the sweep asks for ({shared_path}): the run was made apart, or with "
                "other settings; choose another --run, or delete the run"
            )
    # the runs' links to their teachers must have something to point at
    for source in sorted({(entry.run.folder / _TEACHERS).resolve().parent for entry in done}):
        with atomic_folder(target / SHARED / source.name) as copy:
            _copy_teachers(Run(source), copy)
    for entry in done:
        with atomic_folder(target / entry.row / entry.run.folder.name) as copy:
            _copy_run(entry.run, copy)
    shutil.copyfile(sweep.folder / SWEEP_FILE, target / SWEEP_FILE)
    return done


def _copy_teachers(shared: Run, copy: Path) -> None:
    for file in sorted((shared.folder / _TEACHERS).rglob(DONE)):
        to = copy / _TEACHERS / file.parent.relative_to(shared.folder / _TEACHERS)
        to.mkdir(parents=True)
        shutil.copyfile(file, to / DONE)
        evaluation = read_json(file.parent / "evaluation.json")
        evaluation.pop("while_training", None)  # the story of the training is long
        write_json(to / "evaluation.json", evaluation)
    for path in (shared.config_file, shared.provenance_file):
        shutil.copyfile(path, copy / path.name)


def _copy_run(run: Run, copy: Path) -> None:
    facts = read_results(run)
    os.symlink(os.readlink(run.folder / _TEACHERS), copy / _TEACHERS)
    for path in (run.config_file, run.provenance_file):
        shutil.copyfile(path, copy / path.name)
    for stage, seconds in facts.wall_clock().items():
        to = copy / "stages" / str(stage)
        to.mkdir(parents=True)
        for path in (run.stage(stage) / name for name in _OF_STAGE):
            if path.is_file():
                shutil.copyfile(path, to / path.name)
        if seconds is not None:  # of the attempts the time alone: whose machine it was is nobody's business
            write_json(to / "attempt.json", {"number": 1, "started": 0.0, "ended": seconds})
    write_json(copy / "report" / "metrics.json", report_numbers(facts))
    assert is_done(copy / "stages" / str(len(facts.stages)))
