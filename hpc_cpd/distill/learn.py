"""Learning a stage: its phases, step after step, with checkpoints that lose nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hpc_cpd.distill.batches import Batch, StageBatches
from hpc_cpd.distill.engine import PhaseEngine
from hpc_cpd.distill.isolation import SharedWeights
from hpc_cpd.distill.losses import action_mean_error
from hpc_cpd.distill.penalties import Penalty
from hpc_cpd.distill.phases import Phase, phases_of
from hpc_cpd.distributed.failures import collective_timeout, naming_lost_ranks
from hpc_cpd.distributed.torch import (
    COLLECTIVE_TIMEOUT_SECONDS,
    all_ranks_max,
    device_of_rank,
    gather,
    run_on_rank,
)
from hpc_cpd.errors import StopRequested, UserError
from hpc_cpd.progress import Progress
from hpc_cpd.run.metrics_log import MetricsLog
from hpc_cpd.run.paths import Run
from hpc_cpd.run.save_due import SaveDue
from hpc_cpd.settings import Config
from hpc_cpd.student.checkpoint import PendingCheckpoint, gather_state, load_checkpoint
from hpc_cpd.student.network import Student, StudentShape

LOG_EVERY_STEPS = 50


@dataclass(frozen=True)
class Beginning:
    """What a stage starts from: the grown student and what it will be told."""

    state: Mapping[str, Tensor]  # canonical names
    shape: StudentShape
    experts_by_stage: list[list[int]]
    new_experts: list[int]


def learn_stage(
    run: Run,
    stage: int,
    config: Config,
    phases: Sequence[Phase],
    beginning: Beginning,
    batches: StageBatches,
    penalty: Penalty | None,
    isolation: SharedWeights,
    stop: Callable[[], bool],
) -> dict[str, Tensor]:
    """Run `phases` of `stage`, of which they are neighbours, and return the canonical state the student ends with, on
    every rank.

    Goes on from the newest of the stage's checkpoints, on any number of ranks. Raises StopRequested
    once all ranks agreed to stop and saved together.
    """
    folder = run.stage(stage)
    checkpoints = folder / "checkpoints"
    first_rank = torch.distributed.get_rank() == 0
    newest = run_on_rank(lambda: _newest_alone(checkpoints))
    reached = position_of(newest) if newest is not None else (0, 0)
    if reached[0] < phases[0].number:
        newest, reached = None, (phases[0].number, 0)
    before = [phase.steps for phase in phases_of(stage, config) if phase.number < phases[0].number]
    offset = sum([*before, *(phase.steps for phase in phases if phase.number < reached[0])])
    metrics = MetricsLog(folder / "metrics.jsonl", offset + reached[1]) if first_rank else None

    state: Mapping[str, Tensor] = beginning.state
    done = sum(before)
    for phase in phases:
        if phase.number >= reached[0]:
            student = build_student(beginning, config)
            state = isolation.prepare(student, state)
            student.load_canonical(state)
            start, moments = 0, None
            if newest is not None and phase.number == reached[0]:
                start, moments = reached[1], load_checkpoint(newest, student)[1]
            fixed = isolation.freeze(student, phase, beginning.new_experts)
            engine = PhaseEngine(student, config.distill, phase.steps)
            if moments is not None:
                engine.restore(moments)
            engine.hold(fixed)
            save = _Saver(checkpoints, engine, SaveDue(run, config.checkpoint_every_seconds), stop)
            _run_phase(engine, phase, start, done, config, batches, penalty, metrics, save, f"stage {stage}")
            save.finish()
            state = isolation.after_phase(phase, student, gather_state(student))
            if phase is not phases[-1]:
                save.begin(phase.number + 1, 0)
                save.finish()
            engine.close()
        done += phase.steps
    return dict(state)


def build_student(beginning: Beginning, config: Config) -> Student:
    """An untrained module of the right shape for this rank, on its device."""
    world_size = torch.distributed.get_world_size()
    size = config.distill.expert_parallel_size or world_size
    if world_size % size:
        raise UserError(
            f"setting 'distill.expert_parallel_size' is {size}, which does not divide the {world_size} ranks; "
            "choose a divisor, or 0 for all of them"
        )
    student = Student(beginning.shape, beginning.experts_by_stage, size, config.seed)
    return student.to(device_of_rank())


def batch_loss(engine: PhaseEngine, batch: Batch, coefficient: float) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, squared errors [B, L], load-balancing loss): the mean of `loss` over ranks is the global loss."""
    actions, balance, gate = engine.forward(batch.observations, batch.task_vectors, batch.valid, batch.lift)
    errors = action_mean_error(actions, batch.teacher_mean, batch.valid)
    share = engine.world_size / batch.global_valid  # DeepSpeed averages over ranks, the loss over valid steps
    loss = errors.sum() * share + coefficient * balance
    newborns = len(engine.student.experts_by_stage[-1])  # none where nothing grows
    if batch.lift is not None and engine.student.shape.top_k and 0 < newborns < len(engine.student.expert_ids):
        # A hard gate learns from the error of the expert that it picked alone, and where a lifted expert has learnt to
        # serve a token there is no error left to tell the gate so: it is told who is to serve whom.
        born = gate[..., -newborns:].sum(dim=-1)
        right = torch.where(batch.lift[:, None, None], born, 1.0 - born).clamp_min(1e-6)
        wrong = -torch.where(batch.valid[:, :, None], right.log(), 0.0).mean(dim=2).sum() * share
        loss = loss + engine.settings.newborn_coefficient * wrong
    return loss, errors.detach(), balance.detach()


