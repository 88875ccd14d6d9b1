"""A published student: how it is stored, and how it acts. No other process is needed, and no DeepSpeed.

FOLDER/model.safetensors    canonical student state, task vectors, how episodes begin, task encoder, stages' own weights
FOLDER/student.json         schema version, shape, experts, tasks in the order learnt, SHA-256, metadata
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from hpc_cpd import plugins
from hpc_cpd.errors import UserError
from hpc_cpd.run.publish import atomic_folder, read_json, sha256, write_bytes, write_json
from hpc_cpd.student.acting import Actor
from hpc_cpd.student.checkpoint import read_tensors, shape_from_json
from hpc_cpd.student.method_state import MethodState
from hpc_cpd.student.network import Student, StudentShape
from hpc_cpd.student.task_encoder import TaskEncoder
from hpc_cpd.student.task_inference import EpisodeStatistics, TaskInference, remember

STUDENT_SCHEMA_VERSION = 2
MODEL_FILE = "model.safetensors"
JSON_FILE = "student.json"


@dataclass(frozen=True)
class StudentParts:
    """What a student folder holds, for the next stage or for analysis."""

    state: dict[str, Tensor]  # canonical names
    shape: StudentShape
    experts_by_stage: list[list[int]]
    task_vectors: dict[str, np.ndarray]  # float32 [D] each, in the order learnt
    task_encoder_state: dict[str, Tensor] | None
    metadata: dict[str, Any]
    episode_facts: dict[str, EpisodeStatistics]  # of every task, for the student that is not told which it is
    method_state: MethodState | None = None

    def normaliser(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean, standard deviation) of observations, float32 [obs] each."""
        return self.state["observation_mean"].numpy(), self.state["observation_std"].numpy()


def save_student(folder: Path, parts: StudentParts) -> None:
    """Write a student folder atomically."""
    state, shape, task_vectors, episode_facts = parts.state, parts.shape, parts.task_vectors, parts.episode_facts
    task_encoder_state, metadata, kept = parts.task_encoder_state, parts.metadata, parts.method_state
    tensors = {f"student/{name}": value for name, value in state.items()}
    tensors |= {f"task_vector/{task}": torch.tensor(np.asarray(vector)) for task, vector in task_vectors.items()}
    tensors |= {f"task_encoder/{name}": value for name, value in (task_encoder_state or {}).items()}
    tensors |= {f"task_start/{task}": torch.tensor(facts.start) for task, facts in episode_facts.items()}
    tensors |= {f"method/{name}": value for name, value in kept.tensors.items()} if kept is not None else {}
    encoder = None
    if task_encoder_state is not None:
        encoder = TaskEncoder.sizes_of(task_encoder_state, shape.observation_size)
    with atomic_folder(folder) as temporary:
        model = temporary / MODEL_FILE
        write_bytes(model, safetensors.torch.save({n: t.detach().cpu().contiguous() for n, t in tensors.items()}))
        description = {
            "schema_version": STUDENT_SCHEMA_VERSION,
            "shape": shape.as_json(),
            "experts_by_stage": [list(stage) for stage in parts.experts_by_stage],
            "tasks": list(task_vectors),
            "task_steps": {task: facts.steps for task, facts in episode_facts.items()},
            "task_encoder": encoder,
            "model_sha256": sha256(model),
            "metadata": dict(metadata),
        }
        if kept is not None:
            description["method"] = kept.method
        write_json(temporary / JSON_FILE, description)


