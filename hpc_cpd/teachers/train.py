"""Making one teacher, top to bottom: demonstrations, cloning, PPO, the best evaluated policy published.

Everything is a pure function of the settings, the seed, the task and the number of ranks; a run that was
killed goes on from its last checkpoint and leaves the same bits.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_cpd.distributed.mpi import CheckpointBoundary, Communicator
from hpc_cpd.evaluation.episodes import task_record
from hpc_cpd.optimizers import Adam
from hpc_cpd.progress import Progress
from hpc_cpd.run.metrics_log import MetricsLog
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done
from hpc_cpd.run.save_due import SaveDue
from hpc_cpd.settings import Config
from hpc_cpd.tasks.batch import BatchEnv
from hpc_cpd.tasks.registry import TaskSpec, describe, make_batch
from hpc_cpd.teachers.algorithms.ppo import (
    adapted_step_size,
    collect_rollout,
    environments_of,
    update,
    update_normaliser,
)
from hpc_cpd.teachers.bounds import bounded_errors
from hpc_cpd.teachers.checkpoint import Checkpoint, adam_tensors, load_checkpoint, restore_adam, save_checkpoint
from hpc_cpd.teachers.policy import SMALLEST_STD, TeacherPolicy
from hpc_cpd.teachers.publish import Evaluate, evaluate_together, publish_teacher
from hpc_cpd.teachers.seeds import generator
from hpc_cpd.teachers.sources.student import take_from_student
from hpc_cpd.teachers.sources.zoo import take_from_zoo
from hpc_cpd.teachers.starts.demonstrations import Demonstrations, read_demonstrations, record_demonstrations
from hpc_cpd.teachers.validation import require_teacher

CLONE_STEPS_BETWEEN_BOUNDARIES = 20
CLONE_LOG_EVERY = 50
ITERATIONS_PER_GOAL_SET = 20
"""A seed has 50 goals; PPO moves on to those of another seed, so that it learns the task and not its goals."""
NORMALISER_STEPS = 100
"""From scratch, steps of the untrained policy that give the normaliser its first statistics."""


def train_teacher(
    run: Run, task_id: str, communicator: Communicator, evaluate: Evaluate, stop: Callable[[], bool]
) -> None:
    """Make and publish the teacher of `task_id`; return at once when it is published already.

    All ranks call it together. Raises StopRequested after saving when `stop()` is true on any rank, and
    UserError for a task without demonstrations, or with more ranks than environments.
    """
    folder = run.teacher(task_id)
    if communicator.on_root(lambda: is_done(folder)):
        communicator.on_root(lambda: shutil.rmtree(folder / "checkpoints", ignore_errors=True))
        return
    source = run.config().teachers.source
    if source != "train":
        take = take_from_zoo if source == "zoo" else take_from_student
        take(run, task_id, communicator, evaluate)
        return
    training = _Training(run, task_id, communicator, evaluate, stop)
    training.resume_or_begin()
    training.clone()
    training.improve()
    training.publish()


@dataclass
class _State:
    """Everything a checkpoint holds besides tensors; plain JSON values."""

    step: int = 0
    """Cloning steps plus PPO iterations: the `step` of metrics.jsonl."""
    phase: str = "clone"
    """clone, improve or finished"""
    clone_step: int = 0
    iteration: int = 0
    environment_steps: int = 0
    step_size: float = 0.0
    """Of the policy and the critic, when it follows the divergence."""
    streak: int = 0
    """Evaluations in a row that reached target_success."""
    best: dict[str, Any] | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


class _Training:
    """The state of `train_teacher`, identical on every rank."""

    def __init__(
        self, run: Run, task_id: str, communicator: Communicator, evaluate: Evaluate, stop: Callable[[], bool]
    ) -> None:
        self.run = run
        self.config: Config = run.config()
        self.settings = self.config.teachers
        self.folder: Path = run.teacher(task_id)
        self.task: TaskSpec = describe(task_id)
        self.communicator = communicator
        self.evaluate = evaluate
        self.warm = self.settings.start == "demonstrations"
        due = SaveDue(run, self.config.checkpoint_every_seconds)
        self.boundary = CheckpointBoundary(communicator, stop, due, what=f"the teacher of {task_id}")
        self.progress = Progress(f"teacher {task_id}", enabled=communicator.rank == 0, folder=run.teacher(task_id))
        self.log: MetricsLog | None = None
        self.state = _State()
        self.best: dict[str, Tensor] = {}
        self.policy = TeacherPolicy(
            task_id,
            self.task.observation_size,
            self.task.action_size,
            self.settings.hidden,
            "relu" if self.warm else "tanh",  # measured: ReLU clones better, tanh explores better
            self.settings.ppo.warm_log_std if self.warm else self.settings.ppo.initial_log_std,
            generator(self.config.seed, task_id, "weights"),
            SMALLEST_STD if self.warm else self.settings.ppo.smallest_std,
        )
        self.optimizer = self._new_optimizer()
        self._began = time.monotonic()
        require_teacher(task_id, self.settings, communicator.size)

    def resume_or_begin(self) -> None:
        """Take up the newest checkpoint, or start from the beginning."""
        found = self.communicator.on_root(lambda: load_checkpoint(self.folder / "checkpoints"))
        if found is None:
            self.state.phase = "clone" if self.warm else "improve"
            self.state.step_size = self.settings.ppo.learning_rate
            self.communicator.broadcast_parameters(self.policy.parameters())
        else:
            values = {name: found.state[name] for name in asdict(self.state)}
            self.state = _State(**values)
            groups: dict[str, dict[str, Tensor]] = {"policy": {}, "adam": {}, "best": {}}
            for name, tensor in found.tensors.items():
                group, _, rest = name.partition("/")
                groups[group][rest] = tensor
            self.policy.set_tensors(groups["policy"])
            self.optimizer = self._new_optimizer()
            restore_adam(self.optimizer, self.policy, groups["adam"])
            if not self.warm:
                self._set_step_size()
            self.best = groups["best"]
            if self.communicator.rank == 0:
                self.progress.update(f"goes on after step {self.state.step}")
        if self.communicator.rank == 0:
            self.log = MetricsLog(self.folder / "metrics.jsonl", self.state.step)

    def clone(self) -> None:
        """Behavioural cloning of the demonstrations (mean squared error, cosine step size)."""
        state, settings = self.state, self.settings.demonstrations
        if state.phase != "clone":
            return
        data = self._demonstrations()
        if state.clone_step == 0:
            samples = data.observations.astype(np.float64)
            # frozen from here on: a moving normaliser would move the cloned policy
            self.policy.set_normaliser(samples.mean(axis=0), samples.var(axis=0), len(samples))
        observations, targets = torch.tensor(data.observations), torch.tensor(data.targets)
        parameters = list(self.policy.actor.parameters())
        part = slice(*(settings.batch_size * (self.communicator.rank + k) // self.communicator.size for k in (0, 1)))
        summed, scale = 0.0, 1.0 / (settings.batch_size * self.task.action_size)
        while state.clone_step < settings.gradient_steps:
            rows = generator(self.config.seed, self.task.task_id, "clone", state.clone_step).integers(
                len(observations), size=settings.batch_size
            )
            mine = torch.tensor(rows[part])
            rate = 0.5 * (1.0 + math.cos(math.pi * state.clone_step / settings.gradient_steps))
            for group in self.optimizer.param_groups:
                group["lr"] = settings.learning_rate * rate
            self.optimizer.zero_grad(set_to_none=True)
            loss = bounded_errors(self.policy.action_mean(observations[mine]), targets[mine]).square().sum() * scale
            loss.backward()
            summed = self.communicator.sum_gradients(parameters, [loss])[0]
            self.optimizer.step()
            state.clone_step += 1
            state.step += 1
            last = state.clone_step == settings.gradient_steps
            if state.clone_step % CLONE_LOG_EVERY == 0 or last:
                self._log(phase="clone", loss=summed)
                at = f"{state.clone_step}/{settings.gradient_steps}"
                self.progress.update(
                    f"cloning {at}, loss {summed:.4f}",
                    phase="cloning",
                    step=state.clone_step,
                    total=settings.gradient_steps,
                    loss=summed,
                )
            if last:
                state.phase = "improve"
                self.optimizer = self._new_optimizer()
                self._consider()
                if state.streak == 1:  # a clone may be good already: other goals say so before PPO spends its time
                    self._consider(goals=2)
            if state.clone_step % CLONE_STEPS_BETWEEN_BOUNDARIES == 0 or last:
                self.boundary(self._save)

    def improve(self) -> None:
        """PPO until the target is reached twice in a row, or the iterations are used up."""
        state, settings = self.state, self.settings.ppo
        if state.phase != "improve":
            return
        if not self._satisfied() and state.iteration < settings.iterations:
            numbers = environments_of(settings, self.communicator)
            envs, goal_set = self._environments(len(numbers)), self._goal_set
            if state.iteration == 0 and not self.warm:
                first = collect_rollout(
                    envs, self.policy, settings, self.config.seed, 0, numbers.start, steps=NORMALISER_STEPS
                )
                update_normaliser(self.policy, first.observations, self.communicator)
            while not self._satisfied() and state.iteration < settings.iterations:
                if goal_set != self._goal_set:
                    envs.close()
                    envs, goal_set = self._environments(len(numbers)), self._goal_set
                rollout = collect_rollout(
                    envs, self.policy, settings, self.config.seed, 1 + state.iteration, numbers.start
                )
                fits_critic = self.warm and state.iteration < settings.warm_value_iterations
                measured = update(
                    self.policy,
                    self.optimizer,
                    rollout,
                    settings,
                    self.config.seed,
                    state.iteration,
                    self.communicator,
                    train_actor=not fits_critic,
                )
                if not self.warm:
                    update_normaliser(self.policy, rollout.observations, self.communicator)
                    if settings.desired_kl is not None:
                        state.step_size = adapted_step_size(state.step_size, measured["kl_met"], settings.desired_kl)
                        self._set_step_size()
                state.iteration += 1
                state.step += 1
                state.environment_steps += settings.num_envs * settings.rollout_steps
                sums = self.communicator.sum(
                    np.array([rollout.mean_return * len(numbers), rollout.successes, rollout.episodes], np.float64)
                )
                measured |= {
                    "mean_return": float(sums[0] / settings.num_envs),
                    "success": float(sums[1] / sums[2]),
                    "std": float(self.policy.log_std.detach().exp().mean()),
                }
                self._log(phase="improve", **measured)
                self.progress.update(
                    f"PPO {state.iteration}/{settings.iterations}, success {measured['success']:.2f} with noise, "
                    f"return {measured['mean_return']:.0f}",
                    phase="PPO",
                    step=state.iteration,
                    total=settings.iterations,
                )
                last = state.iteration == settings.iterations
                if last or state.iteration % self.settings.evaluate_every_iterations == 0:
                    self._consider(goals=1 + state.streak)
                self.boundary(self._save)
            envs.close()
        state.phase = "finished"

    def publish(self) -> None:
        """Write the best policy, its evaluation on the goals of the final comparison, and DONE."""
        if not self.best:
            self._consider()  # neither cloned nor trained: nothing else was evaluated
        self.policy.set_tensors(self.best)
        provenance = {
            "seed": self.config.seed,
            "start": self.settings.start,
            "ranks": self.communicator.size,
            "best": self.state.best,
            "reward_version": self.task.reward_version,
            "environment_version": self.task.environment_version,
            "versions": {name: metadata.version(name) for name in ("torch", "numpy")},
        }
        successes = publish_teacher(
            self.run,
            self.policy,
            self.communicator,
            self.evaluate,
            provenance,
            environment_steps=self.state.environment_steps,
            seconds=self._seconds,
            while_training=self.state.evaluations,
        )
        self.communicator.on_root(lambda: shutil.rmtree(self.folder / "checkpoints", ignore_errors=True))
        self.progress.update(f"published, success {successes} after {self._seconds():.0f} s", last=True)

    def _demonstrations(self) -> Demonstrations:
        settings = self.settings.demonstrations
        if settings.folder is not None:
            return read_demonstrations(self.task, Path(settings.folder), self.communicator)
        self.progress.update(f"recording {settings.episodes} demonstrations")
        return record_demonstrations(self.task, settings, self.config.seed, self.communicator)

    @property
    def _goal_set(self) -> int:
        return self.state.iteration // ITERATIONS_PER_GOAL_SET

    def _environments(self, count: int) -> BatchEnv:
        """`count` environments with the goals of this iteration."""
        task_id = self.task.task_id
        seed = int(generator(self.config.seed, task_id, "goals", self._goal_set).integers(2**31))
        return make_batch(task_id, count, seed)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        rules = self.settings.ppo
        actor = [*self.policy.actor.parameters(), self.policy.log_std]
        groups = [
            {"params": actor, "lr": rules.warm_learning_rate if self.warm else rules.learning_rate},
            {"params": list(self.policy.critic.parameters()), "lr": rules.learning_rate},
        ]
        return Adam(groups, eps=1e-5, fused=True)  # fused: all weights in one pass, a third of the time

    def _set_step_size(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.state.step_size

    def _consider(self, goals: int = 1) -> None:
        """Evaluate the policy as it stands, and remember it if it is better than every one before."""
        state = self.state
        # other goals than those of the final comparison: choosing on them would flatter the teacher. A second success
        # in a row must be one on yet other goals
        episodes, seed = self.settings.evaluation_episodes, self.config.evaluation.seed + goals
        results = evaluate_together(self.evaluate, self.policy, episodes, seed, self.communicator)
        record = {"step": state.step, "environment_steps": state.environment_steps, **task_record(results)}
        rate = record["successes"] / record["episodes"]
        state.streak = state.streak + 1 if rate >= self.settings.target_success else 0
        state.evaluations.append(record)
        if state.best is None or _score(record) > _score(state.best):
            state.best = record
            self.best = self.policy.tensors()
        self._log(phase="evaluation", success=rate, mean_return=record["mean_return"])
        self.progress.update(f"evaluated, success {record['successes']}/{record['episodes']}", last=True)

    def _satisfied(self) -> bool:
        return self.state.streak >= 2

    def _log(self, **values: Any) -> None:
        if self.log is not None:
            self.log.append(self.state.step, environment_steps=self.state.environment_steps, **values)

    def _seconds(self) -> float:
        return self.state.seconds + time.monotonic() - self._began

    def _save(self) -> None:
        def write() -> None:
            tensors = {f"policy/{name}": value for name, value in self.policy.tensors().items()}
            tensors |= {f"adam/{name}": value for name, value in adam_tensors(self.optimizer, self.policy).items()}
            tensors |= {f"best/{name}": value for name, value in self.best.items()}
            state = {**asdict(self.state), "seconds": self._seconds()}
            save_checkpoint(self.folder / "checkpoints", self.state.step, Checkpoint(tensors, state))

        self.communicator.on_root(write)


def _score(record: dict[str, Any]) -> tuple[float, float]:
    """More successes are better; where none succeeded, more reward. Equal scores keep the earlier policy.

    Between successful policies reward says nothing: an evaluated episode ends at its first success.
    """
    return record["successes"], record["mean_return"] if record["successes"] == 0 else 0.0
