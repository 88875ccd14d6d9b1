from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_cpd.distributed.mpi import Communicator
from hpc_cpd.tasks.registry import make_batch
from hpc_cpd.teachers.algorithms._ppo import (
    LARGEST_LEARNING_RATE,
    SMALLEST_LEARNING_RATE,
    _prepare,
    adapted_learning_rate,
    clipped_policy_loss,
    collect_rollout,
    divergence,
    generalised_advantages,
    observation_statistics,
    update,
    update_normaliser,
)
from hpc_cpd.teachers.algorithms.ppo import PPOSettings
from hpc_cpd.teachers.policy import TeacherPolicy
from tests.teachers.jobs import PENDULUM


def _advantages(rewards, values, next_values, terminated, ended, discount=0.5, gae_lambda=0.5):
    columns = [np.array(column)[:, None] for column in (rewards, values, next_values, terminated, ended)]
    return generalised_advantages(*columns, discount, gae_lambda)[:, 0].tolist()  # type: ignore[call-arg]


def test_advantages_of_a_hand_computed_example() -> None:
    # deltas: 1 + .5*2 - 1 = 1;  2 + .5*4 - 2 = 2;  3 + .5*8 - 4 = 3;  then 3, 2 + .25*3, 1 + .25*2.75
    flags = [False, False, False]
    found = _advantages([1.0, 2.0, 3.0], [1.0, 2.0, 4.0], [2.0, 4.0, 8.0], flags, [False, False, True])
    assert found == [1.6875, 2.75, 3.0]


def test_truncation_bootstraps_and_termination_does_not() -> None:
    arguments = ([1.0, 1.0], [0.0, 0.0], [10.0, 10.0])
    truncated = _advantages(*arguments, [False, False], [True, True])
    terminated = _advantages(*arguments, [True, False], [True, True])
    assert truncated == [6.0, 6.0]
    assert terminated == [1.0, 6.0]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), discount=st.floats(0.1, 1.0), gae_lambda=st.floats(0.0, 1.0))
def test_advantages_equal_their_definition(seed: int, discount: float, gae_lambda: float) -> None:
    """The exponentially weighted mean of k-step advantages, each summed from scratch (arXiv 1506.02438, eq. 14-16)."""
    rng = np.random.default_rng(seed)
    steps = 12
    rewards, values, following = rng.normal(size=(3, steps, 1))
    ended = rng.random((steps, 1)) < 0.25
    terminated = ended & (rng.random((steps, 1)) < 0.5)
    ended[-1] = True
    # within an episode the value of the next state is the value of the next step
    next_values = np.where(ended, following, np.roll(values, -1, axis=0))
    found = generalised_advantages(rewards, values, next_values, terminated, ended, discount, gae_lambda)
    for start in range(steps):
        end = start + int(np.argmax(ended[start:, 0]))
        total, weight, collected = 0.0, 1.0, 0.0
        for k, step in enumerate(range(start, end + 1)):
            collected += discount**k * rewards[step, 0]
            future = 0.0 if terminated[step, 0] else discount ** (k + 1) * next_values[step, 0]
            k_step = collected + future - values[start, 0]
            last = step == end
            total += weight * k_step * (1.0 if last else 1.0 - gae_lambda)
            weight *= gae_lambda
        assert found[start, 0] == pytest.approx(total, abs=1e-9)


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [(1.3, 1.0, False), (0.7, -1.0, False), (1.3, -1.0, True), (0.7, 1.0, True), (1.1, 1.0, True), (0.9, -1.0, True)],
)
def test_the_objective_has_no_gradient_beyond_the_clip(ratio: float, advantage: float, moves: bool) -> None:
    old = torch.tensor([-1.0])
    log_prob = (old + np.log(ratio)).requires_grad_()
    clipped_policy_loss(log_prob, old, torch.tensor([advantage]), 0.2).sum().backward()
    assert log_prob.grad is not None
    expected = -ratio * advantage if moves else 0.0
    assert log_prob.grad.item() == pytest.approx(expected, rel=1e-5)


def test_the_learning_rate_follows_the_divergence_within_its_bounds() -> None:
    assert adapted_learning_rate(3e-4, 0.010, desired_kl=0.01) == 3e-4
    assert adapted_learning_rate(3e-4, 0.021, desired_kl=0.01) == pytest.approx(2e-4)
    assert adapted_learning_rate(3e-4, 0.004, desired_kl=0.01) == pytest.approx(4.5e-4)
    assert adapted_learning_rate(SMALLEST_LEARNING_RATE, 1.0, desired_kl=0.01) == SMALLEST_LEARNING_RATE
    assert adapted_learning_rate(LARGEST_LEARNING_RATE, 0.0, desired_kl=0.01) == LARGEST_LEARNING_RATE


def test_divergence_is_zero_only_for_the_same_policy() -> None:
    old = torch.tensor([-1.0, -2.0, -3.0])
    assert torch.equal(divergence(old, old), torch.zeros(3))
    assert (divergence(old + torch.tensor([0.1, -0.1, 1.0]), old) > 0).all()


