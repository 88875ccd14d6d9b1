"""A-GEM: a step that would unlearn what the replay memory asks for goes only where it does not (arXiv 1812.00420)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from hpc_cpd.errors import UserError
from hpc_cpd.methods._replay import ReplayMethod, UniformReplaySettings

if TYPE_CHECKING:
    from torch import Tensor

    from hpc_cpd.student.network import Student


class AGEMSettings(UniformReplaySettings):
    """A memory chosen at random; `replay_fraction` of every batch is used for the reference gradient alone."""

    name: Literal["a_gem"] = "a_gem"


class AGEM(ReplayMethod):
    """Averaged gradient episodic memory: gradients that would hurt the memory are projected."""

    Settings = AGEMSettings
    needs_new_and_old = True

    def check(self, stages: int) -> None:
        super().check(stages)
        if self.config.distill.zero_stage:
            raise UserError(
                "method a_gem needs whole gradients on every rank, but distill.zero_stage is "
                f"{self.config.distill.zero_stage}, which shares them out; set distill.zero_stage=0"
            )

    def split(self, batch: Any) -> tuple[Any, Any | None]:
        trained, remembered = batch.split()
        return (trained, remembered) if remembered.rows_of_all_ranks else (batch, None)

    def gradients(self, student: Student, reference: Sequence[Tensor] | None) -> None:
        """Where the product of gradient g and `reference` r is negative, replace g by g - (g.r / r.r) r. A collective.

        Products are over the whole student, with every expert counted once: all ranks decide alike. Raises
        FloatingPointError on every rank when r is not finite.
        """
        import torch

        if reference is None:
            return
        learning = [parameter for parameter in student.parameters() if parameter.requires_grad]
        world_size = torch.distributed.get_world_size()
        sums = torch.zeros(2, dtype=torch.float64, device=reference[0].device)
        for parameter, other in zip(learning, reference, strict=True):
            # what all ranks hold is counted on each of them, an expert on world / expert-parallel-size of them
            copies = world_size if getattr(parameter, "allreduce", True) else world_size // student.expert_parallel_size
            right = other.double().flatten()
            if parameter.grad is not None:
                sums[0] += torch.dot(parameter.grad.double().flatten(), right) / copies
            sums[1] += torch.dot(right, right) / copies
        torch.distributed.all_reduce(sums)
        product, square = sums.tolist()
        if not math.isfinite(square):
            raise FloatingPointError(f"the squared norm of the replay memory's gradient is {square}")
        if product < 0.0:
            for parameter, other in zip(learning, reference, strict=True):
                if parameter.grad is not None:
                    parameter.grad.sub_(other, alpha=product / square)


plugin = AGEM
