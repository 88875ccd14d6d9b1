"""Synaptic Intelligence (arXiv 1703.04200): a regulariser that finds out, while a stage learns, what matters to it.

An example of a continual-learning method whose state changes with every step. Copy this folder, change the names, and
install it beside hpc_cpd (``pip install -e .``); then ``method: synaptic_intelligence`` in a config finds it.

**The method.** A step that moves a parameter by d, against a gradient g of the loss, lowers the loss by about -g * d.
The sum of these over the steps of a stage is the *path integral*: how much of what was learnt is owed to the parameter.
Divided by the square of how far the parameter went in all, it is its importance, and later stages pay
``coefficient * importance * (parameter - where the last stage ended)^2``.

**What to copy.**

- The settings stand in this file. Users write ``method: {name: synaptic_intelligence, coefficient: 10}``.
- No torch at the top: the settings are also read on login nodes, where importing it takes seconds.
- All state is in `state_dict`, so that it is part of every checkpoint: a stage that is killed between two steps goes on
  with the same bits. What lives only within a step (`_before`) is no state.
- A key ``PARAMETER|word`` belongs to a parameter. Experts may be spread over the ranks; each rank gives what belongs to
  the parameters that it holds, and gets only that back. So this file never asks for its rank.
- When `gradients` is called, the gradients have been averaged over the ranks: every rank that holds a parameter sees
  the same gradient, of the loss of the whole batch, and the path integrals need no communication.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from hpc_cpd.errors import UserError
from hpc_cpd.methods.base import Method, MethodSettings, Samples, sum_over_parameters

if TYPE_CHECKING:
    from torch import Tensor

    from hpc_cpd.student.network import Student


class SynapticIntelligenceSettings(MethodSettings):
    """The two numbers of the paper."""

    name: Literal["synaptic_intelligence"] = "synaptic_intelligence"
    coefficient: float = Field(1.0, ge=0, description="weight of the regulariser (c in the paper)")
    damping: float = Field(
        1e-3, gt=0, description="added to squared distances, for parameters that hardly moved (xi in the paper)"
    )


class SynapticIntelligence(Method):
    """Fine-tuning with a quadratic penalty, weighted by path integrals."""

    Settings = SynapticIntelligenceSettings

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # by PARAMETER|path: the path integral of this stage; PARAMETER|start: the parameter when the stage began;
        # PARAMETER|importance: from the stages before. Each is float32 of the parameter's shape.
        self.kept: dict[str, Tensor] = {}
        self._before: dict[str, tuple[Tensor, Tensor]] = {}  # (parameter, gradient) before the step that is being made

    def check(self, stages: int) -> None:
        """At launch: with ZeRO no rank has whole gradients, and `gradients` is not called."""
        if self.config.distill.zero_stage:
            raise UserError(
                "method synaptic_intelligence needs whole gradients on every rank, but distill.zero_stage is "
                f"{self.config.distill.zero_stage}; set distill.zero_stage=0"
            )

    def extra_loss(self, student: Student, batch: Any, gate: Tensor, share: float) -> Tensor:
        """The penalty. Nothing is important in stage 1, where it is zero."""

        def penalty(name: str, parameter: Tensor) -> Tensor | None:
            importance = self.kept.get(f"{name}|importance")
            if importance is None:
                return None
            return (importance * (parameter - self.kept[f"{name}|start"]).square()).sum()

        return self.settings.coefficient * sum_over_parameters(student, penalty)

    def gradients(self, student: Student, reference: Sequence[Tensor] | None) -> None:
        """Before a step: note where each parameter is, and the gradient of the loss without the penalty."""
        for name, parameter in student.named_parameters():
            if parameter.grad is None:  # frozen in this phase
                continue
            here = parameter.detach().clone()
            start = self.kept.setdefault(f"{name}|start", here)  # the first step of a parameter begins where it began
            gradient = parameter.grad.clone()  # it will be clipped, then freed
            if f"{name}|importance" in self.kept:
                gradient -= 2 * self.settings.coefficient * self.kept[f"{name}|importance"] * (here - start)
            self._before[name] = here, gradient

    def after_step(self, student: Student) -> None:
        """After a step: go on with the path integrals."""
        for name, parameter in student.named_parameters():
            if name in self._before:
                before, gradient = self._before.pop(name)
                gained = -gradient * (parameter.detach() - before)
                self.kept[f"{name}|path"] = self.kept.get(f"{name}|path", 0.0) + gained

    def end_stage(
        self, state: Mapping[str, Tensor], student: Callable[[], Student], samples: Callable[[int], Samples]
    ) -> Mapping[str, Tensor]:
        """Turn the path integrals into importance. Negative sums become zero, as in the authors' code."""
        for name in [key.removesuffix("|path") for key in self.kept if key.endswith("|path")]:
            path, start = self.kept.pop(f"{name}|path"), self.kept[f"{name}|start"]
            reached = state[name].to(path)
            importance = path / ((reached - start).square() + self.settings.damping)
            self.kept[f"{name}|importance"] = (self.kept.get(f"{name}|importance", 0.0) + importance).clamp(min=0.0)
            self.kept[f"{name}|start"] = reached
        return state

    def state_dict(self) -> dict[str, Tensor]:
        return self.kept

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        from hpc_cpd.distributed.torch import device_of_rank

        self.kept = {key: tensor.to(device_of_rank()) for key, tensor in tensors.items()}
