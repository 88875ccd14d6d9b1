"""The training of one PPO teacher: rollouts, losses, gradient steps, and the statistics of the observations.

Every iteration starts from fresh episodes whose goals and noise are pure functions of (seed, task,
iteration, environment number), so a resumed run needs no state of the simulator.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial, reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.spaces import flatdim
from numpy.typing import NDArray
from torch import Tensor

from hpc_cpd.distributed.mpi import Communicator
from hpc_cpd.optimizers import Adam
from hpc_cpd.tasks.batch import UNBOUNDED_GOALS, BatchEnv
from hpc_cpd.teachers.algorithms.base import Hints, RoundResult, TeacherContext
from hpc_cpd.teachers.algorithms.ppo import PPOSettings
from hpc_cpd.teachers.checkpoint import adam_tensors, restore_adam
from hpc_cpd.teachers.policy import TeacherPolicy
from hpc_cpd.teachers.rollouts import TrainingEnvironments, generator

NORMALISER_STEPS = 100
"""Steps of the untrained policy that give the normaliser its first statistics."""
SMALLEST_LEARNING_RATE, LARGEST_LEARNING_RATE = 5e-5, 3e-3

Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]


class PPOLearner:
    """See `hpc_cpd.teachers.algorithms.base.Learner`."""

    def __init__(self, settings: PPOSettings, hints: Hints, context: TeacherContext) -> None:
        task = context.task
        self.settings, self.hints = settings, hints
        self.seed, self.communicator = context.seed, context.communicator
        self.rounds = settings.iterations
        sizes = flatdim(task.observation_space), flatdim(task.action_space), settings.hidden
        weights = generator(self.seed, task.task_id, "weights")
        self.policy = TeacherPolicy(
            task.task_id, *sizes, hints.activation, hints.initial_log_std, weights, smallest_std=hints.smallest_std
        )
        actor, critic = [*self.policy.actor.parameters(), self.policy.log_std], [*self.policy.critic.parameters()]
        rate = settings.learning_rate
        groups = [{"params": actor, "lr": hints.policy_learning_rate or rate}, {"params": critic, "lr": rate}]
        self.optimizer: torch.optim.Optimizer = Adam(groups, eps=1e-5, fused=True)  # all weights in one pass
        self._numbers = self.communicator.local_range(settings.num_envs)
        self._environments = TrainingEnvironments(task.task_id, self.seed, len(self._numbers))

    def collect(self, number: int) -> Rollout:
        envs, first = self._environments.of_round(number), self._numbers.start
        play = partial(collect_rollout, envs, self.policy, self.settings, self.seed, first_environment=first)
        if number == 0 and not self.hints.freeze_normaliser:
            before = play(iteration=0, steps=NORMALISER_STEPS)
            update_normaliser(self.policy, before.observations, self.communicator)
        return play(iteration=1 + number)

    def update(self, number: int, experience: Rollout) -> RoundResult:
        settings, both = self.settings, number >= self.hints.critic_only_rounds
        measured = update(
            self.policy, self.optimizer, experience, settings, self.seed, number, self.communicator, train_actor=both
        )
        if not self.hints.freeze_normaliser:
            update_normaliser(self.policy, experience.observations, self.communicator)
        if self.hints.desired_kl is not None:
            learning_rate = self.optimizer.param_groups[-1]["lr"]
            self._set_learning_rate(adapted_learning_rate(learning_rate, measured["kl_met"], self.hints.desired_kl))
        mine = [experience.mean_return * len(self._numbers), experience.successes, experience.ended.sum()]
        sums = self.communicator.sum(np.array(mine, np.float64))
        measured |= {
            "mean_return": float(sums[0] / settings.num_envs),
            "success": float(sums[1] / sums[2]),
            "std": float(self.policy.log_std.detach().exp().mean()),
        }
        return RoundResult(settings.num_envs * settings.rollout_steps, measured)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return adam_tensors(self.optimizer, self.policy), {"learning_rate": self.optimizer.param_groups[-1]["lr"]}

    def load_state_dict(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        restore_adam(self.optimizer, self.policy, tensors)
        if self.hints.desired_kl is not None:
            self._set_learning_rate(state["learning_rate"])

    def close(self) -> None:
        self._environments.close()

    def _set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate


class Rollout(NamedTuple):
    """What one rank saw in one iteration; T steps of its N environments. Rewards are scaled."""

    observations: Floats
    """[T, N, obs]"""
    actions: Floats
    """[T, N, act], before the environment clips them"""
    rewards: Floats
    """[T, N]"""
    terminated: Flags
    """[T, N]: the episode ended for good, so nothing follows"""
    ended: Flags
    """[T, N]: terminated, truncated, or the last step of the rollout"""
    final_observations: Floats
    """[E, obs], E = ended.sum(), in the order of np.argwhere(ended): where those episodes stood"""
    successes: int
    """episodes, whole or begun, with the success flag at any step"""
    mean_return: float
    """mean unscaled reward per environment and rollout"""


@torch.inference_mode()
def collect_rollout(
    envs: BatchEnv,
    policy: TeacherPolicy,
    settings: PPOSettings,
    seed: int,
    iteration: int,
    first_environment: int,
    steps: int | None = None,
) -> Rollout:
    """Act with exploration noise for `steps` (None: settings.rollout_steps) from fresh episodes.

    `first_environment` is the number of the first of these environments among those of all ranks.
    """
    steps = settings.rollout_steps if steps is None else steps
    count, limit = envs.num_envs, envs.num_goals or UNBOUNDED_GOALS
    draws = [generator(seed, policy.task_id, "rollout", iteration, first_environment + env) for env in range(count)]
    drawn = [rng.standard_normal((steps, policy.action_size)) for rng in draws]
    noise = np.stack(drawn, axis=1).astype(np.float32)
    std = policy.log_std.detach().exp().numpy().copy()

    def goals(mask: Flags) -> NDArray[np.int64]:
        return np.array([rng.integers(limit) if new else 0 for rng, new in zip(draws, mask, strict=True)])

    rows: list[tuple[Any, ...]] = []
    finals: list[Floats] = []
    successes, succeeded = 0, np.zeros(count, np.bool_)
    observations, _ = envs.reset(options={"goal_index": goals(np.ones(count, np.bool_))})
    for step in range(steps):
        actions = policy.action_mean(torch.from_numpy(observations)).numpy() + std * noise[step]
        following, reward, terminated, truncated, info = envs.step(actions)
        last, over = step + 1 == steps, terminated | truncated
        ended = over | last
        rows.append((observations, actions, reward.astype(np.float32), terminated, ended))
        finals.append(following[ended])
        succeeded |= info["success"]
        successes += int(succeeded[ended].sum())
        succeeded[ended] = False
        observations = following
        if over.any() and not last:
            observations, _ = envs.reset(options={"reset_mask": over, "goal_index": goals(over)})
    seen, acted, rewards, terminations, ends = (np.array(column) for column in zip(*rows, strict=True))
    scaled, mean_return = rewards * np.float32(settings.reward_scale), rewards.sum(axis=0, dtype=np.float64).mean()
    return Rollout(seen, acted, scaled, terminations, ends, np.concatenate(finals), successes, float(mean_return))


def generalised_advantages(
    rewards: NDArray[np.float64],
    values: NDArray[np.float64],
    next_values: NDArray[np.float64],
    terminated: Flags,
    ended: Flags,
    discount: float,
    gae_lambda: float,
) -> NDArray[np.float64]:
    """Advantages [T, N] from rewards, values, flags [T, N].

    `next_values[t]` is the value of where step t led, before any reset. A terminated episode has no
    future; a truncated one has, so its last step still counts `next_values`. No advantage flows over
    an end of either kind.
    """
    deltas = rewards + discount * np.where(terminated, 0.0, next_values) - values
    advantages, following = np.zeros_like(values), np.zeros(values.shape[1])
    for step in reversed(range(len(values))):
        following = deltas[step] + discount * gae_lambda * np.where(ended[step], 0.0, following)
        advantages[step] = following
    return advantages


def clipped_policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """The clipped surrogate, negated, per sample [B]: no gradient beyond the clip (arXiv 1707.06347, eq. 7)."""
    ratio = torch.exp(log_probs - old_log_probs)
    return -torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip_range, 1.0 + clip_range) * advantages)


def divergence(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """KL(old, new) per sample [B], the low-variance estimate (ratio - 1) - log ratio (joschu.net/blog/kl-approx)."""
    log_ratio = log_probs - old_log_probs
    return torch.expm1(log_ratio) - log_ratio


def adapted_learning_rate(learning_rate: float, kl: float, desired_kl: float) -> float:
    """The next round's learning rate: smaller after too large a change of the policy, larger after too small a one.

    `kl`: the mean of a round, with the divergence that ended it. Without, a round that goes too far with its first
    step would seem not to have moved. Tasks differ in how fast a policy may change (arXiv 1707.02286, section 3; the
    factor of rsl_rl).
    """
    if kl > 2.0 * desired_kl:
        return max(learning_rate / 1.5, SMALLEST_LEARNING_RATE)
    return min(learning_rate * 1.5, LARGEST_LEARNING_RATE) if kl < 0.5 * desired_kl else learning_rate


def update(
    policy: TeacherPolicy,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    settings: PPOSettings,
    seed: int,
    iteration: int,
    communicator: Communicator,
    train_actor: bool = True,
) -> dict[str, float]:
    """One round of epochs over the rollouts of all ranks; `train_actor=False` fits the critic alone.

    Past settings.target_kl the policy stands still for the rest of the round; the critic goes on.

    Returns policy_loss, value_loss, kl (means over their gradient steps), kl_met (the mean with the divergence that
    ended the round), policy_steps (gradient steps of the policy), and explained_variance of the critic before the
    round. The same on every rank.
    """
    samples, explained_variance = _prepare(policy, rollout, settings, communicator)
    actor = [*policy.actor.parameters(), policy.log_std]
    critic = list(policy.critic.parameters())
    count = len(samples.returns)
    counts = communicator.gather(count)
    totals, policy_steps, value_steps = np.zeros(3), 0, 0
    met: list[float] = []
    for epoch in range(settings.epochs):
        order = generator(seed, policy.task_id, "minibatches", iteration, epoch, communicator.rank).permutation(count)
        shuffled = samples.take(torch.tensor(order))
        for part in range(settings.minibatches):
            shares = [[n * (part + end) // settings.minibatches for end in (0, 1)] for n in counts]  # one of each rank
            whole = sum(end - begin for begin, end in shares)
            if whole == 0:
                continue
            batch = shuffled.take(slice(*shares[communicator.rank]))
            optimizer.zero_grad(set_to_none=True)
            value_loss = 0.5 * (policy.critic(batch.normalised).squeeze(-1) - batch.returns).square().sum() / whole
            policy_loss, kl = torch.zeros(()), torch.zeros(())
            loss = settings.value_coefficient * value_loss
            if train_actor:
                log_probs = policy.log_prob(policy.actor(batch.normalised), batch.actions)
                losses = clipped_policy_loss(log_probs, batch.log_probs, batch.advantages, settings.clip_range)
                policy_loss = losses.sum() / whole
                kl = divergence(log_probs, batch.log_probs).sum() / whole
                share_of_entropy = settings.entropy_coefficient * len(batch.returns) / whole
                loss = loss + policy_loss - share_of_entropy * policy.entropy()
            loss.backward()
            sums = communicator.sum_gradients([*actor, *critic], [policy_loss, value_loss, kl])
            if train_actor:
                met.append(sums[2])
            if train_actor and sums[2] > settings.target_kl:
                train_actor = False
                for parameter in actor:
                    parameter.grad = None
            # apart, because the critic's gradient is many times the actor's and would clip it away
            torch.nn.utils.clip_grad_norm_(actor, settings.max_gradient_norm, foreach=True)
            torch.nn.utils.clip_grad_norm_(critic, settings.max_gradient_norm, foreach=True)
            optimizer.step()
            totals += np.array(sums) * (train_actor, 1.0, train_actor)
            policy_steps += train_actor
            value_steps += 1
    return {
        "policy_loss": float(totals[0] / max(policy_steps, 1)),
        "value_loss": float(totals[1] / max(value_steps, 1)),
        "kl": float(totals[2] / max(policy_steps, 1)),
        "kl_met": float(np.mean(met)) if met else 0.0,
        "policy_steps": policy_steps,
        "explained_variance": explained_variance,
    }


class Statistics(NamedTuple):
    """Mean and variance, float64 [obs] each, of so many `samples`."""

    mean: NDArray[np.float64]
    var: NDArray[np.float64]
    samples: int


def observation_statistics(observations: Floats, communicator: Communicator) -> Statistics:
    """The statistics of `observations` [T, N, obs] over the environments of all ranks.

    Summed environment by environment in their global order: any number of ranks gives the same bits.
    """
    exact = observations.astype(np.float64)
    mine = [Statistics(column.mean(axis=0), column.var(axis=0), len(column)) for column in np.moveaxis(exact, 1, 0)]
    return reduce(merge_statistics, [one for rank in communicator.gather(mine) for one in rank])


def merge_statistics(one: Statistics, other: Statistics) -> Statistics:
    """The statistics of two sets of samples together (Chan, Golub & LeVeque 1983)."""
    total = one.samples + other.samples
    difference = other.mean - one.mean
    mean = one.mean + difference * (other.samples / total)
    squares = one.var * one.samples + other.var * other.samples + difference**2 * (one.samples * other.samples / total)
    return Statistics(mean, squares / total, total)


def update_normaliser(policy: TeacherPolicy, observations: Floats, communicator: Communicator) -> None:
    """Let the policy's running normaliser take in the `observations` [T, N, obs] of all ranks."""
    found = observation_statistics(observations, communicator)
    if count := int(policy.normaliser_count):
        old = Statistics(policy.normaliser_mean.numpy().copy(), policy.normaliser_var.numpy().copy(), count)
        found = merge_statistics(old, found)
    policy.set_normaliser(*found)


