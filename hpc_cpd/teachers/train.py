"""Training one teacher, top to bottom: its start, the rounds of its algorithm, the best evaluated policy published.

Everything is a pure function of the settings, the seed, the task and the number of ranks; a run that was
killed goes on from its last checkpoint and leaves the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from typing import Any

from torch import Tensor

from hpc_cpd import plugins
from hpc_cpd.distributed.mpi import CheckpointBoundary
from hpc_cpd.evaluation.rollouts import task_record
from hpc_cpd.progress import Progress
from hpc_cpd.run.metrics_log import MetricsLog
from hpc_cpd.run.paths import Run
from hpc_cpd.run.save_due import SaveDue
from hpc_cpd.teachers.algorithms.base import Learner, TeacherContext
from hpc_cpd.teachers.checkpoint import load_checkpoint, save_checkpoint
from hpc_cpd.teachers.policy import save_teacher
from hpc_cpd.teachers.publish import evaluate_on_all_ranks, publish_teacher
from hpc_cpd.teachers.sources.train import TrainSettings
from hpc_cpd.teachers.starts.base import Pretraining, Start


def train_teacher(settings: TrainSettings, run: Run, context: TeacherContext, stop: Callable[[], bool]) -> None:
    """Train and publish the teacher of `context.task` with the algorithm and the start that the run's settings name.

    All ranks call it together. Raises StopRequested after saving when `stop()` is true on any rank, and whatever the
    start or the algorithm raise.
    """
    training = _Training(settings, run, context, stop)
    training.resume()
    training.start()
    training.improve()
    training.publish()


@dataclass
class _State:
    """Everything a checkpoint holds besides tensors and what learner and start keep; plain JSON values."""

    step: int = 0
    """Steps of the start plus rounds of the algorithm: the `step` of metrics.jsonl."""
    started: bool = False
    start_step: int = 0
    round: int = 0
    environment_steps: int = 0
    streak: int = 0
    """Evaluations in a row that reached target_success."""
    best: dict[str, Any] | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


class _Training:
    """The state of `train_teacher`, identical on every rank."""

    def __init__(self, settings: TrainSettings, run: Run, context: TeacherContext, stop: Callable[[], bool]) -> None:
        self.settings, self.run, self.context = settings, run, context
        self.config, task_id, self.communicator = run.config(), context.task.task_id, context.communicator
        self.folder, teachers = run.teacher(task_id), self.config.teachers
        self.start_plugin: Start = plugins.load("starts", teachers.start.name)
        algorithm = plugins.load("algorithms", teachers.algorithm.name)
        self.learner: Learner = algorithm.learner(teachers.algorithm, self.start_plugin.hints(teachers.start), context)
        self.policy = self.learner.policy
        self.pretraining: Pretraining | None = None
        due = SaveDue(run, self.config.checkpoint_every_seconds)
        self.boundary = CheckpointBoundary(self.communicator, stop, due, what=f"the teacher of {task_id}")
        self.progress = Progress(f"teacher {task_id}", enabled=self.communicator.rank == 0, folder=self.folder)
        self.log: MetricsLog | None = None
        self.state = _State()
        self.saved: dict[str, dict[str, Tensor]] = {}
        """The tensors of the checkpoint that was found, by who wrote them."""
        self.best: dict[str, Tensor] = {}
        self._began = time.monotonic()

    def resume(self) -> None:
        """Take up the newest checkpoint, or give every rank the same first weights."""
        found = self.communicator.on_root(lambda: load_checkpoint(self.folder / "checkpoints"))
        if found is None:
            tensors = self.policy.tensors()
            self.communicator.broadcast(tensors.values())
            self.policy.set_tensors(tensors)
        else:
            tensors, state = found
            self.state = _State(**{name: state[name] for name in asdict(self.state)})
            self.saved = {"policy": {}, "learner": {}, "start": {}, "best": {}}
            for name, tensor in tensors.items():
                group, _, rest = name.partition("/")
                self.saved[group][rest] = tensor
            self.policy.set_tensors(self.saved["policy"])
            self.learner.load_state_dict(self.saved["learner"], state["learner"])
            self.best = self.saved["best"]
            self._began -= self.state.seconds
            self._tell(f"goes on after step {self.state.step}")
        if self.communicator.rank == 0:
            self.log = MetricsLog(self.folder / "metrics.jsonl", self.state.step)

    def start(self) -> None:
        """The steps that give the policy its first weights, where the start has any; then the first evaluation."""
        state, settings = self.state, self.config.teachers.start
        if state.started:
            return
        self._tell(f"starts from {settings.name}")
        work = self.pretraining = self.start_plugin.pretraining(settings, self.policy, self.context)
        if work is None:
            state.started = True
            return
        if self.saved:
            work.load_state_dict(self.saved["start"])
        while state.start_step < work.steps:
            loss = work.step(state.start_step)
            state.start_step += 1
            state.step += 1
            last = state.start_step == work.steps
            if state.start_step % 50 == 0 or last:
                self._log(phase="start", loss=loss)
                self._tell(f"start {state.start_step}/{work.steps}, loss {loss:.4f}", loss=loss)
            if last:
                state.started, self.pretraining = True, None
                self._consider()
                if state.streak == 1:  # it may be good already: other goals say so before rounds are spent on it
                    self._consider(goals=2)
            if state.start_step % 20 == 0 or last:
                self.boundary(self._save)

    def improve(self) -> None:
        """Rounds of the algorithm until the target is reached twice in a row, or they are used up."""
        state, learner = self.state, self.learner
        while state.streak < 2 and state.round < learner.rounds:
            result = learner.update(state.round, learner.collect(state.round))
            state.round += 1
            state.step += 1
            state.environment_steps += result.environment_steps
            self._log(phase="improve", **result.numbers)
            shown = {"success": "success {:.2f} with noise", "mean_return": "return {:.0f}"}
            said = [form.format(result.numbers[name]) for name, form in shown.items() if name in result.numbers]
            self._tell(", ".join([f"{self.config.teachers.algorithm.name} {state.round}/{learner.rounds}", *said]))
            if state.round == learner.rounds or state.round % self.settings.evaluate_every_rounds == 0:
                self._consider(goals=1 + state.streak)
            self.boundary(self._save)
        learner.close()

    def publish(self) -> None:
        """Write the best policy, its evaluation on the goals of the final comparison, and DONE."""
        if not self.best:
            self._consider()  # without first steps and without rounds nothing was evaluated yet
        self.policy.set_tensors(self.best)
        teachers = self.config.teachers
        provenance = {
            "seed": self.config.seed,
            "start": teachers.start.name,
            "ranks": self.communicator.size,
            "best": self.state.best,
            "reward_version": self.context.task.reward_version,
            "environment_version": self.context.task.environment_version,
            "versions": {name: metadata.version(name) for name in ("torch", "numpy")},
        }
        write = partial(save_teacher, policy=self.policy, provenance=provenance, algorithm=teachers.algorithm.name)
        evaluations = self.state.evaluations
        publish_teacher(self.run, self.policy, self.context, write, "published", self._began, evaluations)

    def _consider(self, goals: int = 1) -> None:
        """Evaluate the policy as it stands, and remember it if it is better than every one before."""
        state = self.state
        # other goals than those of the final comparison: choosing on them would flatter the teacher. A second success
        # in a row must be one on yet other goals
        episodes, seed = self.settings.evaluation_episodes, self.config.evaluation.seed + goals
        results = evaluate_on_all_ranks(self.policy, self.context, episodes, seed)
        record = {"step": state.step, "environment_steps": state.environment_steps, **task_record(results)}
        rate = record["successes"] / record["episodes"]
        state.streak = state.streak + 1 if rate >= self.settings.target_success else 0
        state.evaluations.append(record)
        if state.best is None or _score(record) > _score(state.best):
            state.best = record
            self.best = self.policy.tensors()
        self._log(phase="evaluation", success=rate, mean_return=record["mean_return"])
        self._tell(f"evaluated, success {record['successes']}/{record['episodes']}", last=True)

    def _tell(self, text: str, last: bool = False, loss: float | None = None) -> None:
        """Say `text`, and where the training is."""
        state, steps = self.state, None if self.pretraining is None else self.pretraining.steps
        improving = (self.config.teachers.algorithm.name, state.round, self.learner.rounds, loss, "rounds")
        self.progress.update(text, last, *(improving if state.started else ("start", state.start_step, steps, loss)))

    def _log(self, **values: Any) -> None:
        if self.log is not None:
            self.log.append(self.state.step, environment_steps=self.state.environment_steps, **values)

    def _save(self) -> None:
        learner, plain = self.learner.state_dict()
        start = {} if self.pretraining is None else self.pretraining.state_dict()
        groups = {"policy": self.policy.tensors(), "learner": learner, "start": start, "best": self.best}
        tensors = {f"{group}/{name}": x for group, named in groups.items() for name, x in named.items()}
        state = {**asdict(self.state), "learner": plain, "seconds": time.monotonic() - self._began}
        self.communicator.on_root(lambda: save_checkpoint(self.folder / "checkpoints", self.state.step, tensors, state))


def _score(record: dict[str, Any]) -> tuple[float, float]:
    """More successes are better; where none succeeded, more reward. Equal scores keep the earlier policy.

    Between successful policies reward says nothing: an evaluated episode ends at its first success.
    """
    return record["successes"], record["mean_return"] if record["successes"] == 0 else 0.0
