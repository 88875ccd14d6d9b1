"""A published student: how it is stored, and how it acts. No other process is needed, and no DeepSpeed.

FOLDER/model.safetensors    canonical student state, task vectors, how episodes begin, state of embedding and method
FOLDER/mixture-0-expert-0007.safetensors    one expert; the same file as in the stage before where it did not change
FOLDER/student.json         schema version, shape, experts, tasks in the order learnt, SHA-256 of each file, metadata
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from hpc_cpd import plugins
from hpc_cpd.errors import UserError
from hpc_cpd.run.publish import atomic_folder, write_json
from hpc_cpd.settings import Choice, PluginSettings
from hpc_cpd.student.checkpoint import MethodState, file_of, read_description, read_tensors, write_tensors
from hpc_cpd.student.network import Student, StudentShape
from hpc_cpd.student.task_inference import EpisodeStatistics, remember
from hpc_cpd.tasks.policy import Policy

STUDENT_SCHEMA_VERSION = 4
MODEL_FILE = "model.safetensors"
JSON_FILE = "student.json"
_KEYS = ("shape", "experts_by_stage", "tasks", "task_steps", "task_embedding", "method", "files", "metadata")


@dataclass(frozen=True)
class StudentParts:
    """What a student folder holds, for the next stage or for analysis."""

    state: Mapping[str, Tensor]  # canonical names
    shape: StudentShape
    experts_by_stage: list[list[int]]
    task_vectors: Mapping[str, np.ndarray]  # float32 [D] each, in the order learnt
    episode_statistics: Mapping[str, EpisodeStatistics]  # of every task, for a student that is not told which it is
    task_embedding: PluginSettings  # what gave the vectors, and
    task_embedding_state: Mapping[str, Tensor] = field(default_factory=dict)  # what that keeps
    method_state: MethodState | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)  # plain JSON without NaN

    def normaliser(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean, standard deviation) of observations, float32 [obs] each."""
        return self.state["tokenizer.observation_mean"].numpy(), self.state["tokenizer.observation_std"].numpy()


def save_student(folder: Path, parts: StudentParts, before: Path | None = None) -> None:
    """Write a student folder atomically, with the files of experts that did not change since the student `before`."""
    method = parts.method_state
    files: dict[str, dict[str, Tensor]] = {MODEL_FILE: {}}
    for name, value in parts.state.items():
        file = file_of(name, MODEL_FILE)
        files.setdefault(file, {})[f"student/{name}" if file == MODEL_FILE else name] = value
    tensors = files[MODEL_FILE]
    tensors |= {f"task_vector/{task}": torch.tensor(np.asarray(v)) for task, v in parts.task_vectors.items()}
    tensors |= {f"task_embedding/{name}": value for name, value in parts.task_embedding_state.items()}
    tensors |= {f"task_start/{task}": torch.tensor(known.start) for task, known in parts.episode_statistics.items()}
    tensors |= {f"method/{name}": value for name, value in method.tensors.items()} if method is not None else {}
    ready = {file: {n: t.detach().cpu().contiguous() for n, t in found.items()} for file, found in files.items()}
    with atomic_folder(folder) as temporary:
        description = {
            "schema_version": STUDENT_SCHEMA_VERSION,
            "shape": parts.shape.model_dump(),
            "experts_by_stage": [list(stage) for stage in parts.experts_by_stage],
            "tasks": list(parts.task_vectors),
            "task_steps": {task: known.steps for task, known in parts.episode_statistics.items()},
            "task_embedding": parts.task_embedding.model_dump(),
            "method": method.method if method is not None else None,
            "files": write_tensors(temporary, ready, [before / JSON_FILE] if before is not None else ()),
            "metadata": dict(parts.metadata),
        }
        write_json(temporary / JSON_FILE, description)


