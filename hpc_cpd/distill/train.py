"""Learning a stage: its phases, step after step, with checkpoints that lose nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hpc_cpd.distill.batches import Batch, StageBatches
from hpc_cpd.distill.engine import PhaseEngine
from hpc_cpd.distill.frozen import FrozenParts
from hpc_cpd.distributed.failures import collective_timeout, naming_lost_ranks
from hpc_cpd.distributed.torch import COLLECTIVE_TIMEOUT_SECONDS, all_ranks_max, device_of_rank, gather, run_on_rank
from hpc_cpd.errors import StopRequested, UserError
from hpc_cpd.losses import action_mean_error
from hpc_cpd.methods.base import Method, Phase, Stage, phases_of
from hpc_cpd.progress import Progress
from hpc_cpd.run.metrics_log import MetricsLog
from hpc_cpd.run.save_due import SaveDue
from hpc_cpd.settings import Config
from hpc_cpd.student.checkpoint import INDEX_FILE, Moments, PendingCheckpoint, gather_state, load_checkpoint
from hpc_cpd.student.network import Student
from hpc_cpd.student.policy import JSON_FILE, StudentParts

LOG_EVERY_STEPS = 50
Record = dict[str, float | None]


def train_phases(
    stage: Stage, method: Method, phases: Sequence[Phase], start: StudentParts, batches: StageBatches
) -> dict[str, Tensor]:
    """Run consecutive `phases` of `stage` and return the canonical state the student ends with, on every rank.

    Goes on from the newest of the stage's checkpoints, on any number of ranks. Raises StopRequested once all ranks
    agreed to stop and saved together.
    """
    config, folder = stage.config, stage.run.stage(stage.number)
    checkpoints = folder / "checkpoints"
    newest = run_on_rank(lambda: _newest_alone(checkpoints))
    reached, first_step = position_of(newest) if newest is not None else (0, 0)
    if reached < phases[0].number:
        newest, reached, first_step = None, phases[0].number, 0
    done = sum(phase.steps for phase in phases_of(method, stage.number) if phase.number < reached)
    metrics = MetricsLog(folder / "metrics.jsonl", done + first_step) if torch.distributed.get_rank() == 0 else None

    frozen = None
    if batches.data.past is not None:
        steps = sum(phase.steps for phase in phases)
        frozen = FrozenParts(batches.data, steps, folder / "frozen", config.distill.in_memory_gigabytes)
    state: Mapping[str, Tensor] = start.state
    new_experts = [expert for born in start.experts_by_stage[stage.number - 1 :] for expert in born]
    for phase in [phase for phase in phases if phase.number >= reached]:
        student = Student(start.shape, start.experts_by_stage, expert_parallel_size(config), config.seed)
        state = method.adapt(student.to(device_of_rank()), state)
        student.load_canonical(state)
        moments: Moments = {}
        if newest is not None and phase.number == reached:
            _, moments, kept = load_checkpoint(newest, student)
            method.load_state_dict(kept)
        fixed = method.freeze(student, phase, new_experts)
        batches.begin_phase(phase.number, phase.steps, frozen if frozen is not None and frozen.serve(student) else None)
        engine = PhaseEngine(student, config.distill, phase.steps, method)
        engine.restore(moments)
        engine.hold(fixed)
        save = _Saver(checkpoints, engine, SaveDue(stage.run, config.checkpoint_every_seconds), stage.stop)
        _run_phase(stage, phase, range(first_step, phase.steps), done, batches, metrics, save)
        save.finish()
        state = method.end_phase(phase, student, gather_state(student))
        if phase is not phases[-1]:
            save.begin(phase.number + 1, 0)
            save.finish()
        engine.close()
        done, first_step = done + phase.steps, 0
    batches.begin_phase(0, 0, None)
    if frozen is not None:
        frozen.close()
    return dict(state)


def expert_parallel_size(config: Config) -> int:
    """How many ranks share one set of experts. Raises UserError where that does not divide the ranks."""
    world_size = torch.distributed.get_world_size()
    size = config.distill.expert_parallel_size or world_size
    if world_size % size:
        raise UserError(
            f"setting 'distill.expert_parallel_size' is {size}, which does not divide the {world_size} ranks; "
            "choose a divisor, or 0 for all of them"
        )
    return size


def batch_loss(
    engine: PhaseEngine, batch: Batch, load_balancing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """(loss, squared errors [B, L], load-balancing loss, gate probabilities [B, L, M, E], share).

    The mean of the loss over ranks is the loss of the batch of all ranks; so is that of `share` times a sum over rows.
    """
    inputs = batch.observations, batch.task_vectors, batch.valid, batch.override
    actions, balance, gate = engine.forward(*inputs, precomputed=batch.precomputed)
    errors = action_mean_error(actions, batch.target, batch.valid)
    share = engine.world_size / batch.rows_of_all_ranks  # DeepSpeed averages over ranks, the loss over valid steps
    return errors.sum() * share + load_balancing * balance, errors.detach(), balance.detach(), gate, share


def newest_checkpoint(folder: Path) -> Path | None:
    """The furthest whole checkpoint: one without its index, which is written last, does not count."""
    found = [path for path in folder.glob("phase-*-step-*") if (path / INDEX_FILE).is_file()]
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
    stage: Stage, phase: Phase, steps: range, done: int, batches: StageBatches, metrics: MetricsLog | None, save: _Saver
) -> None:
    """Make `steps` of `phase`; `done`: the steps of the phases before it."""
    name, patience = f"stage {stage.number}", COLLECTIVE_TIMEOUT_SECONDS
    progress = Progress(name, enabled=metrics is not None, folder=stage.run.stage(stage.number))
    for step in steps:
        with naming_lost_ranks(f"{name} phase {phase.number} step {step + 1}"), collective_timeout(patience):
            save.if_due(phase.number, step)
            try:
                record = _step(save.engine, phase, step, batches, name)
            except UserError:  # on all ranks: the step is not finite, but what is being saved is
                save.finish()
                raise
        patience = stage.config.distill.collective_timeout_seconds  # the first waits for a rank that begins late
        if record is not None and metrics is not None:
            metrics.append(done + step + 1, phase=phase.number, **record)
            place, last = f"phase {phase.number}", step + 1 == phase.steps
            text = f"{place} step {step + 1}/{phase.steps} loss {record['loss']:.5f}"
            progress.update(text, last, place, step + 1, phase.steps, record["loss"])


def _step(engine: PhaseEngine, phase: Phase, step: int, batches: StageBatches, name: str) -> Record | None:
    """One gradient step; every so often what is to be logged of it."""
    batch = batches.batch(phase.number, step, torch.distributed.get_rank(), engine.world_size)
    if not phase.gate_learns:  # new experts must be given tokens only while the gate still learns to choose them
        batch = replace(batch, override=None)
    trained, referred = engine.method.split(batch)
    reference = None
    if referred is not None:
        reference_loss, reference_errors, *_ = batch_loss(engine, referred, 0.0)
        reference = engine.gradients(reference_loss)
    loss, errors, balance, gate, share = batch_loss(engine, trained, engine.settings.load_balancing_coefficient)
    if referred is not None:
        errors = torch.cat([errors, reference_errors])
    extra = engine.method.extra_loss(engine.student, trained, gate, share)
    try:
        norm = engine.step(loss if extra is None else loss + extra, step, reference)
    except FloatingPointError as error:
        rows = (~errors.isfinite().all(dim=1)).nonzero().flatten().tolist()
        named = [origin for part in gather(batch.describe(rows)) for origin in part]
        raise UserError(
            f"{name} phase {phase.number} step {step + 1}: {error}, so the step was not made; the last checkpoint "
            f"stands. The loss is not finite in {len(named)} of the batch's {batch.rows_of_all_ranks} rows"
            f"{': ' * bool(named)}{', '.join(named[:3])}{' ...' * (len(named) > 3)}. If 'hpc-cpd verify RUN' finds the "
            "data good, begin another run with a smaller distill.learning_rate"
        ) from None
    if (step + 1) % LOG_EVERY_STEPS and step + 1 < engine.total_steps:
        return None
    return {"gradient_norm": norm} | _record(errors, balance, batch)


def _record(errors: Tensor, balance: Tensor, batch: Batch) -> Record:
    """Global means of one step, the same on every rank (a collective)."""
    new, old = (rows[:, None] & batch.valid for rows in (batch.is_new_task, ~batch.is_new_task))
    sums = [torch.where(mask, errors, 0.0).sum() for mask in (new, old)]
    totals = torch.stack([*sums, new.sum().to(errors), old.sum().to(errors), balance])
    torch.distributed.all_reduce(totals)
    new_sum, old_sum, new_count, old_count, balance_sum = totals.tolist()
    return {
        "loss": (new_sum + old_sum) / (new_count + old_count),
        "new_loss": new_sum / new_count if new_count else None,
        "replay_loss": old_sum / old_count if old_count else None,
        "load_balancing_loss": balance_sum / torch.distributed.get_world_size(),
    }


@dataclass
class _Saver:
    """Decides with all ranks, at a step boundary, whether to save, and whether to stop after that."""

    folder: Path
    engine: PhaseEngine
    due: SaveDue
    stop: Callable[[], bool]
    pending: PendingCheckpoint | None = None

    def if_due(self, phase: int, step: int) -> None:
        """Save the state before `step` when time is up or somebody asked to stop; raise StopRequested in that case.

        A checkpoint is written while training goes on, and published at a later step; at most one is under way.
        """
        due = torch.distributed.get_rank() == 0 and self.pending is None and self.due()
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
                moments, position = self.engine.moments() if step else {}, {"phase": phase, "step": step}
                kept = self.engine.method.state_dict()
                earlier = [self.folder.parent / "start" / JSON_FILE, *self.folder.glob(f"phase-*/{INDEX_FILE}")]
                self.pending = PendingCheckpoint(target, self.engine.student, moments, position, kept, earlier)
        self.due.saved()

    def finish(self) -> None:
        """Publish the checkpoint that is under way, if one is (a collective), and drop the older ones."""
        if self.pending is None:
            return
        with collective_timeout(COLLECTIVE_TIMEOUT_SECONDS):
            self.pending.publish()
        if torch.distributed.get_rank() == 0:
            for old in self.folder.glob("phase-*-step-*"):
                if position_of(old) < position_of(self.pending.folder):
                    shutil.rmtree(old, ignore_errors=True)
        self.pending = None
