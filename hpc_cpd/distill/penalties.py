"""Weight regularisers of the baselines: L2, EWC (arXiv 1612.00796), Online EWC (arXiv 1805.06370).

All three are one quadratic, sum of importance * (parameter - anchor)^2, and differ in how importance and
anchor are carried from stage to stage. Sums of such quadratics are again one, so memory does not grow.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from hpc_cpd.config import DistillSettings
from hpc_cpd.errors import UserError
from hpc_cpd.run import write_bytes
from hpc_cpd.student.transformer import Student


class Penalty:
    """A quadratic around past parameters. Keys are canonical parameter names."""

    def __init__(self, importance: dict[str, Tensor], anchor: dict[str, Tensor]) -> None:
        self.importance = importance
        self.anchor = anchor

    def loss(self, student: Student) -> Tensor:
        """Half the quadratic, scaled so that the mean over ranks of its gradient is the gradient of the whole."""
        total = torch.zeros((), device=next(student.parameters()).device)
        for name, parameter in student.named_parameters():
            if not parameter.requires_grad or name not in self.importance:
                continue
            # an expert's gradient is averaged over all ranks but only world / size of them hold it
            share = 1 if getattr(parameter, "allreduce", True) else student.expert_parallel_size
            distance = (parameter - self.anchor[name].to(parameter)).square()
            total = total + 0.5 * share * (self.importance[name].to(parameter) * distance).sum()
        return total

    def save(self, path: Path) -> None:
        """Write atomically as safetensors."""
        tensors = {f"importance/{name}": value.contiguous() for name, value in self.importance.items()}
        tensors |= {f"anchor/{name}": value.contiguous() for name, value in self.anchor.items()}
        write_bytes(path, save(tensors))

    @staticmethod
    def load(path: Path) -> Penalty:
        """Raises UserError when the file of the stage before is missing."""
        if not path.is_file():
            raise UserError(f"{path} is missing, but distill.penalty needs what the stage before left there")
        tensors = load_file(path)
        importance, anchor = (
            {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            for prefix in ("importance/", "anchor/")
        )
        return Penalty(importance, anchor)


def next_penalty(
    settings: DistillSettings, previous: Penalty | None, state: dict[str, Tensor], fisher: dict[str, Tensor]
) -> Penalty:
    """The penalty the next stage works under, from the parameters `state` reached and their Fisher diagonal."""
    if settings.penalty == "l2":
        return Penalty({name: torch.ones_like(state[name]) for name in fisher}, {name: state[name] for name in fisher})
    if previous is None:
        return Penalty(fisher, {name: state[name] for name in fisher})
    importance, anchor = dict(fisher), {name: state[name] for name in fisher}
    for name, old in previous.importance.items():
        if settings.penalty == "online_ewc":
            importance[name] = settings.online_ewc_decay * old + fisher[name]
        else:  # EWC keeps one quadratic per stage: their sum has the summed weights and the weighted mean anchor
            importance[name] = old + fisher[name]
            weighted = old * previous.anchor[name] + fisher[name] * state[name]
            anchor[name] = torch.where(importance[name] > 0, weighted / importance[name].clamp_min(1e-30), state[name])
    return Penalty(importance, anchor)


def fisher_diagonal(
    student: Student, batches: Iterable[tuple[Tensor, Tensor, Tensor]], generator: torch.Generator
) -> dict[str, Tensor]:
    """Diagonal of the Fisher information of a unit-variance Gaussian policy, per sample.

    Each batch is (observations [B, L, obs], task vectors [B, D], valid [B, L]). With actions drawn from the policy
    itself the samples' gradients are independent with mean zero, so the square of their sum has the sum of their
    squares as its mean: one backward pass gives an unbiased estimate for the whole batch.
    """
    parameters = dict(student.named_parameters())
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    samples = 0
    for observations, task_vectors, valid in batches:
        means, _, _ = student(observations, task_vectors, valid, None)
        noise = torch.randn(means.shape, generator=generator).to(means.device) * valid[..., None]
        gradients = torch.autograd.grad((means * noise).sum(), list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient.square()
        samples += int(valid.sum())
    return {name: value / max(1, samples) for name, value in total.items()}