def load_student_parts(folder: str | Path) -> StudentParts:
    """Read and verify a student folder. Raises UserError when it is missing, damaged, or of another schema."""
    path = Path(folder) / JSON_FILE
    if not path.is_file():
        raise UserError(f"{folder} is not a student folder (no {JSON_FILE}); give a run's stages/K/student")
    remedy = "load it with the version that its run's provenance.json names, or learn its stages again in a new run"
    description = read_description(path, STUDENT_SCHEMA_VERSION, _KEYS, remedy)
    files = dict(description["files"])
    tensors = read_tensors(Path(folder) / MODEL_FILE, files.pop(MODEL_FILE, None))
    state = _with_prefix(tensors, "student/")
    for name, digest in files.items():
        state |= read_tensors(Path(folder) / name, digest)
    vectors, starts = _with_prefix(tensors, "task_vector/"), _with_prefix(tensors, "task_start/")
    tasks, steps, method = description["tasks"], description["task_steps"], description["method"]
    for task in tasks:
        if task not in vectors or task not in starts:
            raise UserError(f"{path} names task {task}, but {MODEL_FILE} has no vector of it; run the stage again")
    try:
        shape = StudentShape.model_validate(description["shape"])
        embedding = Choice("embeddings", "contrastive").resolve(description["task_embedding"])
    except (ValidationError, UserError) as error:
        reason = error.errors()[0] if isinstance(error, ValidationError) else None
        told = error if reason is None else f"{'.'.join(map(str, reason['loc']))}: {reason['msg']}"
        raise UserError(f"{path} does not describe a student that can be built here: {told}") from None
    return StudentParts(
        state=state,
        shape=shape,
        experts_by_stage=description["experts_by_stage"],
        task_vectors={task: vectors[task].numpy() for task in tasks},
        episode_statistics={task: EpisodeStatistics(steps[task], starts[task].numpy()) for task in tasks},
        task_embedding=embedding,
        task_embedding_state=_with_prefix(tensors, "task_embedding/"),
        method_state=MethodState(method, _with_prefix(tensors, "method/")) if method is not None else None,
        metadata=description["metadata"],
    )


def load_student(folder: str | Path, device: str | torch.device = "cpu") -> StudentPolicy:
    """Load a published student for acting on `device`. Raises UserError when the folder is not a whole student."""
    parts = load_student_parts(folder)
    try:
        return StudentPolicy(parts, device)
    except (ValueError, KeyError) as error:
        raise UserError(f"{folder} does not hold a student this version can build: {error}") from None


