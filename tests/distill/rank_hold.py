"""One rank that makes steps with entries held: ``rank_hold.py ARGUMENTS ANSWER``.

ARGUMENTS: JSON object with "zero", a list of ZeRO stages. ANSWER: JSON, for each of them the norm of the gradient that
the first step reported, that of the entries which are free, and what moved in three steps.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc_cpd.distill.engine import PhaseEngine
from hpc_cpd.distributed.torch import finish_distributed, start_distributed
from hpc_cpd.errors import run_command
from hpc_cpd.methods.base import method_of
from hpc_cpd.settings import Config, DistillSettings
from hpc_cpd.worker import leave
from tests.student.reference import make_batch, make_student, masked_loss, small_shape


def steps_with(zero: int) -> dict[str, Any]:
    shape = small_shape()
    student = make_student(shape, [[0, 1, 2]])
    generator = torch.Generator().manual_seed(0)
    fixed = {
        name: torch.rand(parameter.shape, generator=generator) < 0.5
        for name, parameter in student.named_parameters()
        if parameter.dim() > 1
    }
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    observations, tasks, valid, _, target = make_batch(8, shape.history, shape)

    def loss(actions: Tensor) -> Tensor:
        return masked_loss(actions, target, valid, float(valid.sum()))

    plain = make_student(shape, [[0, 1, 2]], for_training=False)
    loss(plain(observations, tasks, valid)[0]).backward()
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    free = sum(float((g[~fixed[name]] if name in fixed else g).square().sum()) for name, g in gradients.items())

    settings = DistillSettings(zero_stage=zero, weight_decay=0.5, warmup_steps=0, max_gradient_norm=1e-3)
    engine = PhaseEngine(student, settings, 10, method_of(Config()))
    engine.hold(fixed)
    norms = [engine.step(loss(engine.forward(observations, tasks, valid)[0]), step) for step in range(3)]
    moments = engine.moments()
    after = student.state_dict()
    result = {
        "norm": norms[0],
        "norm_of_free": free**0.5,
        "norm_of_all": sum(float(gradient.square().sum()) for gradient in gradients.values()) ** 0.5,
        "held_moved": sum(int((after[name] != before[name])[flags].sum()) for name, flags in fixed.items()),
        "held_moments": sum(float(moments[name]["exp_avg_sq"][flags].sum()) for name, flags in fixed.items()),
        "free_that_stayed": sum(int((after[name] == before[name])[~flags].sum()) for name, flags in fixed.items()),
    }
    engine.close()
    return result


def main() -> int:
    arguments, answer = json.loads(sys.argv[1]), Path(sys.argv[2])
    start_distributed()
    answer.write_text(json.dumps([steps_with(zero) for zero in arguments["zero"]]))
    finish_distributed()
    return 0


if __name__ == "__main__":
    leave(run_command(main))
