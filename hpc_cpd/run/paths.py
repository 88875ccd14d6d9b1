"""A run on disk: its folders, atomic publishing, done-marks.

A folder is *published* only by its ``DONE`` file, written last. Every reader ignores what has none.
Whoever has lost its lock (`hpc_cpd.run.lock`) publishes nothing: `guards` are asked first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc_cpd.config import changed_keys, config_as_yaml, load_config
from hpc_cpd.errors import UserError
from hpc_cpd.run.publish import write_bytes, write_json
from hpc_cpd.settings import Config


class Run:
    """One run folder. Paths only; nothing is created until something is written.

    A task id is used as a relative path: ``teachers/metaworld/reach-v3``.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config_file = self.folder / "config.yaml"
        self.provenance_file = self.folder / "provenance.json"
        self.report = self.folder / "report"
        self.logs = self.folder / "logs"
        self.stop_file = self.folder / "STOP"  # while it exists, every job saves and leaves, and no other starts
        self.save_file = self.folder / "SAVE"  # whoever touches it makes every job save at its next step

    def teacher(self, task_id: str) -> Path:
        return self.folder / "teachers" / task_id

    def trajectories(self, task_id: str) -> Path:
        return self.folder / "trajectories" / task_id

    def stage(self, stage: int) -> Path:
        """Folder of stage `stage`, counted from 1."""
        return self.folder / "stages" / str(stage)

    def dagger(self, stage: int, task_id: str) -> Path:
        """Folder of the episodes of a new task that the student of `stage` played and the teacher answered."""
        return self.stage(stage) / "dagger" / task_id

    def left_out_file(self, stage: int) -> Path:
        """The tasks that `stage` was told to do without (``--allow-missing``); absent: none."""
        return self.stage(stage) / "left_out.json"

    def config(self) -> Config:
        """The settings the run was made with. Raises UserError when `folder` is not a run."""
        if not self.config_file.is_file():
            raise UserError(
                f"{self.folder} is not a run folder (no config.yaml); start one with hpc_cpd.launch --config"
            )
        return load_config(self.config_file)

    def require_same_settings(self, config: Config, longer: bool = False) -> None:
        """Raise UserError naming every key in which `config` differs from the settings that the run was made with.

        Settings that only say how work is done (ranks, partitions) may differ, and with `longer` the tasks: the caller
        knows that they go on where the old ones end.
        """
        old = self.config()
        stream = {"stream": config.stream if longer else old.stream}
        if changed := changed_keys(old.model_copy(update=stream), config):
            raise UserError(
                f"{self.folder} was made with other settings: {'; '.join(changed)}. "
                "Choose another --run, or undo these changes"
            )

    def open(self, config: Config, provenance: Mapping[str, Any], longer: bool = False) -> None:
        """Create the run with `config`, or take over the settings that `require_same_settings` lets differ."""
        if self.config_file.is_file():
            self.require_same_settings(config, longer)
        else:
            write_json(self.provenance_file, provenance)
        if not self.config_file.is_file() or self.config() != config:
            write_bytes(self.config_file, config_as_yaml(config).encode())
