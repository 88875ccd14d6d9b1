"""Task vectors by contrastive learning (InfoNCE, arXiv 1807.03748): windows of one task lie together.

The network and its loss are in `hpc_cpd.student.task_encoder`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from hpc_cpd.settings import PluginSettings

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, device

    from hpc_cpd.student.embeddings.base import NewTasks
    from hpc_cpd.student.policy import StudentParts
    from hpc_cpd.student.task_inference import TaskInference


class ContrastiveSettings(PluginSettings):
    """The task encoder and its training."""

    name: Literal["contrastive"] = "contrastive"
    size: int = Field(32, ge=1, description="length of a task vector")
    window: int = Field(8, ge=1, description="observations per encoded window")
    width: int = Field(128, ge=1, description="hidden width")
    gradient_steps: int = Field(400, ge=1, description="Adam steps per stage")
    windows_per_task: int = Field(16, ge=2, description="windows per task and step")
    learning_rate: float = Field(1e-3, gt=0, description="Adam step size")
    temperature: float = Field(0.1, gt=0, description="softmax temperature of the similarities")


class Contrastive:
    """Task vectors by contrastive learning: windows of one task lie together."""

    Settings = ContrastiveSettings
    infers_tasks = True
    needs_all_tasks = False

    @staticmethod
    def learn(settings: ContrastiveSettings, new: NewTasks) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
        from hpc_cpd.student.task_encoder import learn_task_vectors

        return learn_task_vectors(settings, new)

    @staticmethod
    def inference(settings: ContrastiveSettings, parts: StudentParts, device: device) -> TaskInference:
        from hpc_cpd.student.task_inference import TaskInference

        return TaskInference(settings, parts, device)


plugin = Contrastive
