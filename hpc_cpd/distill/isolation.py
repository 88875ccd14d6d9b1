"""How a stage learns weights of its own: PackNet, low-rank adapters, or none of them.

`hpc_cpd.student.isolation` names the papers, and knows what is kept and how a task then acts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from hpc_cpd.distill.phases import Phase, freeze
from hpc_cpd.distributed.torch import run_on_rank
from hpc_cpd.errors import UserError
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import write_bytes
from hpc_cpd.settings import Config
from hpc_cpd.student.isolation import Adapters, Isolation, Owners, add_adapters, is_adapter
from hpc_cpd.student.network import Student


class SharedWeights:
    """What a stage does with its student where no stage has weights to itself, and what the other kinds override."""

    def prepare(self, student: Student, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Add to a new `student` what this stage learns besides; return `state` with what that starts from."""
        return state

    def freeze(self, student: Student, phase: Phase, new_experts: list[int]) -> Mapping[str, Tensor]:
        """Set ``requires_grad`` for `phase`; return bool by name: entries of what learns that must not move."""
        freeze(student, phase, new_experts)
        return {}

    def after_phase(self, phase: Phase, student: Student, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The canonical `state` that `phase` ended with, as the next one is to find it in `student` (a collective)."""
        return state

    def published(self, state: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Isolation | None]:
        """(state, what else a student folder keeps) after the last phase."""
        return state, None


class PackNetStage(SharedWeights):
    """Phase 1 trains all that no earlier stage owns; the stage keeps its share of that, and phase 2 trains the share.

    Who owns what from then on is in ``stages/K/owner.safetensors``.
    """

    def __init__(self, folder: Path, stage: int, stages: int, before: Owners) -> None:
        self.file = folder / "owner.safetensors"
        self.stage = stage
        self.stages = stages
        self.before = before

    def freeze(self, student: Student, phase: Phase, new_experts: list[int]) -> Mapping[str, Tensor]:
        for _, parameter in [
            *student.shared_parameters(),
            *student.gate_parameters(),
            *student.expert_parameters(),
        ]:
            parameter.requires_grad_(self.stage == 1 or parameter.dim() > 1)
        if phase.number == 1:
            return {name: owner > 0 for name, owner in self.before.owners.items()}
        return {name: owner != self.stage for name, owner in self._after().owners.items()}

    def after_phase(self, phase: Phase, student: Student, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if phase.number != 1:
            return state
        owners, state = self.before.pruned(state, self.stage, self.stages)
        # before the checkpoint of the pruned student: whoever goes on from that one finds it
        run_on_rank(lambda: write_bytes(self.file, save(owners.tensors())))
        student.load_canonical(state)
        return state

    def published(self, state: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Isolation | None]:
        return state, self._after()

    def _after(self) -> Owners:
        if not self.file.is_file():
            raise UserError(f"{self.file} is missing; delete {self.file.parent} and run the same command again")
        return Owners.from_tensors(load_file(self.file))


class AdapterStage(SharedWeights):
    """A stage after the first: the adapters of the stage learn, in both phases, and nothing else."""

    def __init__(self, stage: int, rank: int, seed: int, before: Adapters) -> None:
        self.stage = stage
        self.rank = rank
        self.seed = seed
        self.before = before

    def prepare(self, student: Student, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        add_adapters(student, self.rank, self.seed, self.stage)
        return {name: t.clone() for name, t in student.state_dict().items() if is_adapter(name)} | dict(state)

    def freeze(self, student: Student, phase: Phase, new_experts: list[int]) -> Mapping[str, Tensor]:
        for name, parameter in [
            *student.shared_parameters(),
            *student.gate_parameters(),
            *student.expert_parameters(),
        ]:
            parameter.requires_grad_(is_adapter(name))
        return {}

    def published(self, state: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Isolation | None]:
        own = {name: tensor for name, tensor in state.items() if is_adapter(name)}
        rest = {name: tensor for name, tensor in state.items() if name not in own}
        return rest, Adapters({**self.before.by_stage, self.stage: own})


class FirstAdapterStage(SharedWeights):
    """The stage that learns what the adapters of later ones are added to."""

    def published(self, state: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Isolation | None]:
        return state, Adapters({})


def isolation_of_stage(
    run: Run, config: Config, stage: int, stages: int, state: Mapping[str, Tensor], before: Isolation | None
) -> SharedWeights:
    """How `stage` (from 1, of `stages`) learns; it starts from the canonical `state` and what was kept `before`."""
    if config.distill.isolation == "packnet":
        owners = before if isinstance(before, Owners) else Owners.of_nobody(state)
        return PackNetStage(run.stage(stage), stage, stages, owners)
    if config.distill.isolation == "lora":
        if stage == 1:
            return FirstAdapterStage()
        assert isinstance(before, Adapters)
        return AdapterStage(stage, config.distill.lora_rank, config.seed, before)
    return SharedWeights()
