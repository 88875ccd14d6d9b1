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
from typing import Any

from hpc_cpd.config import changed_keys, config_as_yaml, flat_settings, parse_config
from hpc_cpd.errors import UserError
from hpc_cpd.report.run_results import shown
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done, write_bytes
from hpc_cpd.settings import Config
from hpc_cpd.sweep.plan import LAUNCHER, Entry, Sweep
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
        tasks, run = resolve_tasks(self.config.stream.tasks), self.run
        return all(is_done(run.teacher(task)) and is_done(run.trajectories(task)) for task in tasks)

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
        words = ("--stage", "teachers", "--config", shown(folder.with_suffix(".yaml")), "--run", shown(folder))
        found[entry.name] = made.setdefault(folder, Shared(Run(folder), config, (*LAUNCHER, *words)))
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
    kept: dict[str, Any] = dict.fromkeys(("teachers", "trajectories", "cluster", "checkpoint_every_seconds"), True)
    values = config.model_dump(include=kept | {"evaluation": {"episodes", "seed"}})
    stream = {"tasks": sorted(resolve_tasks(config.stream.tasks))}  # no draw depends on their order
    return parse_config(values | {"name": "shared", "seed": seed, "stream": stream})  # whichever row comes first


def _hash(config: Config) -> str:
    """Of the settings that are not at their defaults, so that a setting which is new to a version changes nothing."""
    values = flat_settings(config, changed_only=True)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
