"""Files of killed MPI ranks: the dead ones' go, the living ones' stay."""

import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

from hpc_cpd.worker import remove_leftovers


def make(folder: Path, name: str, age: float = 60) -> Path:
    path = folder / name
    path.write_bytes(b"\0" * 4096)
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_only_old_unmapped_mpich_files_go(tmp_path):
    dead = make(tmp_path, "mpich_shm_aa_0")
    live = make(tmp_path, "mpich_shm_bb_0")
    young = make(tmp_path, "mpich_shm_cc_0", age=0)
    other = make(tmp_path, "somebody_elses")
    with open(live, "r+b") as file, mmap.mmap(file.fileno(), 4096):
        assert remove_leftovers(tmp_path) == [dead.name]
    assert [path.exists() for path in (dead, live, young, other)] == [False, True, True, True]


def test_mpich_still_names_its_files_so():
    # if a new version names them otherwise, a requeued job fails in MPI_Init again, and nothing here would notice
    program = "from mpi4py import MPI; print([line for line in open('/proc/self/maps') if '/mpich_shm_' in line])"
    mpiexec = Path(sys.executable).parent / "mpiexec"
    done = subprocess.run(
        [mpiexec, "-n", "2", sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert "mpich_shm_" in done.stdout, done.stdout + done.stderr