def newest_checkpoint(folder: Path) -> Path | None:
    """The furthest whole checkpoint: one without its index, which is written last, does not count."""
    found = [path for path in folder.glob("phase-*-step-*") if (path / "index.json").is_file()]
    return max(found, key=position_of, default=None)


def _newest_alone(folder: Path) -> Path | None:
    """The newest checkpoint, after what kills have left unfinished beside it is removed."""
    for orphan in folder.glob(".phase-*.tmp"):
        shutil.rmtree(orphan, ignore_errors=True)
    return newest_checkpoint(folder)


def position_of(checkpoint: Path) -> tuple[int, int]:
    """(phase, step) from the folder's name."""
    _, phase, _, step = checkpoint.name.split("-")
    return int(phase), int(step)


def _run_phase(
    engine: PhaseEngine,
    phase: Phase,
    start: int,
    offset: int,
    config: Config,
    batches: StageBatches,
    penalty: Penalty | None,
    metrics: MetricsLog | None,
    save: _Saver,
    name: str,
) -> None:
    progress = Progress(name, enabled=metrics is not None, folder=None if metrics is None else metrics.path.parent)
    for step in range(start, phase.steps):
        # the first step may have to wait for a rank that begins late
        seconds = COLLECTIVE_TIMEOUT_SECONDS if step == start else config.distill.patience_seconds
        with naming_lost_ranks(f"{name} phase {phase.number} step {step + 1}"), collective_timeout(seconds):
            save.if_due(phase.number, step)
            try:
                norm, record = _step(engine, phase, step, config, batches, penalty, name)
            except UserError:  # on all ranks: the step is not finite, but what is being saved is
                save.finish()
                raise
        if record is not None and metrics is not None:
            metrics.append(offset + step + 1, phase=phase.number, gradient_norm=norm, **record)
            progress.update(
                f"phase {phase.number} step {step + 1}/{phase.steps} loss {record['loss']:.5f}",
                last=step + 1 == phase.steps,
                phase=f"phase {phase.number}",
                step=step + 1,
                total=phase.steps,
                loss=record["loss"],
            )


