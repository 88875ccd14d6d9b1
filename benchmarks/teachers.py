"""Teachers from scratch: our PPO against Stable-Baselines3's and CleanRL's on stock Meta-World, on the same two cores.

    python benchmarks/teachers.py [TASK ...] [--cleanrl PATH/ppo_continuous_action.py] [--json OUT.json]

First the speed: environment steps per second of whole training rounds (rollout and update), ours as 1, 2 and 4 MPI
ranks, the peers in every way they can run here. Then the learning: ours as 2 ranks, and each peer in its fastest way,
train until 95% of 20 episodes on held-out goals succeed; one function evaluates them all, and its time is not counted.
All begin with the settings of hpc_cpd.config.PPOSettings; DIFFERENCES says what remains. The peers are no dependencies
of ours: Stable-Baselines3 is installed into a folder of its own (--peers), CleanRL is one file of your checkout, run as
it is in a world that `train_cleanrl` adapts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from ppo_trainings import RESULT, ROUND, SETTINGS, TARGET, Training, train_cleanrl, train_ours, train_stable_baselines

from hpc_cpd.cluster.provenance import describe_origin
from hpc_cpd.cluster.ranks import find_mpiexec
from hpc_cpd.errors import UserError, run_command
from hpc_cpd.run.publish import sha256
from hpc_cpd.tasks.families.metaworld import NAMES

TASKS = ("reach-v3", "drawer-close-v3", "window-open-v3", "button-press-topdown-v3")
CORES = 2
WARM_UP, TIMED = 1, 3  # rounds of a speed measurement
PEERS = (
    *("stable-baselines3==2.9.2", "pandas==3.1.1", "cloudpickle==3.1.2"),
    *("tyro==1.0.17", "docstring-parser==0.18.0", "typeguard==4.6.0"),
)
DIFFERENCES = """What differs, apart from the simulators:
- ours begins at the same step size, then lets it follow the divergence (not with --fixed-step-size), lets the policy
  rest for what is left of a round that has moved it by target_kl, clips the gradients of actor and critic apart,
  normalises advantages over the whole batch (peers: each minibatch), and its normaliser stands still during a round;
- Stable-Baselines3 weighs the value loss twice as much: it has no factor 1/2;
- CleanRL sees no value beyond the time limit, has a normaliser per environment (in evaluation they take turns) and one
  process. Its file is written for gymnasium 0.29; from outside it gets the wrappers and the autoreset of 0.29,
  rewards times 0.1 instead of its running normaliser, 128 units where it says 64, and a log that writes nothing;
  its options turn off learning rate annealing and value clipping."""
SPEED_RATIO = "ours/peer, steps per second"


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


def run(contender: Contender, given: argparse.Namespace, task: str, seed: int, rounds: int, learn: bool) -> Any:
    """Train in processes of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(contender.threads), "OMP_WAIT_POLICY": "passive"}
    if contender.who != "ours":
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(given.peers), os.environ.get("PYTHONPATH"))))
    plan = {"who": contender.who, "ranks": contender.ranks, "processes": contender.processes}
    plan |= {"training": {"task": task, "seed": seed, "rounds": rounds, "learn": learn}}
    command = [find_mpiexec(), "-n", str(contender.ranks)] if contender.ranks > 1 else []
    command += [sys.executable, "-m", "mpi4py"] if contender.ranks > 1 else [sys.executable]  # ends all when one fails
    command += [*sys.argv, "--play", json.dumps(plan)]
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    results = [line for line in ended.stdout.splitlines() if line.startswith(RESULT)]
    if ended.returncode or not results:
        raise RuntimeError(f"{contender.name} failed on {task} with exit code {ended.returncode}:\n{ended.stdout}")
    return json.loads(results[-1].removeprefix(RESULT))


def play(given: argparse.Namespace) -> None:
    """What the processes that `run` starts do."""
    warnings.simplefilter("ignore")
    plan = json.loads(given.play)
    training = Training(**plan["training"])
    if plan["who"] == "ours":
        train_ours(training, plan["ranks"], given.fixed_step_size)
    elif plan["who"] == "CleanRL":
        train_cleanrl(training, given.cleanrl)
    else:
        train_stable_baselines(training, plan["processes"])


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
