"""How much each parameter matters for what the student does, from the gradients of single samples.

A sample is one step of one history. Gradients of single samples come from `torch.func`, some samples at a time, so that
memory stays bounded. Under it nothing may depend on the data: every expert is asked, with the weight zero for those
that a top-k gate did not choose, which gives the student's own actions and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from hpc_cpd.methods.base import Samples
from hpc_cpd.student.attention import rotation
from hpc_cpd.student.moe.mixture import Mixture
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
    return _mean_over_samples(
        student,
        samples,
        lambda action: action.square().sum(dim=0, keepdim=True),
        lambda total, row: total.add_(row.abs()),
    )


def _mean_over_samples(
    student: Student,
    samples: Samples,
    of: Callable[[Tensor], Tensor],
    add: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """`add` takes in the gradient of each number of `of`(action [act]) at each sample; divided by the samples' number.

    `student` must hold all its experts.
    """
    action_at = _ActionAt(student)
    parameters = {name: parameter.detach() for name, parameter in action_at.named_parameters()}

    def answer(parameters: dict[str, Tensor], observations: Tensor, task_vector: Tensor, step: Tensor) -> Tensor:
        return of(functional_call(action_at, parameters, (observations, task_vector, step)))

    gradients = vmap(jacrev(answer), in_dims=(None, 0, 0, 0))
    totals = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    count = len(samples[0])
    each = student.shape.action_size * sum(parameter.numel() for parameter in parameters.values())
    at_once = max(1, NUMBERS_AT_ONCE // each)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels know no batch of gradients and would be called one by one
        for first in range(0, count, at_once):
            found = gradients(parameters, *(part[first : first + at_once] for part in samples))
            for name, rows in found.items():
                for row in rows.flatten(0, 1):
                    add(totals[name], row)
            del found
    return {name.removeprefix("student."): total / max(1, count) for name, total in totals.items()}


class _ActionAt(nn.Module):
    """`Student.forward` for one history and one of its steps, as a function that `torch.func` can take apart."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, observations: Tensor, task_vector: Tensor, step: Tensor) -> Tensor:
        """Observations [L, obs], task vector [D], step int64 [] -> action [act]."""
        student = self.student
        length, shape = observations.shape[0], student.shape
        tokens, context = student.embed(observations[None], task_vector.expand(1, length, -1))
        turn = rotation(torch.arange(length, device=tokens.device), student.head_size)
        for number, block in enumerate(student.blocks):
            tokens = block(tokens, turn)
            if number == shape.layers - 1:  # what follows looks at no other step
                tokens, context = (part.index_select(1, step[None]) for part in (tokens, context))
            place = student.mixture_behind(number)
            if place is not None:
                features = student.norms_features[place](tokens)
                inputs = torch.cat([features, context], dim=-1)[0]
                tokens = features + _mix_all(cast(Mixture, student.mixtures[place]), inputs)
        action: Tensor = student.head(student.norm_head(tokens))[0, 0]
        return action


def _mix_all(mixture: Mixture, tokens: Tensor) -> Tensor:
    """What `mixture` makes of tokens [n, input]: [n, output]."""
    weights = mixture.gate.weights_of_all(mixture.gate(tokens, None)[0])
    outputs = torch.stack([expert(tokens) for expert in mixture.experts.values()], dim=1)
    mixed = (outputs * weights.unsqueeze(-1)).sum(dim=1)
    return mixed if mixture.shared is None else mixed + mixture.shared(tokens)
