"""torch.distributed: starting and leaving the ranks of a stage, and what they agree upon."""

from __future__ import annotations

import gc
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import count
from typing import TypeVar

import torch
from torch import distributed as dist
from torch.distributed import distributed_c10d

from hpc_cpd.distributed import outcome
from hpc_cpd.errors import StopRequested, UserError
from hpc_cpd.optimizers import AdamW

COLLECTIVE_TIMEOUT_SECONDS = 300.0
Result = TypeVar("Result")
_turns = count()  # every rank asks for turns equally often


def start_distributed(timeout_seconds: float = COLLECTIVE_TIMEOUT_SECONDS) -> tuple[int, int]:
    """Join the ranks named by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; return (rank, world size).

    Without these variables the process is alone. A second call returns the same answer. Raises UserError when this
    machine has GPUs, but none for this rank.
    """
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({**alone, **os.environ})
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_PORT", "0")
    backends = None  # DeepSpeed's choice, gloo
    if torch.cuda.is_available():
        rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if gpus <= rank:
            raise UserError(
                f"rank {rank} of this machine has no GPU: there are {gpus}, and every rank needs one of its own; start "
                "fewer ranks per machine (distill.ranks), or set CUDA_VISIBLE_DEVICES= to learn on its cores"
            )
        torch.cuda.set_device(device_of_rank())  # before any collective asks for it
        backends = "cpu:gloo,cuda:nccl"  # results of the evaluation and errors of episodes are on the CPU
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # None of its ops is used here. To ask which would work starts compilers, and one of them (shm_comm, for inference
    # alone) would be compiled at start-up.
    deepspeed.ops.__compatible_ops__ = {}
    if AdamW not in ZERO_SUPPORTED_OPTIMIZERS:  # ZeRO knows an optimizer by its very type
        ZERO_SUPPORTED_OPTIMIZERS.append(AdamW)
    _import_muon_uncompiled()
    if not dist.is_initialized():
        deepspeed.init_distributed(backends, timeout=timedelta(seconds=timeout_seconds), verbose=False)
        gc.freeze()  # what the imports made lives as long as the rank: collecting after every phase need not look at it
    return dist.get_rank(), dist.get_world_size()


def _import_muon_uncompiled() -> None:
    """ZeRO asks of every optimizer whether it is Muon, whose kernels are compiled when it is imported.

    To import torch's compiler for them takes more than two seconds of every rank's start, and nothing here is Muon.
    """
    from deepspeed.runtime import compiler

    compiling = compiler.compile
    compiler.compile = lambda: lambda kernel: kernel
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compiling


def finish_distributed() -> None:
    """Leave together: a process that ends while its groups live can abort at exit."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def require_gpus(ranks: int) -> None:
    """Raise UserError when this machine has GPUs, but fewer than the `ranks` of a stage that are to run on it."""
    gpus = torch.cuda.device_count()
    if 0 < gpus < ranks:
        raise UserError(
            f"a stage is to run {ranks} ranks here (distill.ranks), each on a GPU of its own, but this machine shows "
            f"{gpus}; set distill.ranks={gpus}, or CUDA_VISIBLE_DEVICES= to learn on its cores"
        )


def device_of_rank() -> torch.device:
    """The GPU of this local rank, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def all_ranks_max(values: list[float]) -> list[float]:
    """Element-wise maximum over ranks: how flags are agreed upon at a step boundary."""
    if dist.get_world_size() == 1:  # an exchange with nobody takes a millisecond on a busy machine
        return values
    tensor = torch.tensor(values, device=device_of_rank())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [float(value) for value in tensor]


def stop_together(stop: Callable[[], bool], what: str) -> None:
    """Raise StopRequested on all ranks when any was asked to stop (a collective)."""
    if all_ranks_max([float(stop())])[0]:
        raise StopRequested(f"{what}; run it again to go on")


def taken_in_turn(pieces: Sequence[Result], stop: Callable[[], bool]) -> Iterator[Result]:
    """`pieces` of work, each for one rank: whoever is free takes the next. All ranks must ask, with equally many.

    Ends on all ranks, between two pieces, once `stop` says so on any.
    """
    store, key = distributed_c10d._get_default_store(), f"turns/{next(_turns)}"
    while (piece := store.add(key, len(pieces) + 1 if stop() else 1) - 1) < len(pieces):
        yield pieces[piece]


class _Group:
    """The ranks of the default group; this process alone where there is none."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)

    def gather(self, value: Result) -> list[Result]:
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values


def gather(value: Result) -> list[Result]:
    """Every rank's `value`, on every rank. A collective."""
    return _Group().gather(value)


def run_on_rank(work: Callable[[], Result]) -> Result:
    """Run `work` on rank 0 alone; all get its result, or raise its error (`distributed.outcome`). A collective."""
    return outcome.run_on_rank(_Group(), work)


def run_on_all_ranks(work: Callable[[], Result]) -> Result:
    """Run `work` on every rank; when it fails on any, all raise (`distributed.outcome`). A collective."""
    return outcome.run_on_all_ranks(_Group(), work)
