"""PackNet (arXiv 1711.05769): every entry of every matrix belongs to one stage, and a task acts with those of its own
stage and earlier ones.

Phase 1 trains all that no earlier stage owns; the stage keeps its share of that, the largest, and phase 2 trains the
share. Vectors (biases, layer norms, gate biases) belong to stage 1. The student must be told its task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hpc_cpd.errors import UserError
from hpc_cpd.methods.base import Method, MethodSettings, Phase

if TYPE_CHECKING:
    from torch import Tensor

    from hpc_cpd.student.network import Student

MOST_STAGES = 255  # owners are kept as uint8


class PackNetSettings(MethodSettings):
    """Nothing but the size of the network."""

    name: Literal["packnet"] = "packnet"


@dataclass(frozen=True)
class PackNetMasks:
    """The stage that owns each entry of each matrix: uint8 by canonical name, the shape of the matrix; 0: still free.

    Empty until a student is there.
    """

    owners: Mapping[str, Tensor]

    @staticmethod
    def of_nobody(state: Mapping[str, Tensor]) -> PackNetMasks:
        """Every matrix of the canonical `state` is free."""
        import torch

        return PackNetMasks({name: torch.zeros(w.shape, dtype=torch.uint8) for name, w in state.items() if w.dim() > 1})

    def state_of_stage(self, state: Mapping[str, Tensor], stage: int) -> dict[str, Tensor]:
        """The canonical state that a task of `stage` (from 1) acts with; `state` is that of the newest stage."""
        import torch

        return dict(state) | {
            name: torch.where((owner >= 1) & (owner <= stage), state[name], 0.0) for name, owner in self.owners.items()
        }

    def pruned(self, state: Mapping[str, Tensor], stage: int, stages: int) -> tuple[PackNetMasks, dict[str, Tensor]]:
        """Give `stage` (from 1, of `stages`) its share of what is free; (the masks then, the state then).

        Of the n free entries of a matrix it gets the ceil(n / (stages - stage + 1)) of largest magnitude, of equals
        the first; the others become zero and stay free. The last stage gets everything that is left.
        """
        import torch

        owners, after = {}, dict(state)
        for name, owner in self.owners.items():
            free = (owner == 0).flatten()
            magnitudes = torch.where(free, state[name].flatten().abs(), -1.0)
            share = -(-int(free.sum()) // (stages - stage + 1))
            taken = owner.flatten().clone()
            taken[magnitudes.sort(descending=True, stable=True).indices[:share]] = stage
            owners[name] = taken.view_as(owner)
            after[name] = torch.where(owners[name] > 0, state[name], 0.0)
        return PackNetMasks(owners), after


class PackNet(Method):
    """PackNet: every stage has weights of its own, so nothing is forgotten, and the number of stages must be known."""

    Settings = PackNetSettings
    needs_task = True
    fixed_number_of_stages = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.masks = PackNetMasks({})

    def check(self, stages: int) -> None:
        if self.config.distill.phase1_steps == 0:
            raise UserError(
                "method packnet chooses a stage's weights by what phase 1 made of them, but distill.phase1_steps is 0; "
                "give it steps"
            )
        if stages > MOST_STAGES:
            raise UserError(
                f"method packnet shares its weights out among {MOST_STAGES} stages at most, but the stream has "
                f"{stages}; raise stream.tasks_per_stage"
            )

    def adapt(self, student: Student, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if not self.masks.owners:
            self.masks = PackNetMasks.of_nobody(state)
        return state

    def freeze(self, student: Student, phase: Phase, new_experts: Sequence[int]) -> Mapping[str, Tensor]:
        for parameters in (student.shared_parameters(), student.gate_parameters(), student.expert_parameters()):
            for _, parameter in parameters:
                parameter.requires_grad_(self.stage.number == 1 or parameter.dim() > 1)
        owned = self.masks.owners.items()
        return {name: owner > 0 if phase.number == 1 else owner != self.stage.number for name, owner in owned}

    def end_phase(self, phase: Phase, student: Student, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if phase.number == 1:
            self.masks, state = self.masks.pruned(state, self.stage.number, len(self.stage.plan))
            student.load_canonical(state)
        return state

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.masks.owners)

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        self.masks = PackNetMasks(tensors)

    @staticmethod
    def acting(tensors: Mapping[str, Tensor]) -> Any:
        return PackNetMasks(tensors)


plugin = PackNet
