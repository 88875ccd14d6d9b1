"""How much each parameter matters for what the student does, from the gradients of single samples.

A sample is one step of one history. Gradients of single samples come from `torch.func`, some samples at a time, so that
memory stays bounded. Under it nothing may depend on the data, so the student must be one with `executor="functional"`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from hpc_cpd.methods.base import Samples
from hpc_cpd.student.network import Student

NUMBERS_AT_ONCE = 2**25  # of gradients that are held together, 128 MB of float32; more is no faster


def fisher_diagonal(student: Student, samples: Samples) -> dict[str, Tensor]:
    """Diagonal of the Fisher information of a unit-variance Gaussian policy around the student's actions.

    For such a policy it is, without any drawing of actions, the mean over samples of the sum over action dimensions of
    (d mean action / d parameter) squared (arXiv 1612.00796 needs this diagonal). float32, shaped like the parameters.
    """
    return _mean_over_samples(student, samples, lambda action: action, lambda total, row: total.addcmul_(row, row))


def output_sensitivity(student: Student, samples: Samples) -> dict[str, Tensor]:
    """Importance of Memory Aware Synapses (arXiv 1711.09601): mean over samples of |d (squared norm of the action) /
    d parameter|. float32, shaped like the parameters.
    """

    def squared_norm(action: Tensor) -> Tensor:
        return action.square().sum(dim=0, keepdim=True)

    return _mean_over_samples(student, samples, squared_norm, lambda total, row: total.add_(row.abs()))


def all_alike(student: Student, samples: Samples) -> dict[str, Tensor]:
    """One for every entry of every parameter, whatever the samples are."""
    return {name: torch.ones_like(parameter) for name, parameter in student.named_parameters()}


def _mean_over_samples(
    student: Student, samples: Samples, of: Callable[[Tensor], Tensor], add: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """`add` takes in the gradient of each number of `of`(action [act]) at each sample; divided by the samples' number.

    `student` must hold all its experts.
    """
    parameters = {name: parameter.detach() for name, parameter in student.named_parameters()}

    def answer(parameters: dict[str, Tensor], observations: Tensor, task_vector: Tensor, step: Tensor) -> Tensor:
        windows = (observations[None], task_vector[None])
        return of(functional_call(student, parameters, windows, {"at": step[None]})[0][0, 0])

    gradients = vmap(jacrev(answer), in_dims=(None, 0, 0, 0))
    totals = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    count = len(samples[0])
    at_once = max(1, NUMBERS_AT_ONCE // (student.shape.action_size * sum(p.numel() for p in parameters.values())))
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels know no batch of gradients and would be called one by one
        for first in range(0, count, at_once):
            for name, rows in gradients(parameters, *(part[first : first + at_once] for part in samples)).items():
                for row in rows.flatten(0, 1):
                    add(totals[name], row)
    return {name: total / max(1, count) for name, total in totals.items()}
