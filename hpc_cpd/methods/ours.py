"""Our method: experts that grow with every task and never move again, a replay memory, and self-distillation.

After arXiv 2601.22475: an initial gate bias of -5 for new experts, phase 1 (old experts frozen, new experts and gate
learn), phase 2 (gate frozen), shared layers frozen after stage 1, a replay memory chosen by a determinantal point
process. Different from it: old experts stay frozen in phase 2, and half of the rows about old tasks ask the student
before the stage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from hpc_cpd.errors import UserError
from hpc_cpd.methods._replay import ReplayMethod, ReplaySettings
from hpc_cpd.methods.base import Phase, Stage
from hpc_cpd.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from hpc_cpd.student.network import Student

WITHOUT_GROWTH = "null: the experts of stage 1 serve every later stage"


class GrowthSettings(Settings):
    """New experts for the tasks of every later stage."""

    initial_gate_bias: float = Field(
        -5.0,
        description="gate bias of a new expert (arXiv 2601.22475); if a stage adds n > 5 experts: lowered by log(n/5)",
    )
    new_expert_routing_coefficient: float = Field(
        0.1, ge=0, description="top-k gate, phase 1: weight of sending new tasks to new experts and old ones to old"
    )
    freeze_old_experts: bool = Field(
        True,
        description="experts of earlier stages and their rows of the gate stay frozen; false: phase 2 trains them",
    )


class SelfDistillationSettings(Settings):
    """Rows that ask for what the student before this stage did: new observations, the vector of an old task."""

    fraction: float = Field(0.5, gt=0, le=1, description="share of the rows about old tasks")
    interpolation_fraction: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of them whose observations interpolate two remembered states of the old task",
    )


class DaggerSettings(Settings):
    """A third phase, with episodes that the student plays and the teachers answer (DAgger, arXiv 1011.0686)."""

    episodes: int = Field(25, ge=1, description="episodes of each new task")
    steps: int = Field(1000, ge=1, description="gradient steps, like those of phase 2")


class OurSettings(ReplaySettings):
    """Growth, replay memory, self-distillation."""

    name: Literal["ours"] = "ours"
    experts_per_task: int = Field(1, ge=1, description="experts added per new task")
    growth: GrowthSettings | None = Field(GrowthSettings(), description=WITHOUT_GROWTH)
    freeze_shared_layers: bool = Field(True, description="false: shared layers go on learning after stage 1")
    self_distillation: SelfDistillationSettings | None = Field(SelfDistillationSettings(), description="null: none")
    dagger: DaggerSettings | None = Field(None, description="null: no third phase")


class Ours(ReplayMethod):
    """Our default: nothing that an old task needs ever moves, and rows about old tasks hold the gate in place."""

    Settings = OurSettings

    def check(self, stages: int) -> None:
        super().check(stages)
        settings, config = self.settings, self.config
        if stages > 1 and config.student.top_k and settings.growth and config.distill.phase1_steps == 0:
            raise UserError(
                f"student.top_k is {config.student.top_k}, so new experts get work in phase 1 alone, but "
                "distill.phase1_steps is 0; give it steps, or set student.top_k=0"
            )
        if config.distill.target == "executed" and settings.dagger:
            raise UserError(
                "method.dagger plays episodes in which the executed actions are the student's own, so it must not "
                "imitate them, but distill.target is 'executed'; set distill.target=mean, or method.dagger=null"
            )

    def experts_born(self, stage: Stage) -> int:
        grows = self.settings.growth is not None or stage.number == 1
        return len(stage.tasks) * int(self.settings.experts_per_task) if grows else 0

    @property
    def initial_gate_bias(self) -> float:
        return float(self.settings.growth.initial_gate_bias) if self.settings.growth else 0.0

    def phases(self, number: int) -> list[Phase]:
        """Stage 1 has nothing to protect: shared layers learn in both phases. Later, phase 1 trains new experts and the
        gate against everything old frozen; without growth there are no new experts, so all of them learn.
        """
        settings, growth, steps = self.settings, self.settings.growth, self.config.distill
        shared = number == 1 or not settings.freeze_shared_layers
        free = number == 1 or growth is None
        old = free or not growth.freeze_old_experts
        phases = [
            Phase(1, steps.phase1_steps, shared, old_experts_learn=free, old_gate_rows_learn=old),
            Phase(2, steps.phase2_steps, shared, gate_learns=False, old_experts_learn=old),
        ]
        if settings.dagger:
            dagger = settings.dagger
            phases.append(Phase(3, dagger.steps, shared, False, old, dagger_episodes=dagger.episodes))
        return phases

    @property
    def self_distillation(self) -> tuple[float, float]:
        own = self.settings.self_distillation
        return (own.fraction, own.interpolation_fraction) if own else (0.0, 0.0)

    def extra_loss(self, student: Student, batch: Any, gate: Tensor, share: float) -> Tensor | None:
        """A hard gate learns from the error of the expert that it picked alone, and where a new expert has learnt to
        serve a token there is no error left to tell the gate so: it is told who is to serve whom.
        """
        import torch

        growth, newest = self.settings.growth, len(student.experts_by_stage[-1])
        if batch.override is None or growth is None or not student.shape.top_k or len(student.experts_by_stage) == 1:
            return None
        to_new = gate[..., -newest:].sum(dim=-1)
        right = torch.where(batch.override[:, None, None], to_new, 1.0 - to_new).clamp_min(1e-6)
        wrong = -torch.where(batch.valid[:, :, None], right.log(), 0.0).mean(dim=2).sum() * share
        return growth.new_expert_routing_coefficient * wrong


plugin = Ours
