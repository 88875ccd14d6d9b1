"""What a start of a teacher must offer: the first weights of its policy, and hints for the algorithm that goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from hpc_cpd.settings import PluginSettings
from hpc_cpd.tasks.families.base import TaskSpec
from hpc_cpd.teachers.algorithms.base import Algorithm, Hints, TeacherContext

if TYPE_CHECKING:
    from torch import Tensor


class Pretraining(Protocol):
    """Steps that give the policy its first weights, on every rank alike: all methods are called on all ranks together.

    Draws must be pure functions of the seed, the task and the number of the step, like those of a `Learner`.
    """

    steps: int

    def step(self, number: int) -> float:
        """Do step `number`, counted from 0; the loss, the same on every rank."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must hold besides the policy's tensors."""

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint; the policy has its tensors already."""


class Start(Protocol):
    """The plug-in. Its settings are checked on machines without torch: import it only in `pretraining`."""

    Settings: type[PluginSettings]

    def check(self, settings: Any, task: TaskSpec, ranks: int, algorithm: Algorithm) -> None:
        """Raise UserError when a teacher of `task` cannot start like this on so many ranks. Imports no torch."""

    def hints(self, settings: Any) -> Hints:
        """What the algorithm should know of the policy that it is given."""

    def pretraining(self, settings: Any, policy: Any, context: TeacherContext) -> Pretraining | None:
        """Prepare the first steps of `policy`, the algorithm's; None: there are none.

        Called again when a training goes on within these steps. All ranks call it together.
        """
