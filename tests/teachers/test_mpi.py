import errno
from pathlib import Path

import numpy as np
import pytest

from hpc_cpd.distributed.mpi import CheckpointBoundary, Communicator, open_communicator
from hpc_cpd.errors import StopRequested, UserError
from hpc_cpd.run.paths import Run
from hpc_cpd.run.save_due import SaveDue
from tests.teachers import jobs, rank_failure, rank_sums

SUMS = Path(rank_sums.__file__)
FAILURE = Path(rank_failure.__file__)


@pytest.fixture(scope="module")
def one_and_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("sums")
    found = []
    for ranks in (1, 2):
        job = jobs.launch(ranks, SUMS, folder / f"{ranks}.npz", ranks)
        assert job.returncode == 0, job.stderr
        found.append(dict(np.load(folder / f"{ranks}.npz")))
    return found


def test_the_gradient_of_two_ranks_is_the_gradient_of_one(one_and_two_ranks: list[dict[str, np.ndarray]]) -> None:
    one, two = one_and_two_ranks
    for name in one:
        assert np.abs(one[name]).max() > 0 or name == "normaliser_count", name
        assert np.allclose(one[name], two[name], rtol=1e-4, atol=1e-5), name


def test_the_normaliser_of_two_ranks_is_that_of_one_bit_for_bit(one_and_two_ranks: list[dict[str, np.ndarray]]) -> None:
    one, two = one_and_two_ranks
    for name in ("normaliser_mean", "normaliser_var"):
        assert np.array_equal(one[name], two[name])


def test_another_number_of_ranks_than_asked_for_is_a_mistake() -> None:
    job = jobs.launch(2, FAILURE, "fault", 3)
    assert job.returncode == 2
    assert "3 MPI ranks were asked for (teachers.ranks), but 2 were started" in job.stderr


@pytest.mark.parametrize(
    ("kind", "code", "text"),
    [
        ("mistake", 2, "error: rank 1 cannot go on"),
        ("fault", 1, "RuntimeError: rank 1 broke"),
        ("agreed", 2, "error: rank 0 cannot read the file"),
    ],
)
def test_a_rank_that_fails_takes_the_others_down_with_its_exit_code(kind: str, code: int, text: str) -> None:
    job = jobs.launch(2, FAILURE, kind, 2, timeout=30)
    assert job.returncode == code
    assert job.stderr.count(text) == 1, job.stderr


@pytest.mark.parametrize(
    ("kind", "met"),
    [
        ("agreed", ("UserError", None, None)),
        ("stopped", ("StopRequested", None, None)),
        ("fenced", ("LockLost", None, None)),
        ("full", ("OSError", errno.ENOSPC, "/runs/x/DONE")),
    ],
)
def test_every_rank_meets_the_error_of_the_root_as_the_error_that_it_was(
    kind: str, met: tuple[str, int | None, str | None]
) -> None:
    job = jobs.launch(2, FAILURE, kind, 2, timeout=30)
    assert [f"rank {rank} met {met}" in job.stdout for rank in (0, 1)] == [True, True], job.stdout + job.stderr


def test_a_stop_that_the_root_alone_meets_is_a_stop_of_all_ranks() -> None:
    job = jobs.launch(2, FAILURE, "stopped", 2, timeout=30)
    assert job.returncode == 3 and "Traceback" not in job.stderr
    assert job.stderr.count("stopped: nothing was begun") == 2


def test_one_rank_needs_no_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PMI_RANK", "PMI_SIZE", "PMIX_RANK", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(__import__("sys").modules, "mpi4py", None)
    communicator = open_communicator(1)
    assert (communicator.rank, communicator.size) == (0, 1)
    assert communicator.gather("x") == ["x"]
    assert communicator.any(True, False) == (True, False)


def test_environments_are_shared_out_whole() -> None:
    for size in (1, 2, 3, 5):
        ranks = [Communicator() for _ in range(size)]
        for rank, communicator in enumerate(ranks):
            communicator.rank, communicator.size = rank, size
        parts = [communicator.local_range(7) for communicator in ranks]
        assert [number for part in parts for number in part] == list(range(7))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_boundary_saves_when_due_and_before_it_stops(tmp_path: Path) -> None:
    never, always = (SaveDue(Run(tmp_path), seconds) for seconds in (3600.0, 0.0))
    saved: list[str] = []
    CheckpointBoundary(Communicator(), lambda: False, never)(lambda: saved.append("early"))
    assert saved == []
    CheckpointBoundary(Communicator(), lambda: False, always)(lambda: saved.append("due"))
    with pytest.raises(StopRequested):
        CheckpointBoundary(Communicator(), lambda: True, never)(lambda: saved.append("stop"))
    assert saved == ["due", "stop"]


def test_an_error_on_the_root_reaches_the_caller() -> None:
    def fail() -> None:
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        Communicator().on_root(fail)
