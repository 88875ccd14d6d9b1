"""What a teacher leaves behind: its trajectories, recorded with action noise, in shards that are never half written."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hpc_cpd.distributed.mpi import CheckpointBoundary, Communicator
from hpc_cpd.errors import UserError
from hpc_cpd.progress import Progress
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done, mark_done, sha256
from hpc_cpd.run.save_due import SaveDue
from hpc_cpd.tasks.batch import BatchEnv
from hpc_cpd.tasks.registry import make_batch
from hpc_cpd.teachers.publish import Teacher
from hpc_cpd.teachers.rollouts import BLOCK, AttemptPlan, keep_successes, play_block
from hpc_cpd.teachers.sources.student import load_any_teacher, weights_of
from hpc_cpd.trajectories.schema import Episode
from hpc_cpd.trajectories.shard import ShardWriter, closed_shards, load_shard, next_part, write_manifest


class TeacherActor:
    """A teacher as the actor of attempts."""

    def __init__(self, policy: Teacher) -> None:
        self.policy = policy

    def begin(self, rows: int) -> None:
        self.policy.reset(self.policy.task_id, rows)

    def means(self, observations: NDArray[np.float32], active: NDArray[np.bool_]) -> NDArray[np.float32]:
        return self.policy.act(observations)


def collect_trajectories(run: Run, task_id: str, communicator: Communicator, stop: Callable[[], bool]) -> None:
    """Record the trajectories of the published teacher of `task_id`; return at once when they are published.

    All ranks call it together; which episodes are kept does not depend on how many they are. Resumes
    after the shards that are closed. Raises StopRequested after closing the shards when `stop()` is true on
    any rank, and UserError: no teacher, shards of another teacher, or no success in all attempts.
    """
    folder = run.trajectories(task_id)
    if communicator.on_root(lambda: is_done(folder)):
        return
    config = run.config()
    settings = config.trajectories
    policy, teacher = communicator.on_root(
        lambda: (load_any_teacher(run.teacher(task_id), task_id), sha256(weights_of(run.teacher(task_id))))
    )
    stored = communicator.on_root(lambda: _stored(run, task_id, teacher, config.seed))
    envs = make_batch(task_id, BLOCK, config.seed)
    shards = _Shards(envs, run, communicator, teacher)
    due = SaveDue(run, config.checkpoint_every_seconds)
    boundary = CheckpointBoundary(communicator, stop, due, f"the trajectories of {task_id}")
    progress = Progress(f"trajectories {task_id}", enabled=communicator.rank == 0, folder=run.teacher(task_id))
    plan = AttemptPlan(config.seed, task_id, "trajectory", settings.action_noise, settings.steps_after_success)

    def keep(episodes: list[Episode]) -> None:
        shards.add(episodes)
        progress.update(f"rank 0 recorded {shards.added} episodes")
        boundary(shards.close)

    actor = TeacherActor(policy)
    kept, attempts = keep_successes(
        settings.episodes,
        settings.episodes * settings.max_attempts_factor,
        settings.success_only,
        lambda block: play_block(envs, actor, plan, block),
        keep,
        stored,
        communicator,
    )
    if kept == 0:
        raise UserError(
            f"the teacher of {task_id} never succeeded in {attempts} attempts, so there is nothing to learn from; "
            "train it longer (teachers.ppo.iterations) or set trajectories.success_only=false, in another run (--run), "
            "or do without the task (--allow-missing)"
        )
    shards.close()
    communicator.any(False)  # every rank has closed its shards

    def publish() -> None:
        manifest = write_manifest(
            folder,
            teacher_sha256=teacher,
            seed=config.seed,
            wanted=settings.episodes,
            attempts=attempts,
            complete=kept == settings.episodes,
        )
        mark_done(folder, {key: manifest[key] for key in ("episodes", "steps", "success", "attempts", "complete")})

    communicator.on_root(publish)
    progress.update(f"published {kept} of {settings.episodes} episodes from {attempts} attempts", last=True)


class _Shards:
    """This rank's open shard; closed when full, and whenever work may stop."""

    def __init__(self, envs: BatchEnv, run: Run, communicator: Communicator, teacher: str) -> None:
        config = run.config()
        self.folder = run.trajectories(envs.task.task_id)
        self.rank = communicator.rank
        self.episodes_per_shard = config.trajectories.episodes_per_shard
        self.added = 0
        self._make = lambda part: ShardWriter(
            self.folder,
            self.rank,
            part,
            envs.task.task_id,
            teacher,
            config.seed,
            envs.task.reward_version,
            envs.task.environment_version,
        )
        self._writer: ShardWriter | None = None

    def add(self, episodes: list[Episode]) -> None:
        """Take the kept episodes of one block. A block never spans two shards: all of it is on disk, or nothing."""
        for episode in episodes:
            if self._writer is None:
                self._writer = self._make(next_part(self.folder, self.rank))
            self._writer.add(episode)
            self.added += 1
        if self._writer is not None and len(self._writer) >= self.episodes_per_shard:
            self.close()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _stored(run: Run, task_id: str, teacher: str, seed: int) -> set[int]:
    """The attempts in closed shards. Raises UserError when another teacher recorded them."""
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