class _Samples(NamedTuple):
    """A rollout as flat tensors [B, ...]."""

    normalised: Tensor
    """observations, by the normaliser that stands still during the round"""
    actions: Tensor
    log_probs: Tensor
    advantages: Tensor
    returns: Tensor

    def take(self, rows: Tensor | slice) -> _Samples:
        return _Samples(*(column[rows] for column in self))


def _prepare(
    policy: TeacherPolicy, rollout: Rollout, settings: PPOSettings, communicator: Communicator
) -> tuple[_Samples, float]:
    """Advantages (normalised over all ranks), returns and log densities, and the explained variance of the critic."""
    shape = rollout.rewards.shape
    observations, actions = (torch.tensor(values).flatten(0, 1) for values in (rollout.observations, rollout.actions))
    inputs = policy.normalise(observations)
    with torch.inference_mode():
        values = policy.critic(inputs).squeeze(-1).numpy().astype(np.float64).reshape(shape)
        final_values = policy.value(torch.tensor(rollout.final_observations)).numpy().astype(np.float64)
    with torch.no_grad():
        log_probs = policy.log_prob(policy.actor(inputs), actions)
    next_values = np.roll(values, -1, axis=0)
    next_values[rollout.ended] = final_values  # all of the last step among them
    rewards, ends = rollout.rewards.astype(np.float64), (rollout.terminated, rollout.ended)
    advantages = generalised_advantages(rewards, values, next_values, *ends, settings.discount, settings.gae_lambda)
    returns = advantages + values
    sums = communicator.sum(np.array([advantages.size, advantages.sum(), returns.sum()], np.float64))
    mean, mean_return = sums[1] / sums[0], sums[2] / sums[0]
    squared = [((advantages - mean) ** 2).sum(), ((returns - mean_return) ** 2).sum(), (advantages**2).sum()]
    squares = communicator.sum(np.array(squared))
    normalised = (advantages - mean) / (np.sqrt(squares[0] / sums[0]) + 1e-8)
    targets = (torch.tensor(values.reshape(-1), dtype=torch.float32) for values in (normalised, returns))
    explained_variance = float(1.0 - squares[2] / squares[1]) if squares[1] > 0 else 0.0
    return _Samples(inputs, actions, log_probs, *targets), explained_variance
