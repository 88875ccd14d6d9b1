"""The trainings that teachers.py compares: one clock and one evaluation for ours, Stable-Baselines3 and CleanRL."""

# mypy: disable-error-code="arg-type, assignment, misc, operator, valid-type"
# CleanRL's file is run with stand-ins in the place of classes that it imports.

from __future__ import annotations

import itertools
import json
import runpy
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import metaworld
import numpy as np
import torch
from metaworld.wrappers import RandomTaskSelectWrapper
from torch import nn

from hpc_cpd.distributed.mpi import open_communicator
from hpc_cpd.evaluation.rollouts import evaluate_policy
from hpc_cpd.optimizers import Adam
from hpc_cpd.tasks.policy import Policy
from hpc_cpd.tasks.registry import make_batch
from hpc_cpd.teachers.algorithms._ppo import (
    NORMALISER_STEPS,
    adapted_learning_rate,
    collect_rollout,
    update,
    update_normaliser,
)
from hpc_cpd.teachers.algorithms.ppo import PPOSettings
from hpc_cpd.teachers.policy import TeacherPolicy
from hpc_cpd.teachers.rollouts import generator
from hpc_cpd.teachers.starts.scratch import ScratchSettings

SETTINGS, START = PPOSettings(), ScratchSettings()
WIDTH, OBSERVATION, ACTION = 128, 39, 4
PARAMETERS = 2 * (OBSERVATION + 1 + WIDTH + 1) * WIDTH + (WIDTH + 1) * (ACTION + 1) + ACTION
GOALS_SEED, HELD_OUT_SEED = 1, 10_001
ROUND = SETTINGS.num_envs * SETTINGS.rollout_steps  # environment steps of a training round
EVALUATE_EVERY, EPISODES, TARGET = 2, 20, 0.95
EQUAL = (  # what Stable-Baselines3 calls it, what CleanRL calls it, and what it is for all
    ("learning_rate", "--learning-rate", SETTINGS.learning_rate),
    ("n_steps", "--num-steps", SETTINGS.rollout_steps),
    ("n_epochs", "--update-epochs", SETTINGS.epochs),
    ("gamma", "--gamma", SETTINGS.discount),
    ("gae_lambda", "--gae-lambda", SETTINGS.gae_lambda),
    ("clip_range", "--clip-coef", SETTINGS.clip_range),
    ("ent_coef", "--ent-coef", SETTINGS.entropy_coefficient),
    ("vf_coef", "--vf-coef", SETTINGS.value_coefficient),
    ("max_grad_norm", "--max-grad-norm", SETTINGS.max_gradient_norm),
)
RESULT = "result of this process: "


class Finished(Exception):
    """Thrown through a peer's training loop to end it."""


@dataclass
class Training:
    """The clock of one training, and its evaluations."""

    task: str
    seed: int
    rounds: int
    learn: bool  # evaluate, and end at the target
    steps: int = 0
    seconds: list[float] = field(default_factory=list)  # of each round
    evaluations: list[dict[str, float]] = field(default_factory=list)
    _began: float = 0.0

    def begin(self) -> None:
        self._began = time.perf_counter()

    def round_over(self, policy: Policy) -> bool:
        """Whether the training ends here."""
        self.seconds.append(time.perf_counter() - self._began)
        self.steps += ROUND
        last, success = len(self.seconds) == self.rounds, 0.0
        if self.learn and (last or len(self.seconds) % EVALUATE_EVERY == 0):
            results = evaluate_policy(policy, f"metaworld/{self.task}", EPISODES, HELD_OUT_SEED)
            success, spent = sum(result.success for result in results) / EPISODES, sum(self.seconds)
            self.evaluations.append({"steps": self.steps, "seconds": round(spent, 1), "success": success})
            print(f"    {self.steps:,} steps, {spent:.0f} s: {success:.0%}", file=sys.stderr, flush=True)
        self._began = time.perf_counter()
        return last or success >= TARGET

    def tell(self, network: nn.Module) -> None:
        """Hand the result to the process that started this one."""
        if (count := sum(parameter.numel() for parameter in network.parameters())) != PARAMETERS:
            raise RuntimeError(f"a network of {count} parameters was trained, but equal ones have {PARAMETERS}")
        print(RESULT + json.dumps({"round_seconds": self.seconds, "evaluations": self.evaluations}), flush=True)


def deterministic(means: Callable[[np.ndarray], np.ndarray]) -> Policy:
    """A peer's deterministic policy as `evaluate_policy` takes it; it remembers nothing."""

    def act(observations: np.ndarray) -> np.ndarray:
        return np.clip(means(observations), -1.0, 1.0).astype(np.float32)

    return SimpleNamespace(reset=lambda task_id, num_envs: None, act=act)


def train_ours(training: Training, ranks: int, fixed_learning_rate: bool) -> None:
    """The rounds of hpc_cpd.teachers.train from scratch, but all with the one set of goals that the peers have."""
    task_id, seed, learning_rate = f"metaworld/{training.task}", training.seed, SETTINGS.learning_rate
    communicator = open_communicator(ranks)
    layers, weights = [WIDTH, WIDTH], generator(seed, task_id, "weights")
    log_std, smallest_std = START.initial_log_std, START.smallest_std
    policy = TeacherPolicy(task_id, OBSERVATION, ACTION, layers, "tanh", log_std, weights, smallest_std)
    communicator.broadcast(policy.parameters())
    optimizer = Adam(policy.parameters(), lr=learning_rate, eps=1e-5, fused=True)
    mine = communicator.local_range(SETTINGS.num_envs)
    envs = make_batch(task_id, len(mine), GOALS_SEED)
    training.begin()
    first = collect_rollout(envs, policy, SETTINGS, seed, 0, mine.start, steps=NORMALISER_STEPS)
    update_normaliser(policy, first.observations, communicator)
    training.steps = NORMALISER_STEPS * SETTINGS.num_envs
    for iteration in itertools.count():
        rollout = collect_rollout(envs, policy, SETTINGS, seed, 1 + iteration, mine.start)
        measured = update(policy, optimizer, rollout, SETTINGS, seed, iteration, communicator)
        update_normaliser(policy, rollout.observations, communicator)
        if START.desired_kl is not None and not fixed_learning_rate:
            learning_rate = adapted_learning_rate(learning_rate, measured["kl_met"], START.desired_kl)
            optimizer.param_groups[0]["lr"] = learning_rate
        if communicator.on_root(lambda: training.round_over(policy)):
            break
    communicator.on_root(lambda: training.tell(policy))


