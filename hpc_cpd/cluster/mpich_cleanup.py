"""What killed MPI ranks leave behind, and why it must go before the next ones start.

MPICH's ranks on one node find each other through a file in /dev/shm whose name is made from the job's and
step's number. Killed ranks leave it there. A requeued job has the same number: on the same node its ranks
would read the dead ones' addresses and fail in MPI_Init, each time anew.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

YOUNG_SECONDS = 2.0


def remove_leftovers(folder: Path = Path("/dev/shm"), processes: Path = Path("/proc")) -> list[str]:
    """Delete this user's MPICH files that no living process maps; returns their names.

    Every rank calls this before it starts MPI, so none can meet an old file. Files of other jobs on this
    node are mapped, or (for a moment while they are made) young.
    """
    candidates = {}
    for path in folder.glob("mpich_shm_*"):
        with contextlib.suppress(OSError):
            status = path.stat()
            if status.st_uid == os.getuid() and time.time() - status.st_mtime > YOUNG_SECONDS:
                candidates[str(path)] = path
    if not candidates:
        return []
    for maps in processes.glob("[0-9]*/maps"):
        try:
            text = maps.read_text(errors="replace")
        except OSError:
            continue  # gone, or of another user, who cannot map our files
        if "mpich_shm_" in text:
            for name in [name for name in candidates if name in text]:
                del candidates[name]
    for path in candidates.values():
        with contextlib.suppress(OSError):  # another rank was faster
            path.unlink()
    return sorted(path.name for path in candidates.values())
