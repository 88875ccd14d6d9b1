"""Teachers from scratch: our PPO against Stable-Baselines3's and CleanRL's on stock Meta-World, on the same two cores.

    python benchmarks/teachers.py [TASK ...] [--cleanrl PATH/ppo_continuous_action.py] [--json OUT.json]

First the speed: environment steps per second of whole training rounds (rollout and update), ours as 1, 2 and 4 MPI
ranks, the peers in every way they can run here. Then the learning: ours as 2 ranks, and each peer in its fastest way,
train until 95% of 20 episodes on held-out goals succeed; one function examines them all, and its time is not counted.
All begin with the settings of hpc_cpd.config.PPOSettings; DIFFERENCES says what remains. The peers are no dependencies
of ours: Stable-Baselines3 is installed into a folder of its own (--peers), CleanRL is one file of your checkout, run as
it is in a world that `play_cleanrl` adapts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import runpy
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium
import metaworld
import numpy as np
import torch
import torch.utils.tensorboard
from metaworld.wrappers import RandomTaskSelectWrapper
from torch import nn

from hpc_cpd.cluster.local import find_mpiexec
from hpc_cpd.cluster.provenance import describe_origin
from hpc_cpd.errors import UserError, run_command
from hpc_cpd.evaluate.rollouts import Policy, evaluate_policy
from hpc_cpd.run import sha256
from hpc_cpd.settings import PPOSettings
from hpc_cpd.tasks.metaworld import NAMES
from hpc_cpd.tasks.registry import make_batch
from hpc_cpd.teachers.actors import open_communicator
from hpc_cpd.teachers.policy import TeacherPolicy
from hpc_cpd.teachers.ppo import adapted_step_size, collect_rollout, environments_of, update, update_normaliser
from hpc_cpd.teachers.seeds import generator
from hpc_cpd.teachers.train import NORMALISER_STEPS

TASKS = ("reach-v3", "drawer-close-v3", "window-open-v3", "button-press-topdown-v3")
CORES = 2
SETTINGS = PPOSettings()
WIDTH, OBSERVATION, ACTION = 128, 39, 4
PARAMETERS = 2 * (OBSERVATION + 1 + WIDTH + 1) * WIDTH + (WIDTH + 1) * (ACTION + 1) + ACTION
GOALS_SEED, HELD_OUT_SEED = 1, 10_001
ROUND = SETTINGS.num_envs * SETTINGS.rollout_steps  # environment steps of a training round
EVALUATE_EVERY, EPISODES, TARGET = 5, 20, 0.95
WARM_UP, TIMED = 1, 3  # rounds of a speed measurement
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
PEERS = ("stable-baselines3==2.9.2", "pandas==3.1.1", "cloudpickle==3.1.2")
PEERS += ("tyro==1.0.17", "docstring-parser==0.18.0", "typeguard==4.6.0")
DIFFERENCES = """What differs, apart from the simulators:
- ours begins at the same step size, then lets it follow the divergence (not with --fixed-step-size), lets the policy
  rest for what is left of a round that has moved it by target_kl, clips the gradients of actor and critic apart,
  normalises advantages over the whole batch (peers: each minibatch), and its normaliser stands still during a round;
- Stable-Baselines3 weighs the value loss twice as much: it has no factor 1/2;
- CleanRL sees no value beyond the time limit, has a normaliser per environment (the first 20 serve in evaluation) and
  one process. Its file is written for gymnasium 0.29; from outside it gets the wrappers and the autoreset of 0.29,
  rewards times 0.1 instead of its running normaliser, 128 units where it says 64, and a log that writes nothing;
  its options turn off learning rate annealing and value clipping."""
RESULT, SPEED_RATIO = "result of this process: ", "ours/peer, steps per second"


@dataclass(frozen=True)
class Contender:
    """A way to train."""

    who: str
    name: str
    ranks: int = 1
    threads: int = 1
    processes: bool = False  # Stable-Baselines3: an environment in a process each


THREADS = {1: "1 thread", CORES: f"{CORES} threads"}
OURS = [Contender("ours", f"ours, {ranks} rank{'s'[: ranks > 1]}", ranks) for ranks in (1, 2, 4)]
STABLE_BASELINES = [
    Contender("Stable-Baselines3", f"Stable-Baselines3, {vector}VecEnv, {words}", 1, threads, vector == "Subproc")
    for vector in ("Dummy", "Subproc")
    for threads, words in THREADS.items()
]
CLEANRL = [Contender("CleanRL", f"CleanRL, {words}", 1, threads) for threads, words in THREADS.items()]


class Finished(Exception):
    """Thrown through a peer's training loop to end it."""