def test_a_rollout_values_where_an_episode_was_truncated_not_where_the_next_began() -> None:
    policy = TeacherPolicy(PENDULUM, 3, 1, (8,), rng=np.random.default_rng(1))
    rules = PPOSettings(num_envs=2, rollout_steps=230)
    rollout = collect_rollout(make_batch(PENDULUM, 2, 0), policy, rules, seed=0, iteration=0, first_environment=0)
    assert np.argwhere(rollout.ended).tolist() == [[199, 0], [199, 1], [229, 0], [229, 1]]
    assert not rollout.terminated.any()
    assert len(rollout.final_observations) == 4
    # the pendulum moves little in a step, but a fresh episode begins somewhere else
    moved = np.abs(rollout.final_observations[:2] - rollout.observations[199]).max()
    jumped = np.abs(rollout.observations[200] - rollout.observations[199]).max()
    assert moved < 1.0 < jumped
    samples, _ = _prepare(policy, rollout, rules, Communicator())
    found = samples.returns.numpy().reshape(230, 2)
    bootstrap = policy.value(torch.tensor(rollout.final_observations)).detach().numpy()
    assert found[199] == pytest.approx(rollout.rewards[199] + rules.discount * bootstrap[:2], abs=1e-4)


def test_a_rollout_depends_on_its_numbers_alone() -> None:
    policy = TeacherPolicy(PENDULUM, 3, 1, (8,))
    rules = PPOSettings(num_envs=2, rollout_steps=20)
    both = make_batch(PENDULUM, 2, 0)
    first = collect_rollout(both, policy, rules, seed=0, iteration=4, first_environment=0)
    again = collect_rollout(both, policy, rules, seed=0, iteration=4, first_environment=0)
    second = collect_rollout(make_batch(PENDULUM, 1, 0), policy, rules, seed=0, iteration=4, first_environment=1)
    assert np.array_equal(first.observations, again.observations)
    assert np.array_equal(first.observations[0, 1:], second.observations[0])
    assert np.allclose(first.actions[:, 1:], second.actions, atol=1e-3)
    other = collect_rollout(both, policy, rules, seed=0, iteration=5, first_environment=0)
    assert not np.array_equal(first.observations[0], other.observations[0])


def test_a_round_ends_past_the_divergence_limit_and_spares_the_actor_when_told() -> None:
    rules = PPOSettings(num_envs=2, rollout_steps=50, epochs=50, minibatches=2, learning_rate=0.02, target_kl=0.01)
    envs = make_batch(PENDULUM, 2, 0)

    def round_of(train_actor: bool) -> tuple[dict[str, float], TeacherPolicy]:
        policy = TeacherPolicy(PENDULUM, 3, 1, (8,))
        rollout = collect_rollout(envs, policy, rules, seed=0, iteration=0, first_environment=0)
        optimizer = torch.optim.Adam(policy.parameters(), lr=rules.learning_rate)
        return update(policy, optimizer, rollout, rules, 0, 0, Communicator(), train_actor), policy

    before = TeacherPolicy(PENDULUM, 3, 1, (8,)).tensors()
    measured, policy = round_of(train_actor=True)
    assert 0 < measured["policy_steps"] < 100 and measured["kl"] <= 0.01
    assert measured["kl_met"] > measured["kl"]  # with the divergence that ended the round
    assert not torch.equal(policy.log_std, before["log_std"])
    critic = policy.critic[0].weight.clone()
    measured, policy = round_of(train_actor=False)
    assert measured["policy_steps"] == 0
    assert torch.allclose(policy.critic[0].weight, critic)  # the limit had not held the critic back
    after = policy.tensors()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"critic"}


def test_a_round_that_goes_too_far_at_once_makes_the_learning_rate_smaller() -> None:
    rules = PPOSettings(num_envs=2, rollout_steps=50, epochs=10, minibatches=2, learning_rate=0.02)
    rollout_of = partial(collect_rollout, make_batch(PENDULUM, 2, 0), settings=rules, seed=0, first_environment=0)
    policy, learning_rate = TeacherPolicy(PENDULUM, 3, 1, (256, 256)), rules.learning_rate
    with torch.no_grad():
        policy.log_std.fill_(-3.0)
    optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate)
    for iteration in range(2):
        rollout = rollout_of(policy, iteration=iteration)
        measured = update(policy, optimizer, rollout, rules, 0, iteration, Communicator())
        assert measured["policy_steps"] == 1 and measured["kl"] < 1e-6
        before, learning_rate = learning_rate, adapted_learning_rate(learning_rate, measured["kl_met"], 0.01)
        assert learning_rate < before


def test_the_normaliser_holds_the_statistics_of_everything_it_saw() -> None:
    rng = np.random.default_rng(0)
    batches = [rng.normal(3.0, 2.0, size=(7, 4, 5)).astype(np.float32) for _ in range(3)]
    policy = TeacherPolicy("lab/task", 5, 1, (4,))
    for batch in batches:
        update_normaliser(policy, batch, Communicator())
    everything = np.concatenate(batches).astype(np.float64).reshape(-1, 5)
    assert np.allclose(policy.normaliser_mean.numpy(), everything.mean(axis=0), rtol=1e-12)
    assert np.allclose(policy.normaliser_var.numpy(), everything.var(axis=0), rtol=1e-12)
    assert int(policy.normaliser_count) == len(everything)
    mean, var, count = observation_statistics(batches[0], Communicator())
    assert (mean.dtype, var.dtype, count) == (np.float64, np.float64, 28)