def load_student_parts(folder: str | Path) -> StudentParts:
    """Read and verify a student folder. Raises UserError when it is missing, damaged, or of another schema."""
    path = Path(folder) / JSON_FILE
    if not path.is_file():
        raise UserError(f"{folder} is not a student folder (no {JSON_FILE}); give a run's stages/K/student")
    description = read_json(path)
    version = description.get("schema_version") if isinstance(description, dict) else None
    if version != STUDENT_SCHEMA_VERSION:
        raise UserError(f"{path} has schema_version {version}, but this version reads {STUDENT_SCHEMA_VERSION}")
    missing = [
        k
        for k in ("shape", "experts_by_stage", "tasks", "task_steps", "model_sha256", "metadata")
        if k not in description
    ]
    if missing:
        raise UserError(f"{path} is damaged: it lacks {', '.join(missing)}; run the stage that makes it again")
    tensors = read_tensors(Path(folder) / MODEL_FILE, description["model_sha256"])
    vectors, facts = {}, {}
    for task in description["tasks"]:
        if f"task_vector/{task}" not in tensors or f"task_start/{task}" not in tensors:
            raise UserError(f"{path} names task {task}, but {MODEL_FILE} has no vector of it; run the stage again")
        vectors[task] = tensors[f"task_vector/{task}"].numpy()
        facts[task] = EpisodeStatistics(description["task_steps"][task], tensors[f"task_start/{task}"].numpy())
    method = description.get("method")
    kept = MethodState(method, _with_prefix(tensors, "method/")) if method is not None else None
    return StudentParts(
        state=_with_prefix(tensors, "student/"),
        shape=shape_from_json(description["shape"], path),
        experts_by_stage=description["experts_by_stage"],
        task_vectors=vectors,
        task_encoder_state=_with_prefix(tensors, "task_encoder/") or None,
        metadata=description["metadata"],
        episode_facts=facts,
        method_state=kept,
    )


def load_student(folder: str | Path) -> StudentPolicy:
    """Load a published student for acting. Raises UserError when the folder is not a whole student."""
    parts = load_student_parts(folder)
    try:
        return StudentPolicy(parts)
    except (ValueError, KeyError) as error:
        raise UserError(f"{folder} does not hold a student this version can build: {error}") from None


