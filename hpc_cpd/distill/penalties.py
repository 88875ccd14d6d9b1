"""Weight regularisers of the baselines: L2, EWC (arXiv 1612.00796), Online EWC (arXiv 1805.06370), MAS (1711.09601).

All of them are one quadratic, sum of importance * (parameter - anchor)^2, and differ in how importance and
anchor are carried from stage to stage. Sums of such quadratics are again one, so memory does not grow.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from hpc_cpd.distill.importance import Samples, fisher_diagonal, output_sensitivity
from hpc_cpd.errors import UserError
from hpc_cpd.run.publish import write_bytes
from hpc_cpd.settings import DistillSettings
from hpc_cpd.student.network import Student


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


def importance_of(settings: DistillSettings, student: Student, samples: Samples) -> dict[str, Tensor]:
    """What `settings.penalty` calls the importance of every parameter of `student`, which holds all its experts."""
    if settings.penalty == "l2":
        return {name: torch.ones_like(parameter) for name, parameter in student.named_parameters()}
    return (output_sensitivity if settings.penalty == "mas" else fisher_diagonal)(student, samples)


def next_penalty(
    settings: DistillSettings, previous: Penalty | None, state: dict[str, Tensor], importance: dict[str, Tensor]
) -> Penalty:
    """The penalty the next stage works under, from the parameters `state` reached and their importance there."""
    total, anchor = dict(importance), {name: state[name] for name in importance}
    if previous is None or settings.penalty == "l2":
        return Penalty(total, anchor)
    for name, old in previous.importance.items():
        if settings.penalty == "ewc":  # one quadratic per stage: their sum has the summed weights and the mean anchor
            total[name] = old + importance[name]
            weighted = old * previous.anchor[name] + importance[name] * state[name]
            anchor[name] = torch.where(total[name] > 0, weighted / total[name].clamp_min(1e-30), state[name])
        else:  # around the parameters reached last
            decay = settings.online_ewc_decay if settings.penalty == "online_ewc" else 1.0
            total[name] = decay * old + importance[name]
    return Penalty(total, anchor)
