"""One number per task of the stream: an ablation, for the number of tasks must be known from the beginning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from hpc_cpd.settings import PluginSettings

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from hpc_cpd.student.embeddings.base import NewTasks


class OneHotSettings(PluginSettings):
    """It has none."""

    name: Literal["one_hot"] = "one_hot"


class OneHot:
    """One number per task of the stream; how many there will be must be known."""

    Settings = OneHotSettings
    infers_tasks = False
    needs_all_tasks = True

    @staticmethod
    def learn(settings: OneHotSettings, new: NewTasks) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
        import numpy as np

        rows = np.eye(len(new.all_tasks), dtype=np.float32)
        return {}, {task: rows[new.all_tasks.index(task)] for task in new.tasks}

    @staticmethod
    def inference(*_: Any) -> None:
        return None


plugin = OneHot
