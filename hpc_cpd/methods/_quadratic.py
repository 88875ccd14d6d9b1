"""Weight regularisers: one quadratic, sum of importance * (parameter - anchor)^2, around the parameters of past stages.

Methods differ in what is important, and in how importance and anchor are carried from stage to stage. Sums of such
quadratics are again one, so what is kept does not grow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from hpc_cpd.methods.base import Method, MethodSettings, Samples, sum_over_parameters

if TYPE_CHECKING:
    from torch import Tensor

    from hpc_cpd.student.network import Student

IMPORTANCE_SAMPLES = 256  # of the default student with 25 experts, under a minute on one core


class QuadraticSettings(MethodSettings):
    """Settings of a weight regulariser."""

    coefficient: float = Field(100.0, ge=0, description="weight of the regulariser")


class QuadraticMethod(Method):
    """Fine-tuning under a quadratic penalty. Keys of `importance` and `anchor` are canonical parameter names."""

    Settings: ClassVar[type[MethodSettings]] = QuadraticSettings
    measured_by: ClassVar[str]
    """The function of `_importance` that finds out what is important."""
    decay: float = 1.0
    """What a stage leaves of the importance before it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._on_device: dict[str, tuple[Tensor, Tensor]]
        self.load_state_dict({})

    def measure(self, student: Student, samples: Samples) -> dict[str, Tensor]:
        """The importance of every parameter of `student`, which holds all its experts; shaped like the parameters."""
        from hpc_cpd.methods import _importance

        found: dict[str, Tensor] = getattr(_importance, self.measured_by)(student, samples)
        return found

    def carried_on(self, name: str, importance: Tensor, reached: Tensor) -> tuple[Tensor, Tensor]:
        """(importance, anchor) of parameter `name` for the next stage, from those measured and reached now.

        From the second stage on.
        """
        return self.decay * self.importance[name] + importance, reached

    def extra_loss(self, student: Student, batch: Any, gate: Tensor, share: float) -> Tensor | None:
        """Half the quadratic, scaled so that the mean over ranks of its gradient is the gradient of the whole."""
        if not self.importance:
            return None

        def half(name: str, parameter: Tensor) -> Tensor | None:
            if name not in self.importance:
                return None
            if name not in self._on_device:  # once, not in every step
                self._on_device[name] = self.importance[name].to(parameter), self.anchor[name].to(parameter)
            importance, anchor = self._on_device[name]
            return 0.5 * (importance * (parameter - anchor).square()).sum()

        return self.settings.coefficient * sum_over_parameters(student, half)

    def end_stage(
        self, state: Mapping[str, Tensor], student: Callable[[], Student], samples: Callable[[int], Samples]
    ) -> Mapping[str, Tensor]:
        """Measure importance around the parameters that the stage reached; the ranks share the samples."""
        import torch

        from hpc_cpd.distributed.torch import run_on_all_ranks

        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

        def of_my_samples() -> dict[str, Tensor]:
            mine = Samples(*(part.tensor_split(world_size)[rank] for part in samples(IMPORTANCE_SAMPLES)))
            found = self.measure(student(), mine)
            return {name: (mean * (len(mine.steps) / IMPORTANCE_SAMPLES)).cpu() for name, mean in found.items()}

        found = run_on_all_ranks(of_my_samples)
        for mean in found.values():
            torch.distributed.all_reduce(mean)
        first = not self.importance
        for name, mean in found.items():
            carried = (mean, state[name]) if first else self.carried_on(name, mean, state[name])
            self.importance[name], self.anchor[name] = carried
        self._on_device = {}
        return state

    def state_dict(self) -> dict[str, Tensor]:
        importance = {f"importance/{name}": tensor for name, tensor in self.importance.items()}
        return importance | {f"anchor/{name}": tensor for name, tensor in self.anchor.items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        self.importance, self.anchor = (
            {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            for prefix in ("importance/", "anchor/")
        )
        self._on_device = {}
