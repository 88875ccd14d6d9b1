"""The file of a sweep, checked as a whole before anything is written, and the runs it asks for.

name: ablations
config: ../mt25.yaml                  # relative to the file
settings: {evaluation.episodes: 50}   # of every row
seeds: [0]
rows:
  ours: {seeds: [0, 1, 2], teaches: "one sentence, written when the numbers are known"}
  ewc: {settings: {method: {name: ewc, coefficient: 100}}, title: "EWC"}

Teachers and trajectories that several runs ask for are made once, in SWEEP/shared/HASH. That folder is an ordinary run
of which only the teachers are made; the runs hold relative links to it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import secrets
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from hpc_cpd.cluster.units import TeacherUnit
from hpc_cpd.config import changed_keys, flat_settings, load_config, parse_config, read_mapping
from hpc_cpd.distill.validation import check_settings
from hpc_cpd.errors import UserError
from hpc_cpd.plugins import hint
from hpc_cpd.report.run_results import shown
from hpc_cpd.run.paths import Run
from hpc_cpd.settings import Config, PluginSettings, Settings, group_within, mistake
from hpc_cpd.tasks.registry import resolve_tasks, stage_plan

SHARED = "shared"
RESERVED = (SHARED, "report", "logs")
LAUNCHER = ("python", "-m", "hpc_cpd.launch")


def _different(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("one is there twice")
    return seeds


FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Seeds = Annotated[list[Annotated[int, Field(strict=True, ge=0)]], Field(min_length=1), AfterValidator(_different)]
SEEDS = "different whole numbers from 0, such as [0, 1, 2]"


class _RowOfFile(Settings):
    """What the file says of one row; it may say nothing."""

    config: str | None = None
    settings: dict[str, Any] | None = None
    seeds: Seeds | None = Field(None, description=SEEDS)
    title: str | None = None
    teaches: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _nothing(cls, values: Any) -> Any:
        return {} if values is None else values


class _File(Settings):
    """What the file says."""

    name: FolderName = Field(description="of the sweep, whose folder is runs/NAME")
    config: str | None = None
    settings: dict[str, Any] | None = None
    seeds: Seeds = Field([0], description=SEEDS)
    rows: dict[FolderName, _RowOfFile] = Field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One run of a sweep. `command`: what makes and resumes it, as one would type it."""

    row: str
    seed: int
    run: Run
    config: Config
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.row}, seed {self.seed}"


@dataclass(frozen=True)
class Row:
    """One line of the table. `teaches`: what its numbers say, written by a person."""

    name: str
    title: str
    teaches: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Sweep:
    """A checked sweep. `data_seed`: the seed of the teachers and trajectories that its rows share."""

    name: str
    file: Path
    folder: Path
    data_seed: int
    rows: tuple[Row, ...]

    @property
    def entries(self) -> list[Entry]:
        return [entry for row in self.rows for entry in row.entries]

    def command(self, row: str) -> str:
        """What makes one row again, its teachers and trajectories included."""
        return shlex.join(["hpc-cpd", "sweep", shown(self.file), "--only", row])


def read_sweep(file: Path, folder: Path | None = None) -> Sweep:
    """Read and check `file`. `folder`: where its runs are (None: runs/NAME).

    Raises UserError, one sentence with file and key: no such file, an unknown key, a wrong type, a config or setting
    that does not exist.
    """
    absent = "there is no sweep file {}; give one of configs/sweeps/*.yaml"
    values = read_mapping(file, absent, "a sweep: 'name:', 'config:' and 'rows:'")
    try:
        asked = _File.model_validate({"name": file.stem} | values)
    except ValidationError as failure:
        raise UserError(f"{file}: {mistake(failure.errors()[0], _File)}") from None
    if not asked.rows:
        raise UserError(f"{file}: 'rows' is missing or empty; name at least one row, for example rows: {{ours: {{}}}}")
    folder = Path("runs") / asked.name if folder is None else folder
    shared_words = _words(file, "settings", asked.settings)
    made = []
    for key, row in asked.rows.items():
        if key in RESERVED:
            raise UserError(f"{file}: a row cannot be called '{key}', for that folder has another use; choose another")
        config = row.config or asked.config
        if config is None:
            raise UserError(f"{file}: 'rows.{key}' has no config; write 'config: ../mt25.yaml' above the rows")
        words = shared_words | _words(file, f"rows.{key}.settings", row.settings)
        seeds = row.seeds or asked.seeds
        entries = tuple(_entry(file, key, seed, file.parent / config, words, folder) for seed in seeds)
        made.append(Row(key, row.title or "", row.teaches or "", entries))
    return Sweep(asked.name, file, folder, asked.seeds[0], tuple(made))


def in_turn(rows: Sequence[Row]) -> list[Entry]:
    """The first run of every row, then the second of those that have one, and so on: a whole table comes early."""
    turns = itertools.zip_longest(*(row.entries for row in rows))
    return [entry for turn in turns for entry in turn if entry is not None]


def choose(sweep: Sweep, only: Sequence[str]) -> list[Row]:
    """The rows called `only` (none: all). Raises UserError with the nearest name."""
    known = [row.name for row in sweep.rows]
    for name in only:
        if name not in known:
            raise UserError(
                f"{sweep.file} has no row '{name}'; {hint(name, known, cutoffs=(0.5,))}its rows: {', '.join(known)}"
            )
    return [row for row in sweep.rows if not only or row.name in only]


@dataclass(frozen=True, eq=False)
class Shared:
    """Teachers and trajectories for some runs. `config`: the settings they are made with, and nothing else."""

    run: Run
    config: Config
    command: tuple[str, ...]

    @property
    def done(self) -> bool:
        return all(TeacherUnit(self.run, task).done for task in resolve_tasks(self.config.stream.tasks))


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
    for part in ("teachers", "trajectories"):
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


def _entry(file: Path, row: str, seed: int, config: Path, words: Mapping[str, str], folder: Path) -> Entry:
    settings = [f"seed={seed}", *(f"{key}={value}" for key, value in words.items())]
    try:
        checked = load_config(config, settings)
        check_settings(checked, stage_plan(checked.stream))
    except UserError as error:
        raise UserError(f"{file}: rows.{row}: {error}") from None
    run = Run(folder / row / f"seed-{seed}")
    where = ["--stage", "all", "--config", shown(config), "--run", shown(run.folder)]
    return Entry(row, seed, run, checked, (*LAUNCHER, *where, *settings))


def _words(file: Path, key: str, settings: Mapping[str, Any] | None) -> dict[str, str]:
    """Dotted settings as the launcher's words. The settings themselves are checked with the config they belong to."""
    words = {}
    for name, setting in (settings or {}).items():
        if name == "seed":
            raise UserError(f"{file}: '{key}.seed' is no setting of a row; write 'seeds: [{setting}]'")
        kind: type[BaseModel] | None = Config
        for part in name.split("."):
            kind = group_within(kind, part)
        if kind is not None and not issubclass(kind, PluginSettings):
            raise UserError(f"{file}: '{key}.{name}' is a group of settings; write '{name}.KEY: value', one by one")
        text = yaml.safe_dump(setting, default_flow_style=True, width=float("inf"), sort_keys=False)
        words[name] = text.removesuffix("...\n").strip()
    return words
