"""A run on disk: its folders, atomic publishing, done-marks.

A folder is *published* only by its ``DONE`` file, written last. Every reader ignores what has none.
Whoever has lost its lock (`hpc_cpd.lock`) publishes nothing: `guards` are asked first.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpc_cpd.config import changed_keys, config_as_yaml, load_config
from hpc_cpd.errors import UserError
from hpc_cpd.settings import Config

DONE = "DONE"

# Asked with the path that is about to be published; they raise to forbid it. Every lock that is held adds its own.
guards: list[Callable[[Path], None]] = []


class Run:
    """One run folder. Paths only; nothing is created until something is written.

    A task id is used as a relative path: ``teachers/metaworld/reach-v3``.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @property
    def config_file(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def provenance_file(self) -> Path:
        return self.folder / "provenance.json"

    @property
    def report(self) -> Path:
        return self.folder / "report"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def stop_file(self) -> Path:
        """While it exists, every job of the run saves and leaves, and no other starts."""
        return self.folder / "STOP"

    @property
    def save_file(self) -> Path:
        """Whoever touches it makes every job of the run save at its next step."""
        return self.folder / "SAVE"

    def teacher(self, task_id: str) -> Path:
        return self.folder / "teachers" / task_id

    def trajectories(self, task_id: str) -> Path:
        return self.folder / "trajectories" / task_id

    def stage(self, stage: int) -> Path:
        """Folder of stage `stage`, counted from 1."""
        return self.folder / "stages" / str(stage)

    def relabelled(self, stage: int, task_id: str) -> Path:
        """Folder of the episodes of a new task that the student of `stage` played and the teacher answered."""
        return self.stage(stage) / "relabelled" / task_id

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

    def open(self, config: Config, provenance: Mapping[str, Any], longer: bool = False) -> None:
        """Create the run with `config`, or check that it was made with the same settings.

        Settings that only say how work is done (ranks, partitions) are taken over, and with `longer` its tasks: the
        caller knows that they go on where the old ones end. Raises UserError naming every key that differs.
        """
        if self.config_file.is_file():
            old = self.config()
            stream = {"stream": config.stream if longer else old.stream}
            changed = changed_keys(old.model_copy(update=stream), config)
            if changed:
                raise UserError(
                    f"{self.folder} was made with other settings: {'; '.join(changed)}. "
                    "Choose another --run, or take them back"
                )
        else:
            write_json(self.provenance_file, provenance)
            old = None
        if old != config:
            write_bytes(self.config_file, config_as_yaml(config).encode())


def ask_guards(target: Path) -> None:
    """Raise LockLost when `target` is no longer this process's to write."""
    for guard in tuple(guards):
        guard(target)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the bytes of `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` atomically: temporary name, fsync, rename, parent fsync. Raises LockLost, leaving what was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        ask_guards(path)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically. NaN is refused: it is not JSON."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON. Raises UserError naming a missing or damaged file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run the command that makes it again") from None


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` when the block ends without an error.

    Every file is fsynced first. An existing `target` is replaced; a kill in between leaves the old or
    the new one, or (between two renames) neither, never a mixture. Raises LockLost, leaving what was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    ask_guards(target)  # the orphans might be a new owner's work
    for orphan in target.parent.glob(f".{target.name}.*.tmp"):
        shutil.rmtree(orphan, ignore_errors=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        publish_folder(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def publish_folder(temporary: Path, target: Path) -> None:
    """fsync everything below `temporary`, then rename it to `target`, replacing what was there.

    Raises LockLost, leaving what was.
    """
    for path in sorted(temporary.rglob("*")):
        if path.is_file():
            sync_file(path)
        else:
            sync_folder(path)
    sync_folder(temporary)
    ask_guards(target)
    if target.exists():
        old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        os.rename(target, old)
        os.rename(temporary, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(temporary, target)
    sync_folder(target.parent)


def mark_done(folder: Path, summary: Mapping[str, Any]) -> None:
    """Publish `folder`: everything in it is complete, and `summary` says what it holds."""
    write_json(folder / DONE, dict(summary))


def is_done(folder: Path) -> bool:
    """Whether `folder` is published."""
    return (folder / DONE).is_file()


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class SaveDue:
    """When to save: every so many seconds, and when somebody touches the run's file SAVE."""

    LOOK_EVERY_SECONDS = 1.0

    def __init__(self, run: Run, every_seconds: float) -> None:
        self.every_seconds = every_seconds
        self._file = run.save_file
        self._touched = self._touch()
        self._saved_at = self._looked_at = time.monotonic()

    def __call__(self) -> bool:
        now = time.monotonic()
        if now - self._saved_at >= self.every_seconds:
            return True
        if now - self._looked_at < self.LOOK_EVERY_SECONDS:
            return False
        self._looked_at = now
        return self._touch() != self._touched

    def saved(self) -> None:
        """Begin to count anew."""
        self._touched = self._touch()
        self._saved_at = time.monotonic()

    def _touch(self) -> int | None:
        try:
            return self._file.stat().st_mtime_ns
        except OSError:
            return None


class MetricsLog:
    """A ``metrics.jsonl``: one JSON object per line, each with a ``step``.

    On resume, lines past the checkpoint are dropped, so that a resumed run leaves the same file as an
    undisturbed one. A line cut short by a kill is dropped as well.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        """Keep the lines with ``step <= resume_step`` and append after them."""
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step]
        write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def append(self, step: int, **values: Any) -> None:
        ask_guards(self.path)  # a new owner may be writing this very file
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file, in order; an absent file has none."""
    lines = []
    if path.is_file():
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
    return lines


def load_done(folder: Path) -> dict[str, Any]:
    """What `mark_done` wrote. Raises UserError when the folder is not published."""
    if not is_done(folder):
        raise UserError(f"{folder} is not finished (it has no {DONE} file)")
    summary = read_json(folder / DONE)
    if not isinstance(summary, dict):
        raise UserError(f"{folder / DONE} is damaged: expected a JSON object")
    return summary
