"""A-GEM: a step that would unlearn what the replay memory asks for goes only where it does not (arXiv 1812.00420)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hpc_cpd.student.network import Student


def take_gradients(student: Student) -> list[Tensor]:
    """The gradients of the parameters that learn, in their order, which are left without one."""
    taken = []
    for parameter in _learning(student):
        taken.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        parameter.grad = None
    return taken


def project_gradients(student: Student, reference: Sequence[Tensor]) -> None:
    """Where the product of gradient g and `reference` r is negative, replace g by g - (g.r / r.r) r. A collective.

    Both are gradients of global losses, of the parameters of `student` that learn; g stands in ``grad``. Products are
    over the whole student, with every expert counted once: all ranks decide alike. Raises FloatingPointError on every
    rank when r is not finite.
    """
    gradients = [parameter.grad for parameter in _learning(student)]
    world_size = torch.distributed.get_world_size()
    sums = torch.zeros(2, dtype=torch.float64, device=reference[0].device)
    for parameter, gradient, other in zip(_learning(student), gradients, reference, strict=True):
        # what all ranks hold is counted on each of them, an expert on world / expert-parallel-size of them
        copies = world_size if getattr(parameter, "allreduce", True) else world_size // student.expert_parallel_size
        right = other.double().flatten()
        if gradient is not None:
            sums[0] += torch.dot(gradient.double().flatten(), right) / copies
        sums[1] += torch.dot(right, right) / copies
    torch.distributed.all_reduce(sums)
    product, square = sums.tolist()
    if not math.isfinite(square):
        raise FloatingPointError(f"the squared norm of the replay memory's gradient is {square}")
    if product < 0.0:
        for gradient, other in zip(gradients, reference, strict=True):
            if gradient is not None:
                gradient.sub_(other, alpha=product / square)


def _learning(student: Student) -> list[torch.nn.Parameter]:
    return [parameter for parameter in student.parameters() if parameter.requires_grad]
