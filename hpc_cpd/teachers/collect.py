"""What a teacher leaves behind: its trajectories, recorded with action noise, in shards that are never half written."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from hpc_cpd.distributed.mpi import CheckpointBoundary, Communicator
from hpc_cpd.distributed.outcome import run_on_all_ranks
from hpc_cpd.errors import UserError
from hpc_cpd.progress import Progress
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done, mark_done, sha256
from hpc_cpd.run.save_due import SaveDue
from hpc_cpd.tasks.registry import describe, make_batch
from hpc_cpd.teachers.rollouts import BLOCK, EpisodePlan, keep_successes, play_block
from hpc_cpd.teachers.sources.student import load_any_teacher, weights_of
from hpc_cpd.trajectories.schema import Episode, Origin
from hpc_cpd.trajectories.shard import closed_shards, load_shard, next_part, write_manifest, write_shard


def collect_trajectories(run: Run, task_id: str, communicator: Communicator, stop: Callable[[], bool]) -> None:
    """Record the trajectories of the published teacher of `task_id`; return at once when they are published.

    All ranks call it together; which episodes are kept does not depend on how many they are. Resumes
    after the shards that are closed. Raises StopRequested after closing the shards when `stop()` is true on
    any rank, and UserError: no teacher, shards of another teacher, or no success in all episodes.
    """
    folder, config = run.trajectories(task_id), run.config()
    if communicator.on_root(lambda: is_done(folder)):
        return
    settings, spec = config.trajectories, describe(task_id)
    policy = run_on_all_ranks(communicator, lambda: load_any_teacher(run.teacher(task_id)))
    teacher = communicator.on_root(lambda: sha256(weights_of(run.teacher(task_id))))
    stored = communicator.on_root(lambda: _stored(run, task_id, teacher, config.seed))
    envs = make_batch(task_id, BLOCK, config.seed)
    origin = Origin(task_id, teacher, config.seed, spec.reward_version, spec.environment_version)
    held: list[Episode] = []
    due = SaveDue(run, config.checkpoint_every_seconds)
    boundary = CheckpointBoundary(communicator, stop, due, f"the trajectories of {task_id}")
    progress = Progress(f"trajectories {task_id}", enabled=communicator.rank == 0, folder=run.teacher(task_id))
    tell = partial(progress.update, phase="recording", total=settings.episodes, counted="episodes")
    plan = EpisodePlan(config.seed, task_id, "trajectory", settings.action_noise, settings.steps_after_success)

    def close() -> None:
        """Write what this rank holds as one shard."""
        write_shard(folder, communicator.rank, next_part(folder, communicator.rank), origin, held)
        held.clear()

    def keep(episodes: list[Episode], kept: int) -> None:
        held.extend(episodes)
        if len(held) >= settings.episodes_per_shard:  # a block never spans two shards: all of it is on disk, or nothing
            close()
        tell(f"recorded {kept}/{settings.episodes} episodes", step=kept)
        boundary(close)

    wanted, play = settings.episodes, partial(play_block, envs, policy, plan)
    limit = wanted * settings.max_attempts_factor
    kept, played = keep_successes(wanted, limit, settings.success_only, play, keep, stored, communicator)
    if kept == 0:
        raise UserError(
            f"the teacher of {task_id} never succeeded in {played} episodes, so there is nothing to learn from; "
            "train it longer (teachers.algorithm) or set trajectories.success_only=false, in another run (--run), "
            "or do without the task (--allow-missing)"
        )
    close()
    communicator.any(False)  # every rank has closed its shards

    def publish() -> None:
        counts = {"wanted": wanted, "attempts": played, "complete": kept == wanted}
        manifest = write_manifest(folder, teacher_sha256=teacher, seed=config.seed, **counts)
        mark_done(folder, {key: manifest[key] for key in ("episodes", "steps", "success", "attempts", "complete")})

    communicator.on_root(publish)
    tell(f"published {kept} of {wanted} episodes from {played} that were played", last=True, step=kept)


def _stored(run: Run, task_id: str, teacher: str, seed: int) -> set[int]:
    """The numbers of the episodes in closed shards. Raises UserError when another teacher recorded them."""
    folder = run.trajectories(task_id)
    stored: set[int] = set()
    for path in closed_shards(folder):
        origin, episodes = load_shard(path, task_id)
        if (origin.teacher_sha256, origin.seed) != (teacher, seed):
            raise UserError(
                f"{path} was recorded by another teacher than {run.teacher(task_id)}; delete {folder} and run "
                f"python -m hpc_cpd.launch --stage teachers --run {run.folder}"
            )
        stored.update(episode.index for episode in episodes)
    return stored
