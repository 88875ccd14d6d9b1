"""Low-rank adapters for every stage (LoRA, arXiv 2106.09685) on the frozen student of stage 1.

A task of a later stage acts with W + up @ down of its own stage, so the student must be told its task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from hpc_cpd.methods.base import Method, MethodSettings, Phase, Samples

if TYPE_CHECKING:
    from torch import Tensor

    from hpc_cpd.student.network import Student


class LoRASettings(MethodSettings):
    """The size of the student of stage 1, and that of the adapters."""

    name: Literal["lora"] = "lora"
    rank: int = Field(8, ge=1, description="rank of a stage's adapters")


class LoRA(Method):
    """LoRA: stage 1 trains the student, every later stage only low-rank adapters of its own."""

    Settings = LoRASettings
    needs_task = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._kept: dict[str, Tensor] = {}  # ``STAGE/PARAMETER_up`` and ``_down`` of every stage that has ended

    def adapt(self, student: Student, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if self.stage.number == 1:
            return state
        from hpc_cpd.methods._adapters import add_adapters

        add_adapters(student, self.settings.rank, self.config.seed, self.stage.number)
        return {name: t.clone() for name, t in student.state_dict().items() if is_adapter(name)} | dict(state)

    def freeze(self, student: Student, phase: Phase, new_experts: Sequence[int]) -> Mapping[str, Tensor]:
        if self.stage.number == 1:
            return super().freeze(student, phase, new_experts)
        for parameters in (student.shared_parameters(), student.gate_parameters(), student.expert_parameters()):
            for name, parameter in parameters:
                parameter.requires_grad_(is_adapter(name))
        return {}

    def end_stage(
        self, state: Mapping[str, Tensor], student: Callable[[], Student], samples: Callable[[int], Samples]
    ) -> Mapping[str, Tensor]:
        if self.stage.number == 1:
            return state
        self._kept |= {f"{self.stage.number}/{name}": tensor for name, tensor in state.items() if is_adapter(name)}
        return {name: tensor for name, tensor in state.items() if not is_adapter(name)}

    def state_dict(self) -> dict[str, Tensor]:
        return self._kept

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        self._kept = dict(tensors)

    @staticmethod
    def acting(tensors: Mapping[str, Tensor]) -> Any:
        from hpc_cpd.methods._adapters import Adapters

        return Adapters(tensors)


def is_adapter(name: str) -> bool:
    """Whether the parameter `name` of a student with adapters is part of one."""
    return name.endswith(("_up", "_down"))


plugin = LoRA