class StudentPolicy:
    """Acts in `num_envs` environments of one task at once, with the last observations as its memory."""

    def __init__(self, parts: StudentParts) -> None:
        self.shape = parts.shape
        self.experts_by_stage = parts.experts_by_stage
        self.task_vectors = parts.task_vectors
        self.metadata = parts.metadata
        self.student = Student(parts.shape, parts.experts_by_stage, inference=True)
        self.student.load_canonical(parts.state)
        self.student.eval().requires_grad_(False)
        self.actor = Actor(self.student)
        kept = parts.method_state
        self.isolation = plugins.load("methods", kept.method).acting(kept.tensors) if kept is not None else None
        if self.isolation is not None:
            self._state = parts.state
            stages = enumerate(parts.metadata["tasks_by_stage"], start=1)
            self._stages = {task: stage for stage, tasks in stages for task in tasks}
            self._stage = 0  # whose weights are in place: nobody's
        self.inference: TaskInference | None = None
        if parts.task_encoder_state is not None:
            encoder = TaskEncoder.from_state(parts.task_encoder_state, parts.shape.observation_size)
            mean, deviation = self.student.observation_mean, self.student.observation_std
            self.inference = TaskInference(encoder, parts.task_vectors, parts.episode_facts, mean, deviation)
        self._rows = 0

    @property
    def num_experts(self) -> int:
        return sum(map(len, self.experts_by_stage))

    @property
    def task_ids(self) -> list[str]:
        """Tasks this student has learnt, in that order."""
        return list(self.task_vectors)

    def reset(self, task_id: str | None, num_envs: int) -> None:
        """Forget everything and act in `num_envs` environments of `task_id`; None: infer the task from what is seen.

        Raises UserError for a task the student does not know, and for None where every stage has weights of its own.
        """
        if num_envs < 1:
            raise UserError(f"num_envs is {num_envs}, but a policy acts in at least 1 environment")
        if task_id is None:
            if self.isolation is not None:
                raise UserError(
                    f"this student acts with weights that belong to a task's stage , so it "
                    f"must be told the task; name one instead of None: {', '.join(self.task_ids)}"
                )
            if self.inference is None:
                raise UserError("this student has no task encoder to infer the task with; name a task instead of None")
            vectors = torch.zeros(num_envs, self.shape.task_vector_size)
        elif task_id in self.task_vectors:
            vectors = torch.tensor(self.task_vectors[task_id]).repeat(num_envs, 1)
            self.act_as_learnt([task_id])
        else:
            near = difflib.get_close_matches(task_id, self.task_ids, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise UserError(f"this student does not know task '{task_id}'; {hint}It knows: {', '.join(self.task_ids)}")
        self._rows = num_envs
        self._infer = task_id is None
        self._vectors = vectors
        self.actor.begin(num_envs)
        if self._infer:
            assert self.inference is not None
            self.inference.begin(num_envs)
            self._past = torch.zeros(num_envs, self.shape.history, self.shape.observation_size)
        self._gate_sum = torch.zeros(self.num_experts, dtype=torch.float64)
        self._gate_rows = 0

    def act_as_learnt(self, task_ids: Iterable[str]) -> None:
        """Put the weights in place that these tasks act with; only weights that a stage has to itself ever change.

        Raises ValueError when the tasks do not all act with the same.
        """
        if self.isolation is None:
            return
        stages = {self._stages[task] for task in task_ids}
        if len(stages) != 1:
            raise ValueError(f"tasks of the stages {sorted(stages)} do not act with the same weights")
        (stage,) = stages
        if stage != self._stage:
            self.student.load_canonical(self.isolation.state_of_stage(self._state, stage))
            self.actor = Actor(self.student)
            self._stage = stage

    def reset_rows(self, mask: np.ndarray) -> None:
        """Forget the history of the environments flagged by `mask` bool [num_envs]: they begin a new episode."""
        self.actor.ages[torch.tensor(np.asarray(mask, dtype=bool))] = 0

    def act(self, observations: np.ndarray) -> np.ndarray:
        """Observations float32 [num_envs, obs] -> actions float32 [num_envs, act], clipped to [-1, 1].

        Raises UserError when `reset` was not called or the shape is another.
        """
        seen = torch.tensor(np.asarray(observations, dtype=np.float32))
        wanted = (self._rows, self.shape.observation_size)
        if self._rows == 0:
            raise UserError("call reset(task_id, num_envs) before act(observations)")
        if tuple(seen.shape) != wanted:
            raise UserError(f"observations have shape {list(seen.shape)}, but [num_envs, obs] is {list(wanted)}")
        with torch.inference_mode():
            if self._infer:
                self._infer_tasks(seen)
            actions, gate = self.actor.act(seen, self._vectors)
            self._gate_sum += gate.double().sum(dim=0)
            self._gate_rows += self._rows
            clipped: np.ndarray = actions.clamp(-1.0, 1.0).numpy()
        return clipped

    @property
    def gate_usage(self) -> np.ndarray:
        """Mean gate probability of every expert (ascending global id) since `reset`, float64 [E]."""
        usage: np.ndarray = (self._gate_sum / max(1, self._gate_rows)).numpy()
        return usage

    def _infer_tasks(self, seen: Tensor) -> None:
        """Take each environment's likeliest task for its task."""
        assert self.inference is not None
        vectors = self.inference.vectors(seen, self.actor.ages)
        changed, self._vectors = not torch.equal(vectors, self._vectors), vectors
        if changed:
            self._see_the_past_anew()
        remember(self._past, seen, self.actor.ages)

    def _see_the_past_anew(self) -> None:
        """What the student keeps of past observations was computed for another task: look at them again."""
        now = self.actor.ages
        count = now.clamp(max=self.shape.history - 1)
        first = (now.clamp(max=self.shape.history) - count)[:, None]
        for step in range(int(count.max())):
            # rows that have no more past write where the newest observation will be written next
            self.actor.ages = torch.where(step < count, now - count + step, now)
            place = (first + step).clamp(max=self.shape.history - 1)
            self.actor.act(self._past.take_along_dim(place[:, :, None], dim=1)[:, 0], self._vectors)
        self.actor.ages = now


class TaskAgnosticPolicy:
    """A student that is never told its task: it infers it from what it sees, and `evaluate_policy` need not know."""

    def __init__(self, policy: StudentPolicy) -> None:
        self.policy = policy

    def reset(self, task_id: str | None, num_envs: int) -> None:
        self.policy.reset(None, num_envs)

    def act(self, observations: np.ndarray) -> np.ndarray:
        return self.policy.act(observations)


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
