"""Weight regularisers: one quadratic, sum of importance * (parameter - anchor)^2, around the parameters of past stages.

Methods differ in what is important, and in how importance and anchor are carried from stage to stage. Sums of such
quadratics are again one, so what is kept does not grow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from hpc_cpd.methods.base import Method, MethodSettings, Samples

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

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.importance: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        self._on_device: dict[str, tuple[Tensor, Tensor]] = {}

    def measure(self, student: Student, samples: Samples) -> dict[str, Tensor]:
        """The importance of every parameter of `student`, which holds all its experts; shaped like the parameters."""
        raise NotImplementedError  # abstract: every regulariser measures another importance

    def carried_on(
        self, name: str, importance: Tensor, reached: Tensor
    ) -> tuple[Tensor, Tensor]:  # from the second stage on
        """(importance, anchor) of parameter `name` for the next stage, from those measured and reached now."""
        return importance, reached

    def extra_loss(self, student: Student, batch: Any, gate: Tensor, share: float) -> Tensor | None:
        """Half the quadratic, scaled so that the mean over ranks of its gradient is the gradient of the whole."""
        import torch

        if not self.importance:
            return None
        total = torch.zeros((), device=next(student.parameters()).device)
        for name, parameter in student.named_parameters():
            if not parameter.requires_grad or name not in self.importance:
                continue
            # an expert's gradient is averaged over all ranks but only world / size of them hold it
            copies = 1 if getattr(parameter, "allreduce", True) else student.expert_parallel_size
            if name not in self._on_device:  # once, not in every step
                self._on_device[name] = self.importance[name].to(parameter), self.anchor[name].to(parameter)
            importance, anchor = self._on_device[name]
            distance = (parameter - anchor).square()
            total = total + 0.5 * copies * (importance * distance).sum()
        return self.settings.coefficient * total

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
        carried = {
            name: (mean, state[name]) if first else self.carried_on(name, mean, state[name])
            for name, mean in found.items()
        }
        self.importance = {name: importance for name, (importance, _) in carried.items()}
        self.anchor = {name: anchor for name, (_, anchor) in carried.items()}
        self._on_device = {}
        return state

    def state_dict(self) -> dict[str, Tensor]:
        return {
            f"{word}/{name}": tensor
            for word, tensors in (("importance", self.importance), ("anchor", self.anchor))
            for name, tensor in tensors.items()
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        self.importance, self.anchor = (
            {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            for prefix in ("importance/", "anchor/")
        )
        self._on_device = {}
