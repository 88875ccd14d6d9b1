"""What a continual-learning method is, and what it may decide.

A method is a subclass of :class:`Method` in a file of its own, with its settings beside it. `hpc_cpd.distill` learns
the stages and calls the functions below, in this order; each has a default, and a method overrides what it changes::

    check                    at launch, before anything is written
    begin_stage              on every rank, before a stage learns; the state of the stage before is loaded
    experts_born             how many experts the student grows by
    phases                   what a stage trains, one phase after the other
      adapt, freeze          before each phase: what the student gets besides, and what learns
      rows                   which rows a batch has, and whose answers they ask for
      split, extra_loss, gradients, after_step         in each step
      end_phase              after each phase
    end_stage                after the last phase; what the student is published with
    keep_memory              when the student is published: trajectories for later stages
    acting                   when a published student acts

`state_dict` is part of every checkpoint and of every published student, so a method never keeps files of its own.

Importing this module or a method imports no torch: the launcher reads the settings on login nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from pydantic import Field

from hpc_cpd import plugins
from hpc_cpd.errors import UserError
from hpc_cpd.run.paths import Run
from hpc_cpd.settings import Config, PluginSettings

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from hpc_cpd.student.network import Student
    from hpc_cpd.student.policy import StudentPolicy
    from hpc_cpd.trajectories.store import TrajectoryStore


class MethodSettings(PluginSettings):
    """What every method has."""

    experts_per_task: int = Field(
        5, ge=1, description="experts for every task of stage 1, which serve all later stages too"
    )


@dataclass(frozen=True)
class Stage:
    """The stage that is learnt. `plan`: the task ids of every stage; `number`: of this one, from 1.

    `stop`: whether this rank was asked to stop.
    """

    run: Run
    config: Config
    plan: list[list[str]]
    number: int
    stop: Callable[[], bool] = lambda: False

    @property
    def tasks(self) -> list[str]:
        """The task ids that are new in this stage."""
        return self.plan[self.number - 1]

    @property
    def seen(self) -> list[str]:
        """The task ids of this stage and those before it."""
        return [task for tasks in self.plan[: self.number] for task in tasks]


@dataclass(frozen=True)
class Phase:
    """What is trainable during one phase of a stage."""

    number: int
    steps: int
    shared_learns: bool = True
    gate_learns: bool = True
    old_experts_learn: bool = True
    old_gate_rows_learn: bool = True  # if the gate learns at all: the rows of experts of earlier stages too
    dagger_episodes: int = 0  # of each new task, that the student plays and the teachers answer before the phase


class Drawn(NamedTuple):
    """Rows of one source in a global batch, those of this rank.

    `observations` float32 [B, L, ...], oldest first; `target` [B, L, act]; `valid` bool [B, L], True at the step that
    is asked for; `task_vectors` float32 [B, D]; `origin`: the store and the steps int64 [B] in it that the rows are of.
    """

    observations: np.ndarray
    target: np.ndarray
    valid: np.ndarray
    task_vectors: np.ndarray
    origin: tuple[TrajectoryStore, np.ndarray]


class Rows(Protocol):
    """One source of rows of a batch, of which it gives the same number in every batch."""

    count: int  # in the batch of all ranks
    of_new_tasks: bool  # whether the rows belong to tasks of this stage
    asks_past_student: bool  # the target is what the student did before this stage, in place of `Drawn.target`
    as_recorded: bool  # `Drawn` has the histories of steps of a store and the vectors of their tasks, nothing else

    def draw(self, rng: np.random.Generator, rank: int, world_size: int) -> Drawn:
        """Draw the rows of all ranks from `rng`, and read rows ``rank::world_size`` of them."""


@dataclass(frozen=True)
class StageData:
    """What the rows of a stage are drawn from.

    `new`, `memory`: trajectories of the new tasks, and those that are remembered of old ones; `task_vectors`: float32
    [D] of each task; `length`: observations of a history; `target`: the field of the stores that is the target;
    `shares`: (store) -> float64 [tasks], the share of rows that each task gets, None: all alike; `past`: the student
    before this stage, None in stage 1.
    """

    new: TrajectoryStore
    memory: TrajectoryStore | None
    task_vectors: Mapping[str, np.ndarray]
    length: int
    target: str
    shares: Callable[[TrajectoryStore], np.ndarray | None]
    past: StudentPolicy | None


class Samples(NamedTuple):
    """Steps of the trajectories that a stage learnt: observations float32 [N, L, obs], task vectors float32 [N, D],
    and the position in its history that each step has, int64 [N]."""

    observations: Tensor
    task_vectors: Tensor
    steps: Tensor


class Method:
    """Fine-tuning: everything goes on learning, and nothing is done against forgetting. Other methods override it."""

    Settings: ClassVar[type[MethodSettings]] = MethodSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Settings of other groups that the method wants where neither file nor command line says otherwise."""
    keeps_memory: ClassVar[bool] = False
    """Whether trajectories are kept for later stages (``stages/K/memory``)."""
    needs_task: ClassVar[bool] = False
    """Whether a student of this method must be told the task that it acts in."""
    fixed_number_of_stages: ClassVar[bool] = False
    """Whether a finished run cannot go on with further stages."""

    def __init__(self, config: Config) -> None:
        """`config`: that of the run; ``config.method`` are the method's own settings."""
        self.config = config
        self.settings: Any = config.method
        self.stage: Stage

    # ---- before anything is written

    def check(self, stages: int) -> None:
        """Raise UserError when the settings contradict each other, or do not fit so many stages."""

    # ---- before a stage learns

    def begin_stage(self, stage: Stage) -> None:
        """Get ready for `stage`. `load_state_dict` was called with what the stage before published, if it has any."""
        self.stage = stage

    def experts_born(self, stage: Stage) -> int:
        """How many experts the student grows by at the beginning of `stage`."""
        return len(stage.tasks) * int(self.settings.experts_per_task) if stage.number == 1 else 0

    @property
    def initial_gate_bias(self) -> float:
        """Bias of the gate for an expert that is born after stage 1."""
        return 0.0

    def phases(self, number: int) -> list[Phase]:
        """The phases of stage `number` (from 1)."""
        steps = self.config.distill
        return [Phase(1, steps.phase1_steps), Phase(2, steps.phase2_steps, gate_learns=False)]

    # ---- before each phase

    def adapt(self, student: Student, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Add to a new `student` what learns besides; return the canonical `state` with what that starts from."""
        return state

    def freeze(self, student: Student, phase: Phase, new_experts: Sequence[int]) -> Mapping[str, Tensor]:
        """Set ``requires_grad`` for `phase`; return bool tensors by name: entries of what learns that must not move."""
        for _, parameter in student.shared_parameters():
            parameter.requires_grad_(phase.shared_learns)
        newest = f"_{len(student.experts_by_stage)}"
        for name, parameter in student.gate_parameters():
            parameter.requires_grad_(phase.gate_learns and (phase.old_gate_rows_learn or name.endswith(newest)))
        for _, parameter in student.expert_parameters():
            parameter.requires_grad_(phase.old_experts_learn)
        for _, parameter in student.expert_parameters(new_experts):
            parameter.requires_grad_(True)
        return {}

    def rows(self, data: StageData, batch_size: int) -> list[Rows]:
        """The sources of the rows of every batch, `batch_size` rows together. Raises UserError if it cannot be."""
        from hpc_cpd.methods._rows import StoreRows

        return [StoreRows(data, data.new, batch_size, of_new_tasks=True)]

    # ---- in each step

    def split(self, batch: Any) -> tuple[Any, Any | None]:
        """(what the loss is of, what the reference gradients of `gradients` are of, None: there are none)."""
        return batch, None

    def extra_loss(self, student: Student, batch: Any, gate: Tensor, share: float) -> Tensor | None:
        """What is added to the loss, scaled so that its mean over ranks is the loss of the batch of all ranks.

        `batch`: a `distill.batches.Batch`; `gate`: its gate probabilities [B, L, M, E]; `share`: by which a sum over
        this rank's rows is multiplied for that. For a sum over parameters there is `sum_over_parameters`.
        """
        return None

    def gradients(self, student: Student, reference: Sequence[Tensor] | None) -> None:
        """Look at, or change, the gradients of a step: averaged over ranks and not clipped, in ``parameter.grad``.

        `reference`: those of the other part of `split`, in the order of the parameters that learn. Not called with
        distill.zero_stage above 0.
        """

    def after_step(self, student: Student) -> None:
        """Look at the parameters after a step was made."""

    # ---- after a phase, and after the last one

    def end_phase(self, phase: Phase, student: Student, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The canonical `state` that `phase` ended with, as the next one is to find it in `student`. A collective."""
        return state

    def end_stage(
        self, state: Mapping[str, Tensor], student: Callable[[], Student], samples: Callable[[int], Samples]
    ) -> Mapping[str, Tensor]:
        """The canonical state to publish, from the one that the last phase ended with. A collective.

        ``student()`` builds a student of this state that holds all its experts; ``samples(n)`` gives n steps of batches
        that no phase learnt from. Later calls of `state_dict` give what the next stage begins with.
        """
        return state

    def open_memory(self, stage: Stage) -> TrajectoryStore | None:
        """What was kept in the stages before `stage`; None: nothing."""
        return None

    def keep_memory(self, stage: Stage, new: TrajectoryStore, errors: np.ndarray) -> None:
        """Write ``stages/K/memory``. `errors` float64 [episodes of `new`]: the student's. Called on rank 0 alone."""

    # ---- state

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that a resumed stage, and the next one, go on with.

        A key ``PARAMETER|word`` belongs to a parameter of the student: every rank gives those of the parameters that it
        holds, and is given those of the parameters that it holds, also on another number of ranks. Any other key has
        the same value on every rank.
        """
        return {}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave, in this stage or the one before; empty in stage 1. The tensors are on the
        CPU."""

    @staticmethod
    def acting(tensors: Mapping[str, Tensor]) -> Any:
        """How a published student acts, whose method has the state `tensors`.

        None: with its parameters as they are. Otherwise an object with ``state_of_stage(state, stage)``, which gives
        the canonical state that the tasks of `stage` act with.
        """
        return None


def sum_over_parameters(student: Student, term: Callable[[str, Tensor], Tensor | None]) -> Tensor:
    """The sum of `term` (name, parameter) -> float32 [] over the parameters that learn, scaled as `extra_loss` must be.

    None counts as zero. Experts may be spread over ranks: each enters the mean over ranks once, like all else.
    """
    import torch

    total = torch.zeros((), device=next(student.parameters()).device)
    for name, parameter in student.named_parameters():
        value = term(name, parameter) if parameter.requires_grad else None
        if value is not None:
            # an expert's gradient is averaged over all ranks but only world / size of them hold it
            copies = 1 if getattr(parameter, "allreduce", True) else student.expert_parallel_size
            total = total + copies * value
    return total


def method_of(config: Config) -> Method:
    """The method of a run, which knows nothing yet."""
    method: Method = plugins.load("methods", config.method.name)(config)
    return method


def phases_of(method: Method, number: int) -> list[Phase]:
    """The phases of stage `number` (from 1) that have steps. Raises UserError when none has any."""
    phases = [phase for phase in method.phases(number) if phase.steps > 0]
    if not phases:
        raise UserError("distill.phase1_steps and distill.phase2_steps are both 0; a stage must learn in one of them")
    return phases
