"""Where a result comes from: commit, package versions, machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = "hpc_cpd torch deepspeed numpy scipy gymnasium metaworld mujoco h5py mpi4py mpich submitit"
TESTED = {"metaworld": "3.1.1", "mujoco": "3.3.0"}
"""The simulators that published results come from; with another version, rewards and success can be others."""


def describe_origin() -> dict[str, Any]:
    """What does not depend on the settings. Values that cannot be found out are null."""
    commit, dirty = _commit()
    return {
        "commit": commit,
        "uncommitted_changes": dirty,
        "packages": {name: _version(name) for name in PACKAGES.split()},
        "untested_versions": untested_versions(),
        "python": platform.python_version(),
        "host": {
            "system": f"{platform.system()} {platform.release()}",
            "processor": _processor(),
            "cores": os.cpu_count(),
            "gpus": sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*")),
        },
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join(sys.argv),
    }


def untested_versions() -> dict[str, str | None]:
    """The installed version of each simulator that is not the tested one; null: it is not installed."""
    return {name: version for name, tested in TESTED.items() if (version := _version(name)) != tested}


def _commit() -> tuple[str | None, bool | None]:
    """The commit of the source tree this package runs from, and whether tracked files differ from it."""
    folder = Path(__file__).resolve().parents[2]
    with suppress(OSError, subprocess.SubprocessError):
        if (folder / ".git").exists():  # else git would tell of a repository around it
            commit = _git(folder, "rev-parse", "HEAD")
            return commit, bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    return None, None


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def _version(name: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def _processor() -> str | None:
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    return platform.processor() or None