def stock_makers(task: str, seed: int) -> list[Callable[[], gymnasium.Env[Any, Any]]]:
    """Makers of stock environments with our goals (one at random per episode), time limit and scale of reward."""
    goals = metaworld.MT1(task, seed=GOALS_SEED).train_tasks

    def make(number: int) -> gymnasium.Env[Any, Any]:
        environment = metaworld.env_dict.ALL_V3_ENVIRONMENTS[task]()
        environment.seed(1000 * seed + number)  # else all would draw the same goals
        limited = gymnasium.wrappers.TimeLimit(environment, SETTINGS.rollout_steps)
        drawing = RandomTaskSelectWrapper(limited, goals)
        return gymnasium.wrappers.TransformReward(drawing, lambda reward: reward * SETTINGS.reward_scale)

    return [partial(make, number) for number in range(SETTINGS.num_envs)]


def train_stable_baselines(training: Training, processes: bool) -> None:
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

    makers = stock_makers(training.task, training.seed)
    stock = SubprocVecEnv(makers, start_method="fork") if processes else DummyVecEnv(makers)
    normalised = VecNormalize(stock, norm_reward=False)
    network = {"net_arch": {"pi": [WIDTH, WIDTH], "vf": [WIDTH, WIDTH]}, "activation_fn": nn.Tanh}
    network["log_std_init"] = ScratchSettings().initial_log_std
    words = {word: value for word, _, value in EQUAL} | {"policy_kwargs": network, "seed": training.seed}
    model = PPO("MlpPolicy", normalised, batch_size=ROUND // SETTINGS.minibatches, device="cpu", **words)
    policy = deterministic(lambda seen: model.predict(normalised.normalize_obs(seen), deterministic=True)[0])

    class Rounds(BaseCallback):
        def _on_rollout_start(self) -> None:
            if not self.n_calls:
                training.begin()
            elif training.round_over(policy):  # the update before this rollout was the end of a round
                raise Finished

        def _on_step(self) -> bool:
            return True

    with suppress(Finished):
        model.learn((training.rounds + 1) * ROUND, Rounds())
    training.tell(model.policy)
    normalised.close()


def train_cleanrl(training: Training, file: Path) -> None:
    """Run CleanRL's file as the main program, in a world that looks to it as DIFFERENCES says."""
    makers, wrappers = iter(stock_makers(training.task, training.seed)), gymnasium.wrappers
    transform, linear = wrappers.TransformObservation, nn.Linear

    def means(observations: np.ndarray) -> np.ndarray:
        """Row i behind the normaliser of training environment i, from the first again where rows are more."""
        names, rows = vars(sys.modules["__main__"]), []
        for environment, row in zip(itertools.cycle(names["envs"].envs), observations, strict=False):
            moments = environment.get_wrapper_attr("obs_rms")
            rows.append(np.clip((row - moments.mean) / np.sqrt(moments.var + 1e-8), -10.0, 10.0))
        with torch.no_grad():
            return names["agent"].actor_mean(torch.tensor(np.array(rows), dtype=torch.float32)).numpy()

    class Environments(gymnasium.vector.SyncVectorEnv):
        def __init__(self, functions: list[Any]) -> None:
            super().__init__(functions, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP)

        def reset(self, **words: Any) -> Any:
            begun = super().reset(**words)
            training.begin()
            return begun

        def step(self, actions: Any) -> Any:
            return *super().step(actions)[:4], {}  # the file only logs the info, which has another form now

    def add_scalar(tag: str, *values: Any) -> None:
        if tag == "charts/SPS" and training.round_over(deterministic(means)):  # the last thing that a round does
            training.tell(vars(sys.modules["__main__"])["agent"])
            raise Finished

    class Linear(linear):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__(*(WIDTH if size == 64 else int(size) for size in (inputs, outputs)))

    gymnasium.register("Stock-v0", lambda: next(makers)(), disable_env_checker=True, order_enforce=False)
    writer = SimpleNamespace(add_text=lambda *words: None, add_scalar=add_scalar)
    sys.modules["torch.utils.tensorboard"] = SimpleNamespace(SummaryWriter=lambda folder: writer)
    gymnasium.vector.SyncVectorEnv, nn.Linear = Environments, Linear
    wrappers.TransformObservation = lambda environment, function: transform(environment, function, None)
    wrappers.NormalizeReward = lambda environment, gamma: environment
    options = f"--env-id Stock-v0 --seed {training.seed} --total-timesteps {training.rounds * ROUND} --no-cuda"
    options += f" --num-envs {SETTINGS.num_envs} --num-minibatches {SETTINGS.minibatches}"
    options += " --no-anneal-lr --no-clip-vloss" + "".join(f" {option} {value}" for _, option, value in EQUAL)
    sys.argv = [str(file), *options.split()]
    with suppress(Finished):
        runpy.run_path(str(file), run_name="__main__")