@dataclass
class Course:
    """The clock of one training, and its examinations."""

    task: str
    seed: int
    rounds: int
    learn: bool  # examine, and end at the target
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


def examinee(means: Callable[[np.ndarray], np.ndarray]) -> Policy:
    """A peer's deterministic policy as `evaluate_policy` takes it; it remembers nothing."""

    def act(observations: np.ndarray) -> np.ndarray:
        return np.clip(means(observations), -1.0, 1.0).astype(np.float32)

    return SimpleNamespace(reset=lambda task_id, num_envs: None, act=act)


def play_ours(course: Course, ranks: int, fixed_step_size: bool) -> None:
    """The rounds of hpc_cpd.teachers.train from scratch, but all with the one set of goals that the peers have."""
    task_id, seed, step_size = f"metaworld/{course.task}", course.seed, SETTINGS.learning_rate
    with open_communicator(ranks) as communicator:
        layers, weights = [WIDTH, WIDTH], generator(seed, task_id, "weights")
        log_std, smallest_std = SETTINGS.initial_log_std, SETTINGS.smallest_std
        policy = TeacherPolicy(task_id, OBSERVATION, ACTION, layers, "tanh", log_std, weights, smallest_std)
        communicator.broadcast_parameters(policy.parameters())
        optimiser = torch.optim.Adam(policy.parameters(), lr=step_size, eps=1e-5, fused=True)
        mine = environments_of(SETTINGS, communicator)
        envs = make_batch(task_id, len(mine), GOALS_SEED)
        course.begin()
        first = collect_rollout(envs, policy, SETTINGS, seed, 0, mine.start, steps=NORMALISER_STEPS)
        update_normaliser(policy, first.observations, communicator)
        course.steps = NORMALISER_STEPS * SETTINGS.num_envs
        for iteration in itertools.count():
            rollout = collect_rollout(envs, policy, SETTINGS, seed, 1 + iteration, mine.start)
            measured = update(policy, optimiser, rollout, SETTINGS, seed, iteration, communicator)
            update_normaliser(policy, rollout.observations, communicator)
            if SETTINGS.desired_kl is not None and not fixed_step_size:
                step_size = adapted_step_size(step_size, measured["kl"], SETTINGS.desired_kl)
                optimiser.param_groups[0]["lr"] = step_size
            if communicator.on_root(lambda: course.round_over(policy)):
                break
        communicator.on_root(lambda: course.tell(policy))


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


