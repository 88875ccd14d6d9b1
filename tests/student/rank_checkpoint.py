"""One rank of `test_checkpoint.py`: train, save, load, go on."""

from __future__ import annotations

import hashlib
import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from hpc_cpd.distill.engine import read_moments, write_moments
from hpc_cpd.distributed.torch import finish_distributed, start_distributed
from hpc_cpd.optimizers import AdamW
from hpc_cpd.student.checkpoint import PendingCheckpoint, gather_state, load_checkpoint
from hpc_cpd.worker import leave
from tests.student.reference import make_batch, make_student, masked_loss, small_shape

EXPERTS = [[0, 1, 2], [3, 4]]
DEEP = {"layers": 2, "mixtures": 2, "shared_expert_hidden": 4}
WINDOWS = 20  # of six seeds all but 12 will do: there AdamW enlarges the rounding of a gradient that is almost zero


def train(wish: dict[str, Any]) -> dict[str, Any]:
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    rank, world_size = dist.get_rank(), dist.get_world_size()
    shape, stage = small_shape(wish["top_k"], **DEEP), wish.get("zero", 0)
    student = make_student(shape, EXPERTS, wish["expert_parallel_size"])
    loaded = load_checkpoint(Path(wish["load"]), student) if wish.get("load") else ({"step": 0}, {}, {})
    position, moments, _ = loaded
    for _, parameter in [*student.shared_parameters(), *student.expert_parameters([0])]:
        parameter.requires_grad_(not wish.get("frozen", True))
    trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
    groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": trainable, "name": "dense", "lr": 0.01}, max_group_size=None
    )
    optimizer = AdamW([group for group in groups if group["params"]], foreach=True)
    engine = deepspeed.initialize(
        model=student,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 10_000},
            "steps_per_print": 10**9,
        },
    )[0]
    zero = engine.optimizer if stage else None
    write_moments(student, optimizer, moments, zero)
    losses = []
    for step in range(position["step"], wish["steps"]):
        if wish.get("save") and step == wish["save_at"]:
            found = read_moments(student, optimizer, zero)
            PendingCheckpoint(Path(wish["save"]), student, found, {"step": step, "phase": 1}, {}).publish()
        observations, tasks, valid, override, target = make_batch(WINDOWS + step, shape.history, shape)
        own = slice(rank * len(valid) // world_size, (rank + 1) * len(valid) // world_size)
        actions, balance, _ = engine(observations[own], tasks[own], valid[own], override[own])
        loss = masked_loss(actions, target[own], valid[own], float(valid.sum()) / world_size) + 0.1 * balance
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / world_size)
    state = gather_state(student)
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state.values())).hexdigest()
    digests: list[Any] = [None] * world_size
    dist.all_gather_object(digests, (digest, list(state)))
    assert digests.count(digests[0]) == world_size, "every rank must gather the same state"
    return {"losses": losses, "digest": digest, "names": list(state)}


def fail_on_last_rank(wish: dict[str, Any]) -> list[Any]:
    """Ask for a checkpoint (or load one) that the last rank cannot write (or read); what every rank raised."""
    student = make_student(small_shape(0, **DEEP), EXPERTS, wish["expert_parallel_size"])
    if wish["mode"] == "full disk" and dist.get_rank() == dist.get_world_size() - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    raised: tuple[str, int | None, str] | None = None
    try:
        if wish["mode"] == "full disk":
            PendingCheckpoint(Path(wish["save"]), student, {}, {"step": 0}, {}).publish()
        else:
            load_checkpoint(Path(wish["load"]), student)
    except Exception as error:
        raised = (type(error).__name__, getattr(error, "errno", None), str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, raised)
    return everywhere


def main() -> None:
    torch.set_deterministic_debug_mode("error")  # the usual call imports torch's compiler as well
    rank, _ = start_distributed(60.0)
    answers = [
        train(wish) if wish["mode"] == "train" else fail_on_last_rank(wish)
        for wish in json.loads(sys.argv[1])["wishes"]
    ]
    if rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(answers))
    finish_distributed()


if __name__ == "__main__":
    main()
    leave(0)