def _step(
    engine: PhaseEngine,
    phase: Phase,
    step: int,
    config: Config,
    batches: StageBatches,
    penalty: Penalty | None,
    name: str,
) -> tuple[float, dict[str, float | None] | None]:
    """One gradient step: the gradient's norm, and every so often what is to be logged."""
    rank, settings = torch.distributed.get_rank(), config.distill
    batch = batches.batch(phase.number, step, rank, engine.world_size)
    if not phase.gate_learns:  # new experts must be given tokens only while the gate still learns to choose them
        batch = batch.without_lift()
    trained, reference = batch, None
    if settings.gradient_projection and batches.replayed:
        trained, replayed = batch.split(batches.rows[0])
        reference_loss, replay_errors, _ = batch_loss(engine, replayed, 0.0)
        reference = engine.gradients(reference_loss)
    loss, errors, balance = batch_loss(engine, trained, settings.load_balancing_coefficient)
    if reference is not None:
        errors = torch.cat([errors, replay_errors])
    if penalty is not None:
        loss = loss + settings.penalty_coefficient * penalty.loss(engine.student)
    try:
        norm = engine.step(loss, step, reference)
    except FloatingPointError as error:
        rows = (~errors.isfinite().all(dim=1)).nonzero().flatten().tolist()
        wrong = gather([batches.origins(phase.number, step, rank, engine.world_size)[row] for row in rows])
        named = [origin for part in wrong for origin in part]
        raise UserError(
            f"{name} phase {phase.number} step {step + 1}: {error}, so the step was not made; the last checkpoint "
            f"stands. The loss is not finite in {len(named)} of the batch's {batch.global_valid} rows"
            f"{': ' * bool(named)}{', '.join(named[:3])}{' ...' * (len(named) > 3)}. If 'hpc-cpd verify RUN' finds the "
            "data good, begin another run with a smaller distill.learning_rate"
        ) from None
    if (step + 1) % LOG_EVERY_STEPS and step + 1 < phase.steps:
        return norm, None
    return norm, _record(errors, balance, batch, engine.world_size)


def _record(errors: Tensor, balance: Tensor, batch: Batch, world_size: int) -> dict[str, float | None]:
    """Global means of one step, the same on every rank (a collective)."""
    new = batch.is_new_task[:, None] & batch.valid
    old = ~batch.is_new_task[:, None] & batch.valid
    zero = torch.zeros_like(errors)
    sums = torch.stack(
        [
            torch.where(new, errors, zero).sum(),
            new.sum().to(errors),
            torch.where(old, errors, zero).sum(),
            old.sum().to(errors),
            balance,
        ]
    )
    torch.distributed.all_reduce(sums)
    new_sum, new_count, old_sum, old_count, balance_sum = (float(value) for value in sums)
    return {
        "loss": (new_sum + old_sum) / (new_count + old_count),
        "new_loss": new_sum / new_count if new_count else None,
        "replay_loss": old_sum / old_count if old_count else None,
        "load_balancing_loss": balance_sum / world_size,
    }


class _Saver:
    """Decides with all ranks, at a step boundary, whether to save, and whether to stop after that."""

    def __init__(self, folder: Path, engine: PhaseEngine, due: SaveDue, stop: Callable[[], bool]) -> None:
        self.folder = folder
        self.engine = engine
        self.due = due
        self.stop = stop
        self.first_rank = torch.distributed.get_rank() == 0
        self.pending: PendingCheckpoint | None = None

    def if_due(self, phase: int, step: int) -> None:
        """Save the state before `step` when time is up or somebody asked to stop; raise StopRequested in that case.

        A checkpoint is written while training goes on, and published at a later step; at most one is under way.
        """
        due = self.first_rank and self.pending is None and self.due()
        writing = self.pending is not None and not self.pending.written()
        stopping, saving, waiting = all_ranks_max([float(self.stop()), float(due), float(writing)])
        if stopping or not waiting:
            self.finish()
        if stopping or saving:
            self.begin(phase, step)
        if stopping:
            self.finish()
            raise StopRequested(f"all ranks saved {self.folder} at phase {phase} step {step}; run it again to go on")

    def begin(self, phase: int, step: int) -> None:
        """Begin to write a checkpoint (a collective). A phase begins without moments."""
        target = self.folder / f"phase-{phase}-step-{step:08d}"
        with collective_timeout(COLLECTIVE_TIMEOUT_SECONDS):  # a shared disk may be slow
            if run_on_rank(lambda: not target.exists()):
                moments = self.engine.moments() if step else {}
                position = {"phase": phase, "step": step}
                self.pending = PendingCheckpoint(target, self.engine.student, moments, position)
        self.due.saved()

    def finish(self) -> None:
        """Publish the checkpoint that is under way, if one is (a collective), and drop the older ones."""
        if self.pending is None:
            return
        with collective_timeout(COLLECTIVE_TIMEOUT_SECONDS):
            self.pending.publish()
        if self.first_rank:
            for old in self.folder.glob("phase-*-step-*"):
                if position_of(old) < position_of(self.pending.folder):
                    shutil.rmtree(old, ignore_errors=True)
        self.pending = None
