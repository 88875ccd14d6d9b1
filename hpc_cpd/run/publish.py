"""Atomic publishing: files and folders appear whole or not at all, and a folder counts once it has its ``DONE`` file.

Whoever has lost its lock (`hpc_cpd.run.lock`) publishes nothing: `guards` are asked first.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hpc_cpd.errors import UserError

DONE = "DONE"

# Asked with the path that is about to be published; they raise to forbid it. Every lock that is held adds its own.
guards: list[Callable[[Path], None]] = []


def ask_guards(target: Path) -> None:
    """Raise LockLost when `target` is no longer this process's to write."""
    for guard in tuple(guards):
        guard(target)


def _sync(path: Path) -> None:
    """Make the bytes of a file durable, or the renames inside a folder."""
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
    _sync(path.parent)


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
    for path in (*temporary.rglob("*"), temporary):
        _sync(path)
    ask_guards(target)
    old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    with suppress(FileNotFoundError):
        os.rename(target, old)
    os.rename(temporary, target)
    shutil.rmtree(old, ignore_errors=True)
    _sync(target.parent)


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
