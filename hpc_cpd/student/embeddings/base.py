"""What a task embedding must offer: a vector for every new task, which never changes afterwards.

A plug-in of kind ``student.task_embedding`` is any object with the attributes and functions of :class:`TaskEmbedding`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, device

    from hpc_cpd.settings import PluginSettings
    from hpc_cpd.student.policy import StudentParts
    from hpc_cpd.student.task_inference import TaskInference

    WindowsOf = Callable[[str, int, int, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class NewTasks:
    """What a stage knows when it gives its new tasks their vectors."""

    tasks: list[str]
    """The new ones."""
    remembered: list[str]
    """Old ones of which trajectories are kept."""
    all_tasks: list[str]
    """Every task of the stream, in the order of its stages, those of later stages too."""
    windows_of: WindowsOf
    """(task, n, length, random generator) -> raw observations float32 [n, length, obs] of a new task, or of a
    remembered one."""
    old_vectors: Mapping[str, np.ndarray]
    """float32 [D] of every task of the stages before; read, never changed."""
    state: Mapping[str, Tensor]
    """What the stage before returned, empty in stage 1."""
    mean: np.ndarray
    std: np.ndarray
    """The normaliser of the observations, float32 [obs] each."""
    seed: int
    stage: int
    """From 1."""


class TaskEmbedding(Protocol):
    """The plug-in. Its functions are pure: the same arguments give the same bits."""

    Settings: type[PluginSettings]
    infers_tasks: bool
    """Whether a student can find out its task (``evaluation.infer_task``)."""
    needs_all_tasks: bool
    """Whether the vectors depend on tasks of later stages: then a run's stream cannot be made longer."""

    @staticmethod
    def learn(settings: Any, new: NewTasks) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
        """(state for the next stage and for `inference`, float32 [D] of each new task)."""

    @staticmethod
    def inference(settings: Any, parts: StudentParts, device: device) -> TaskInference | None:
        """What infers the task of a student of these `parts` that acts on `device`. None: it has to be told its task.

        `parts` has the state that `learn` returned, the vectors of all tasks learnt, how their episodes begin, and the
        normaliser.
        """
