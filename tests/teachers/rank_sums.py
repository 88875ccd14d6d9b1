"""What a rank of test_actors runs: gradient and normaliser of a batch that the ranks share; rank 0 writes them."""

from __future__ import annotations

import sys

import numpy as np
import torch

from hpc_cpd.distributed.mpi import open_communicator
from hpc_cpd.teachers.algorithms._ppo import Rollout, update, update_normaliser
from hpc_cpd.teachers.algorithms.ppo import PPOSettings
from hpc_cpd.teachers.policy import TeacherPolicy

STEPS, ENVIRONMENTS = 11, 5


def main(out: str, ranks: int) -> None:
    communicator = open_communicator(ranks)
    rng = np.random.default_rng(0)
    mine = communicator.local_range(ENVIRONMENTS)
    columns = slice(mine.start, mine.stop)
    observations = rng.normal(2.0, 3.0, size=(STEPS, ENVIRONMENTS, 6)).astype(np.float32)
    actions = rng.normal(size=(STEPS, ENVIRONMENTS, 2)).astype(np.float32)
    rewards = rng.normal(size=(STEPS, ENVIRONMENTS)).astype(np.float32)
    finals = rng.normal(size=(ENVIRONMENTS, 6)).astype(np.float32)
    ended = np.zeros((STEPS, len(mine)), np.bool_)
    ended[-1] = True
    policy = TeacherPolicy("lab/task", 6, 2, (16,))
    update_normaliser(policy, observations[:, columns], communicator)
    rollout = Rollout(
        observations[:, columns],
        actions[:, columns],
        rewards[:, columns],
        np.zeros_like(ended),
        ended,
        finals[columns],
        0,
        0.0,
    )
    # one gradient step on the whole batch, with a step size and limits that leave the gradient as it is
    rules = PPOSettings(epochs=1, minibatches=1, max_gradient_norm=1e9, entropy_coefficient=0.1)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    before = policy.tensors()
    update(policy, optimizer, rollout, rules, 0, 0, communicator)
    arrays = {name: (before[name] - value).numpy() for name, value in policy.tensors().items()}
    arrays |= {"normaliser_mean": policy.normaliser_mean.numpy(), "normaliser_var": policy.normaliser_var.numpy()}
    if communicator.rank == communicator.size - 1:
        np.savez(out, **arrays)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
