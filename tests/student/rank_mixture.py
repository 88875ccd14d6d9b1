"""One rank of `test_experts.py`: spread students under a real DeepSpeed engine against the plain reference."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from hpc_cpd.distributed.torch import finish_distributed, start_distributed
from hpc_cpd.optimizers import AdamW
from hpc_cpd.student.network import Student, expert_of
from hpc_cpd.worker import leave
from tests.student.reference import make_batch, make_student, masked_loss, reference_forward, small_shape

BALANCE = 0.1


def freeze(student: Student, frozen: str) -> None:
    """Freeze what `frozen` names: parts joined by +, of shared, gate, experts, even (experts with an even id)."""
    parts = {
        "shared": student.shared_parameters(),
        "gate": student.gate_parameters(),
        "experts": student.expert_parameters(),
        "even": student.expert_parameters([e for stage in student.experts_by_stage for e in stage if e % 2 == 0]),
    }
    for part in filter(None, frozen.split("+")):
        for _, parameter in parts[part]:
            parameter.requires_grad_(False)


def run_case(case: dict[str, Any]) -> dict[str, float]:
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    rank, world_size = dist.get_rank(), dist.get_world_size()
    shape = small_shape(case["top_k"], **case.get("shape", {}))
    experts, shares = case["experts"], case["shares"]
    total = sum(shares)
    observations, tasks, valid, flagged, target = make_batch(total, shape.history, shape)
    if case.get("invalid_rank") is not None:
        first = sum(shares[: case["invalid_rank"]])
        valid[first : first + shares[case["invalid_rank"]]] = False
    override = flagged if case.get("override") else None
    count = float(valid.sum())

    whole = make_student(shape, experts, for_training=False)
    freeze(whole, case.get("frozen", ""))
    expected, expected_balance = reference_forward(whole, observations, tasks, valid, override)
    (masked_loss(expected, target, valid, count) + BALANCE * expected_balance).backward()

    student = make_student(shape, experts, case["expert_parallel_size"])
    freeze(student, case.get("frozen", ""))
    trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
    groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": trainable, "name": "dense", "lr": 0.1}, max_group_size=None
    )
    engine = deepspeed.initialize(
        model=student,
        optimizer=AdamW([group for group in groups if group["params"]]),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": case.get("zero", 0), "reduce_bucket_size": 10_000},
            "steps_per_print": 10**9,
        },
    )[0]
    own = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
    actions, balance, _ = engine(observations[own], tasks[own], valid[own], None if override is None else override[own])
    engine.backward(masked_loss(actions, target[own], valid[own], count / world_size) + BALANCE * balance)

    worst = {"outputs": 0.0, "shared": 0.0, "gate": 0.0, "expert": 0.0, "frozen": 0.0, "anchor": 0.0}
    if actions.numel():
        worst["outputs"] = float(((actions - expected[own]) * valid[own][..., None]).detach().abs().max())
    mean_balance = balance.detach().clone()
    dist.all_reduce(mean_balance)
    worst["balance"] = abs(float(mean_balance) / world_size - float(expected_balance.detach()))
    reference = dict(whole.named_parameters())
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            worst["frozen"] = max(worst["frozen"], float(parameter.grad is not None))
            continue
        gradient = parameter.get_full_hp_grad() if case.get("zero") else parameter.grad  # type: ignore[attr-defined]
        if name.endswith(".anchor"):
            worst["anchor"] = float(gradient.abs().max())
            continue
        kind = "expert" if expert_of(name) is not None else "gate" if ".gate." in name else "shared"
        wanted = reference[name].grad
        wanted = torch.zeros_like(parameter) if wanted is None else wanted
        worst[kind] = max(worst[kind], float((gradient - wanted).abs().max()))
    student.eval()
    with torch.no_grad():
        quiet, _, _ = engine(observations[own], tasks[own], valid[own], None if override is None else override[own])
    worst["eval"] = float((quiet - actions.detach()).abs().max()) if actions.numel() else 0.0
    engine.destroy()
    everywhere: list[dict[str, float]] = [{}] * world_size
    dist.all_gather_object(everywhere, worst)
    return {key: max(values[key] for values in everywhere) for key in worst}


def main() -> None:
    torch.set_deterministic_debug_mode("error")  # the usual call imports torch's compiler as well
    rank, _ = start_distributed(60.0)
    results = [run_case(case) for case in json.loads(sys.argv[1])["cases"]]
    assert "torch._dynamo" not in sys.modules, "seconds of every rank's start, under ZeRO too"
    if rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    finish_distributed()


if __name__ == "__main__":
    main()
    leave(0)
