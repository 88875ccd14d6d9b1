"""Teachers and trajectories that several runs of a sweep ask for are made once, in SWEEP/shared/HASH.

That folder is an ordinary run of which only the teachers are made; the runs hold relative links to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hpc_cpd.config import changed_keys, config_as_yaml, parse_config
from hpc_cpd.errors import UserError
from hpc_cpd.report.differences import flat_settings
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done, write_bytes
from hpc_cpd.settings import Config
from hpc_cpd.sweep.plan import LAUNCHER, Entry, Sweep, shown
from hpc_cpd.tasks.registry import resolve_tasks

SHARED = "shared"
PARTS = ("teachers", "trajectories")


@dataclass(frozen=True, eq=False)
class Shared:
    """Teachers and trajectories for some runs. `config`: the settings they are made with, and nothing else."""

    run: Run
    config: Config
    command: tuple[str, ...]

    @property
    def file(self) -> Path:
        """The config file that the sweep writes for them."""
        return self.run.folder.with_suffix(".yaml")

    @property
    def done(self) -> bool:
        folders = [
            (self.run.teacher(task), self.run.trajectories(task)) for task in resolve_tasks(self.config.stream.tasks)
        ]
        return all(is_done(folder) for pair in folders for folder in pair)

    def write_config(self) -> None:
        data = config_as_yaml(self.config).encode()
        if not self.file.is_file() or self.file.read_bytes() != data:
            write_bytes(self.file, data)


def shared_by(sweep: Sweep, entries: Iterable[Entry]) -> dict[str, Shared]:
    """What each of `entries`, by name, shares; the same object for those that share."""
    made: dict[Path, Shared] = {}
    found = {}
    for entry in entries:
        config = _only_teachers(entry.config, sweep.data_seed)
        folder = sweep.folder / SHARED / _hash(config)
        if folder not in made:
            file = folder.with_suffix(".yaml")
            words = ("--stage", "teachers", "--config", shown(file), "--run", shown(folder))
            made[folder] = Shared(Run(folder), config, (*LAUNCHER, *words))
        found[entry.name] = made[folder]
    return found


def link(entry: Entry, shared: Shared) -> None:
    """Let the run of `entry` have the teachers and trajectories of `shared`; twice is once.

    Raises UserError when the run, with the same settings, has others already.
    """
    folder = entry.run.folder
    begun = entry.run.config_file.is_file()
    for part in PARTS:
        path, target = folder / part, target_of(entry, shared, part)
        if path.is_symlink() and os.readlink(path) == target:
            continue
        if begun and changed_keys(entry.run.config(), entry.config):
            return  # the launcher refuses such a run, and says why
        if path.is_symlink() and not begun:
            path.unlink()
        elif path.is_symlink() or path.exists():
            raise UserError(
                f"{path} is not the {part} that the sweep asks for ({shared.run.folder / part}): its data have another "
                "seed or were made apart; choose another --run, or delete the run"
            )
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{part}.{secrets.token_hex(4)}.tmp"
        os.symlink(target, temporary)
        os.replace(temporary, path)


def target_of(entry: Entry, shared: Shared, part: str) -> str:
    """Where the link `part` of the run of `entry` leads."""
    return os.path.relpath(shared.run.folder / part, entry.run.folder)


def _only_teachers(config: Config, seed: int) -> Config:
    """The part of `config` that teachers and trajectories depend on; everything else has its default.

    How the work is done (ranks, Slurm) is carried along, and is no part of the hash.
    """
    # of the evaluation, teachers take part in these two alone
    evaluation = {"episodes": config.evaluation.episodes, "seed": config.evaluation.seed}
    return parse_config(
        {
            "name": "shared",  # the same whichever row comes first
            "seed": seed,
            "checkpoint_every_seconds": config.checkpoint_every_seconds,
            "stream": {"tasks": sorted(resolve_tasks(config.stream.tasks))},  # no draw depends on their order
            "teachers": config.teachers.model_dump(),
            "trajectories": config.trajectories.model_dump(),
            "evaluation": evaluation,
            "cluster": config.cluster.model_dump(),
        }
    )


def _hash(config: Config) -> str:
    """Of the settings that are not at their defaults, so that a setting which is new to a version changes nothing."""
    values = flat_settings(config, changed_only=True)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
