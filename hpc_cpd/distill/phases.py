"""Who learns when: the two phases of a stage (arXiv 2601.22475; design section 4)."""

from __future__ import annotations

from dataclasses import dataclass

from hpc_cpd.errors import UserError
from hpc_cpd.settings import Config
from hpc_cpd.student.network import Student

RELABELLED_PHASE = 3


@dataclass(frozen=True)
class Phase:
    """What is trainable during one phase of a stage."""

    number: int
    steps: int
    shared_learns: bool
    gate_learns: bool
    old_experts_learn: bool
    old_gate_learns: bool = True  # if the gate learns at all: the rows of experts of earlier stages too


def phases_of(stage: int, config: Config) -> list[Phase]:
    """The phases of `stage` (from 1), those with no steps left out. Raises UserError when neither 1 nor 2 has any.

    Stage 1 has nothing to protect: shared layers learn in both phases. Later, phase 1 trains new experts and
    the gate against everything old frozen; without growth there are no new experts, so all of them learn.

    Phase 3 is phase 2 once more, with the episodes that the student played and the teachers relabelled.

    With `freeze_old` neither old experts nor their rows of the gate ever move again: what a token of an old task meets
    is the same to the last bit as long as the gate does not send it to a newer expert.
    """
    settings, grows = config.distill, config.student.grow
    first = stage == 1
    shared = first or not settings.freeze_shared
    free = first or not grows
    old = free or not settings.freeze_old
    phases = [
        Phase(1, settings.phase1_steps, shared, gate_learns=True, old_experts_learn=free, old_gate_learns=old),
        Phase(2, settings.phase2_steps, shared, gate_learns=False, old_experts_learn=old),
    ]
    phases = [phase for phase in phases if phase.steps > 0]
    if not phases:
        raise UserError("distill.phase1_steps and distill.phase2_steps are both 0; a stage must learn in one of them")
    if settings.relabelled_episodes:
        phases.append(Phase(RELABELLED_PHASE, settings.phase3_steps, shared, gate_learns=False, old_experts_learn=old))
    return phases


def freeze(student: Student, phase: Phase, new_experts: list[int]) -> None:
    """Set ``requires_grad`` for `phase`. Call before the engine is built; it does not look again."""
    for _, parameter in student.shared_parameters():
        parameter.requires_grad_(phase.shared_learns)
    newest = f"_{len(student.experts_by_stage)}"
    for name, parameter in student.gate_parameters():
        parameter.requires_grad_(phase.gate_learns and (phase.old_gate_learns or name.endswith(newest)))
    for _, parameter in student.expert_parameters():
        parameter.requires_grad_(phase.old_experts_learn)
    for _, parameter in student.expert_parameters(new_experts):
        parameter.requires_grad_(True)
