"""The MPI side of a teacher: several ranks hold the same policy and split its environments.

Ranks meet in whole-array operations only, in an order that does not depend on timing, so the same number
of ranks gives the same bits. One rank needs no MPI at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpc_cpd.distributed.outcome import run_on_rank
from hpc_cpd.errors import StopRequested, UserError
from hpc_cpd.run.save_due import SaveDue

Value = TypeVar("Value")


class Communicator:
    """The ranks of one job. `Communicator()` is a single rank; `open_communicator` asks MPI."""

    def __init__(self, mpi: Any = None) -> None:
        """`mpi`: the module ``mpi4py.MPI``."""
        self._mpi = mpi
        self.rank: int = 0 if mpi is None else mpi.COMM_WORLD.Get_rank()
        self.size: int = 1 if mpi is None else mpi.COMM_WORLD.Get_size()

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is true on at least one rank; the same answer everywhere."""
        return tuple(bool(count) for count in self.sum(np.array(flags, dtype=np.int64)))

    def sum(self, values: NDArray[Any]) -> NDArray[Any]:
        """Add `values` up over the ranks, in place."""
        if self.size > 1:
            self._mpi.COMM_WORLD.Allreduce(self._mpi.IN_PLACE, values)
        return values

    def gather(self, value: Value) -> list[Value]:
        """Every rank's `value` in rank order, on every rank."""
        return [value] if self.size == 1 else self._mpi.COMM_WORLD.allgather(value)

    def local_range(self, total: int) -> range:
        """The contiguous part of range(`total`) that belongs to this rank; parts differ by one at most."""
        return range(total * self.rank // self.size, total * (self.rank + 1) // self.size)

    on_root = run_on_rank
    """(work) Let rank 0 do `work` (files are touched by one rank only) and give its result, or its error, to all."""

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite `tensors` with those of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                values = tensor.detach().numpy().copy()
                self._mpi.COMM_WORLD.Bcast(values)
                with torch.no_grad():
                    tensor.copy_(torch.tensor(values))

    def sum_gradients(self, parameters: Sequence[Tensor], extra: Sequence[Tensor] = ()) -> list[float]:
        """Replace each gradient by its sum over the ranks, with one flat reduction.

        Losses must already be divided by the number of samples of *all* ranks, which makes the sum the
        gradient of the whole batch however unevenly the ranks share it. `extra` are scalars that ride
        along; their sums are returned. Parameters without a gradient are left alone.
        """
        if self.size == 1:
            return [float(value.detach()) for value in extra]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        pieces = [gradient.view(-1) for gradient in gradients] + [value.detach().view(1) for value in extra]
        flat = torch.cat(pieces)
        self.sum(flat.numpy())
        *parts, extras = flat.split([*(gradient.numel() for gradient in gradients), len(extra)])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return [float(value) for value in extras]


def open_communicator(expected_size: int) -> Communicator:
    """The ranks that `mpiexec` or `srun` started; one rank without either needs no MPI.

    Raises UserError when MPI started another number of ranks than `expected_size`.
    """
    launched = any(name in os.environ for name in ("PMI_RANK", "PMI_SIZE", "PMIX_RANK", "OMPI_COMM_WORLD_RANK"))
    if expected_size == 1 and not launched:
        return Communicator()
    # MPICH: hand the core over while waiting; spinning starves whoever shares it (measured: a sixth faster)
    os.environ.setdefault("MPIR_CVAR_POLLS_BEFORE_YIELD", "1")
    from mpi4py import MPI  # importing it starts MPI

    communicator = Communicator(MPI)
    if communicator.size != expected_size:
        raise UserError(
            f"{expected_size} MPI ranks were asked for (teachers.ranks), but {communicator.size} were started; "
            f"start the job with mpiexec -n {expected_size}, or with srun and the plugin that this MPI speaks "
            "(cluster.scheduler.mpi_plugin, pmi2 for MPICH)"
        )
    return communicator


@dataclass
class CheckpointBoundary:
    """The places where work may stop: every rank learns the same answer at the same place.

    Calls the given `save` on all ranks when it is due (rank 0 decides) or when any
    rank was asked to stop; then raises StopRequested in the second case.
    """

    communicator: Communicator
    stop: Callable[[], bool]
    due: SaveDue
    what: str = ""

    def __call__(self, save: Callable[[], None]) -> None:
        due = self.communicator.rank == 0 and self.due()
        stop, due = self.communicator.any(self.stop(), due)
        if stop or due:
            save()
            self.due.saved()
        if stop:
            raise StopRequested(f"{self.what} stands on disk; the same command goes on from there")