class StudentPolicy(Policy):
    """Acts in `num_envs` environments of one task at once, with the last observations as its memory."""

    def __init__(self, parts: StudentParts, device: str | torch.device = "cpu") -> None:
        self.shape = parts.shape
        self.experts_by_stage = parts.experts_by_stage
        self.task_vectors = parts.task_vectors
        self.metadata = parts.metadata
        self.student = Student(parts.shape, parts.experts_by_stage, executor="stacked")
        self.student.load_canonical(parts.state)
        self.student.to(device).eval().requires_grad_(False)
        self._device = torch.device(device)
        method = self._method = parts.method_state
        # an object that gives the state that a stage's tasks act with, or None
        self._weights_of_stages: Any = method and plugins.load("methods", method.method).acting(method.tensors)
        self._state = parts.state
        self._stage = 0  # whose weights are in place: nobody's
        embedding = plugins.load("embeddings", parts.task_embedding.name)
        self.inference = embedding.inference(parts.task_embedding, parts, self._device)
        self._rows = 0

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
            if self._method is not None and self._weights_of_stages is not None:
                raise UserError(
                    f"this student acts with weights that belong to a task's stage ({self._method.method}), so it "
                    f"must be told the task; name one instead of None: {', '.join(self.task_ids)}"
                )
            if self.inference is None:
                raise UserError("this student cannot infer the task from what it sees; name a task instead of None")
            vectors = torch.zeros(num_envs, self.shape.task_vector_size)
        elif task_id in self.task_vectors:
            vectors = torch.tensor(self.task_vectors[task_id]).repeat(num_envs, 1)
            self.act_as_learnt([task_id])
        else:
            hint = plugins.hint(task_id, self.task_ids)
            raise UserError(f"this student does not know task '{task_id}'; {hint}It knows: {', '.join(self.task_ids)}")
        self._rows = num_envs
        self._infer = task_id is None
        self._vectors = vectors.to(self._device)
        self._cache = self.student.backbone.new_cache(num_envs)
        if self._infer:
            self.inference.begin(num_envs)
            size = (num_envs, self.shape.history, self.shape.observation_size)
            self._past = torch.zeros(size, device=self._device)

    def act_as_learnt(self, task_ids: Iterable[str]) -> None:
        """Put the weights in place that these tasks act with; only weights that a stage has to itself ever change.

        Raises ValueError when the tasks do not all act with the same.
        """
        if self._weights_of_stages is None:
            return
        wanted = set(task_ids)
        stages = {n for n, tasks in enumerate(self.metadata["tasks_by_stage"], start=1) if wanted.intersection(tasks)}
        if len(stages) != 1:
            raise ValueError(f"tasks of the stages {sorted(stages)} do not act with the same weights")
        (stage,) = stages
        if stage != self._stage:
            self.student.load_canonical(self._weights_of_stages.state_of_stage(self._state, stage))
            self._stage = stage

    def reset_rows(self, mask: np.ndarray) -> None:
        """Forget the history of the environments flagged by `mask` bool [num_envs]: they begin a new episode."""
        self._cache.ages[torch.tensor(np.asarray(mask, dtype=bool), device=self._device)] = 0

    def act(self, observations: np.ndarray) -> np.ndarray:
        """Observations float32 [num_envs, obs] -> actions float32 [num_envs, act], clipped to [-1, 1].

        Raises UserError when `reset` was not called or the shape is another.
        """
        seen = torch.tensor(np.asarray(observations, dtype=np.float32), device=self._device)
        wanted = (self._rows, self.shape.observation_size)
        if self._rows == 0:
            raise UserError("call reset(task_id, num_envs) before act(observations)")
        if tuple(seen.shape) != wanted:
            raise UserError(f"observations have shape {list(seen.shape)}, but [num_envs, obs] is {list(wanted)}")
        with torch.inference_mode():
            if self._infer:
                self._infer_tasks(seen)
            clipped: np.ndarray = self._newest(seen).clamp(-1.0, 1.0).cpu().numpy()
        return clipped

    def _newest(self, seen: Tensor) -> Tensor:
        return self.student(seen[:, None], self._vectors, cache=self._cache)[0][:, 0]

    def _infer_tasks(self, seen: Tensor) -> None:
        """Take each environment's likeliest task for its task."""
        vectors = self.inference.vectors(seen, self._cache.ages)
        changed, self._vectors = not torch.equal(vectors, self._vectors), vectors
        if changed:
            self._see_the_past_again()
        remember(self._past, seen, self._cache.ages)

    def _see_the_past_again(self) -> None:
        """What the student keeps of past observations was computed for another task: look at them again."""
        now = self._cache.ages
        count = now.clamp(max=self.shape.history - 1)
        first = (now.clamp(max=self.shape.history) - count)[:, None]
        for step in range(int(count.max())):
            # rows that have no more past get an observation at the age of the newest one, which will replace it
            self._cache.ages = torch.where(step < count, now - count + step, now)
            place = (first + step).clamp(max=self.shape.history - 1)
            self._newest(self._past.take_along_dim(place[:, :, None], dim=1)[:, 0])
        self._cache.ages = now


class TaskAgnosticPolicy(Policy):
    """A student that is never told its task: it infers it from what it sees, and whoever plays it need not know."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def reset(self, task_id: str | None, num_envs: int) -> None:
        self.policy.reset(None, num_envs)

    def act(self, observations: np.ndarray) -> np.ndarray:
        return self.policy.act(observations)


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