def play_stable_baselines(course: Course, processes: bool) -> None:
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

    makers = stock_makers(course.task, course.seed)
    stock = SubprocVecEnv(makers, start_method="fork") if processes else DummyVecEnv(makers)
    normalised = VecNormalize(stock, norm_reward=False)
    network = {"net_arch": {"pi": [WIDTH, WIDTH], "vf": [WIDTH, WIDTH]}, "activation_fn": nn.Tanh}
    network["log_std_init"] = SETTINGS.initial_log_std
    words = {word: value for word, _, value in EQUAL} | {"policy_kwargs": network, "seed": course.seed}
    model = PPO("MlpPolicy", normalised, batch_size=ROUND // SETTINGS.minibatches, device="cpu", **words)
    policy = examinee(lambda seen: model.predict(normalised.normalize_obs(seen), deterministic=True)[0])

    class Rounds(BaseCallback):
        def _on_rollout_start(self) -> None:
            if not self.n_calls:
                course.begin()
            elif course.round_over(policy):  # the update before this rollout was the end of a round
                raise Finished

        def _on_step(self) -> bool:
            return True

    with suppress(Finished):
        model.learn((course.rounds + 1) * ROUND, Rounds())
    course.tell(model.policy)
    normalised.close()


def play_cleanrl(course: Course, file: Path) -> None:
    """Run CleanRL's file as the main program, in a world that looks to it as DIFFERENCES says."""
    makers, wrappers = iter(stock_makers(course.task, course.seed)), gymnasium.wrappers
    transform, linear = wrappers.TransformObservation, nn.Linear

    def means(observations: np.ndarray) -> np.ndarray:
        """Row i behind the normaliser of training environment i."""
        names, rows = vars(sys.modules["__main__"]), []
        for environment, row in zip(names["envs"].envs, observations, strict=False):
            moments = environment.get_wrapper_attr("obs_rms")
            rows.append(np.clip((row - moments.mean) / np.sqrt(moments.var + 1e-8), -10.0, 10.0))
        with torch.no_grad():
            return names["agent"].actor_mean(torch.tensor(np.array(rows), dtype=torch.float32)).numpy()

    class Environments(gymnasium.vector.SyncVectorEnv):
        def __init__(self, functions: list[Any]) -> None:
            super().__init__(functions, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP)

        def reset(self, **words: Any) -> Any:
            begun = super().reset(**words)
            course.begin()
            return begun

        def step(self, actions: Any) -> Any:
            return *super().step(actions)[:4], {}  # the file only logs the info, which has another form now

    def add_scalar(tag: str, *values: Any) -> None:
        if tag == "charts/SPS" and course.round_over(examinee(means)):  # the last thing that a round does
            course.tell(vars(sys.modules["__main__"])["agent"])
            raise Finished

    class Linear(linear):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__(*(WIDTH if size == 64 else int(size) for size in (inputs, outputs)))

    gymnasium.register("Stock-v0", lambda: next(makers)(), disable_env_checker=True, order_enforce=False)
    writer = SimpleNamespace(add_text=lambda *words: None, add_scalar=add_scalar)
    torch.utils.tensorboard.SummaryWriter = lambda folder: writer
    gymnasium.vector.SyncVectorEnv, nn.Linear = Environments, Linear
    wrappers.TransformObservation = lambda environment, function: transform(environment, function, None)
    wrappers.NormalizeReward = lambda environment, gamma: environment
    options = f"--env-id Stock-v0 --seed {course.seed} --total-timesteps {course.rounds * ROUND} --no-cuda"
    options += f" --num-envs {SETTINGS.num_envs} --num-minibatches {SETTINGS.minibatches}"
    options += " --no-anneal-lr --no-clip-vloss" + "".join(f" {option} {value}" for _, option, value in EQUAL)
    sys.argv = [str(file), *options.split()]
    with suppress(Finished):
        runpy.run_path(str(file), run_name="__main__")


def run(contender: Contender, given: argparse.Namespace, task: str, seed: int, rounds: int, learn: bool) -> Any:
    """Train in processes of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(contender.threads), "OMP_WAIT_POLICY": "passive"}
    if contender.who != "ours":
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(given.peers), os.environ.get("PYTHONPATH"))))
    plan = {"who": contender.who, "ranks": contender.ranks, "processes": contender.processes}
    plan |= {"course": {"task": task, "seed": seed, "rounds": rounds, "learn": learn}}
    command = [find_mpiexec(), "-n", str(contender.ranks)] if contender.ranks > 1 else []
    command += [sys.executable, *sys.argv, "--play", json.dumps(plan)]
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    results = [line for line in ended.stdout.splitlines() if line.startswith(RESULT)]
    if ended.returncode or not results:
        raise RuntimeError(f"{contender.name} failed on {task} with exit code {ended.returncode}:\n{ended.stdout}")
    return json.loads(results[-1].removeprefix(RESULT))


def play(given: argparse.Namespace) -> None:
    """What the processes that `run` starts do."""
    warnings.simplefilter("ignore")
    plan = json.loads(given.play)
    course = Course(**plan["course"])
    if plan["who"] == "ours":
        play_ours(course, plan["ranks"], given.fixed_step_size)
    elif plan["who"] == "CleanRL":
        play_cleanrl(course, given.cleanrl)
    else:
        play_stable_baselines(course, plan["processes"])


def measure_speed(given: argparse.Namespace, task: str, contenders: list[Contender]) -> dict[Contender, float]:
    """Environment steps per second in training; the contenders take turns."""
    seconds: dict[Contender, list[float]] = {contender: [] for contender in contenders}
    for _ in range(given.repeats):
        for contender in contenders:
            seconds[contender] += run(contender, given, task, 1, WARM_UP + TIMED, False)["round_seconds"][WARM_UP:]
    rates = {contender: round(ROUND / median(values), 1) for contender, values in seconds.items()}
    print(f"{task}: training steps per second")
    for contender, rate in rates.items():
        print(f"  {contender.name:42s}{rate:10,.0f}", flush=True)
    return rates


def learn(given: argparse.Namespace, task: str, contender: Contender) -> dict[str, Any]:
    """Steps and seconds to the target, or spent in vain: medians over the seeds."""
    print(f"{task}: {contender.name} learns", flush=True)
    runs = [run(contender, given, task, seed, -(-given.steps // ROUND), True)["evaluations"] for seed in given.seeds]
    result: dict[str, Any] = {word: median(each[-1][word] for each in runs) for word in ("steps", "seconds")}
    result |= {"reached": sum(each[-1]["success"] >= TARGET for each in runs), "evaluations": runs}
    reached = f"{TARGET:.0%} reached by {result['reached']} of {len(runs)} seeds"
    print(f"  {reached}: {result['steps']:,.0f} steps, {result['seconds']:.0f} s", flush=True)
    return result


def measure_task(given: argparse.Namespace, task: str, rivals: list[list[Contender]]) -> dict[str, Any]:
    speed = measure_speed(given, task, OURS + [way for ways in rivals for way in ways])
    fastest = [max(ways, key=speed.__getitem__) for ways in rivals]
    learning = {} if given.only_speed else {way.who: learn(given, task, way) for way in (OURS[1], *fastest)}
    ratios: dict[str, dict[str, float]] = {}
    for way in fastest:
        found = ratios[way.who] = {SPEED_RATIO: round(speed[OURS[1]] / speed[way], 2)}
        for what in ("steps", "seconds") if learning else ():
            found[f"peer/ours, {what} to {TARGET:.0%}"] = round(learning[way.who][what] / learning["ours"][what], 2)
        words = "; ".join(f"{what}: {ratio}" for what, ratio in found.items())
        print(f"{task}, ours (2 ranks) and {way.name}: {words}", flush=True)
    return {"ratios": ratios, "steps_per_second": {way.name: rate for way, rate in speed.items()}, "learning": learning}


def install_peers(folder: Path) -> None:
    """Without their own dependencies: all but these are ours too, and a second torch would be gigabytes."""
    if not (folder / "done").is_file():
        print(f"installing {', '.join(PEERS)} into {folder}", flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--upgrade", "--target", str(folder), *PEERS], check=True)
        (folder / "done").touch()


def main() -> None:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hpc_cpd" / "peers"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"none: {' '.join(TASKS)}")
    parser.add_argument("--cleanrl", type=Path, help="ppo_continuous_action.py of a checkout of CleanRL")
    parser.add_argument("--peers", type=Path, default=cache, help=f"where the peers are installed ({cache})")
    parser.add_argument("--steps", type=int, default=800_000, help="environment steps after which learning ends")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of the learning")
    parser.add_argument("--repeats", type=int, default=1, help="turns in the measurement of speed")
    parser.add_argument("--only-speed", action="store_true")
    parser.add_argument("--fixed-step-size", action="store_true", help="ours keeps its step size, as the peers do")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--play", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.play is not None:
        return play(given)
    unknown = sorted(set(given.tasks) - set(NAMES))
    if unknown:
        raise UserError(f"there is no task {unknown[0]}; 'hpc-cpd tasks MT50' lists them, without 'metaworld/'")
    if given.cleanrl is not None and not given.cleanrl.is_file():
        raise UserError(f"there is no {given.cleanrl}; give ppo_continuous_action.py of a checkout of CleanRL")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    install_peers(given.peers)
    rivals = [STABLE_BASELINES] if given.cleanrl is None else [STABLE_BASELINES, CLEANRL]
    print(f"{PEERS[0]} on {CORES} cores{'' if given.cleanrl else '; CleanRL is left out without --cleanrl'}")
    print(DIFFERENCES, flush=True)
    tasks = {task: measure_task(given, task, rivals) for task in given.tasks or TASKS}
    for who in (ways[0].who for ways in rivals):
        ratios = [result["ratios"][who][SPEED_RATIO] for result in tasks.values()]
        print(f"ours (2 ranks)/{who}, steps per second: ratio {mean(ratios):.2f} on the mean, {min(ratios)} at least")
    if given.json is not None:
        origin = {what: value for what, value in describe_origin().items() if what != "command"}  # it names local paths
        settings = {
            "steps": given.steps,
            "seeds": given.seeds,
            "fixed_step_size": given.fixed_step_size,
            "cores": CORES,
        }
        peers = {"packages": PEERS, "cleanrl_sha256": given.cleanrl and sha256(given.cleanrl)}
        everything = {"settings": settings | SETTINGS.model_dump(), "peers": peers, "tasks": tasks, "origin": origin}
        given.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
