"""DeepSpeed: starting the ranks, and one training engine per phase.

DeepSpeed's engine, ZeRO (stages 0 to 2), mixed precision and expert-parallel groups are used as they are;
the mixture layer, the averaging of gradients and the checkpoints are ours (here and in `hpc_cpd.student`).
"""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hpc_cpd.distributed.torch import device_of_rank
from hpc_cpd.methods.base import Method
from hpc_cpd.optimizers import AdamW
from hpc_cpd.settings import DistillSettings
from hpc_cpd.student.checkpoint import MOMENTS, Moments
from hpc_cpd.student.network import Student


class PhaseEngine:
    """One DeepSpeed engine over one module for one phase.

    A new module and a new engine are built for every phase: DeepSpeed does not notice parameters that are
    frozen or freed later, and a second engine on the same module would keep the first alive.
    """

    def __init__(self, student: Student, settings: DistillSettings, total_steps: int, method: Method) -> None:
        """Wrap `student`, whose ``requires_grad`` flags already say what learns in this phase."""
        import deepspeed
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        self.student = student
        self.settings = settings
        self.total_steps = total_steps
        self.method = method
        trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
        groups = split_params_into_different_moe_groups_for_optimizer(
            {"params": trainable, "name": "dense", "lr": settings.learning_rate}, max_group_size=None
        )
        filled = [group for group in groups if group["params"]]
        on_cpu = device_of_rank().type == "cpu"
        # Frozen parameters have no state and weight decay 0 is honoured exactly: nothing frozen can move.
        # Fused is one pass over the weights: three to four times as fast on one core.
        self.optimizer = AdamW(
            filled, settings.learning_rate, weight_decay=settings.weight_decay, fused=on_cpu, foreach=not on_cpu
        )
        # weights and moments stay float32, and so do the gradients that ranks exchange (no safe modules)
        half = settings.precision == "bfloat16"
        config = {
            "train_micro_batch_size_per_gpu": 1,
            # numbers that ZeRO reduces at once; DeepSpeed's own default holds 2 GB
            "zero_optimization": {"stage": settings.zero_stage, "reduce_bucket_size": 5_000_000},
            "gradient_clipping": settings.max_gradient_norm if settings.zero_stage else 0.0,
            "torch_autocast": {"enabled": half, "dtype": "bfloat16", "lower_precision_safe_modules": []},
            "steps_per_print": 10**9,
        }
        self.engine: Any = deepspeed.initialize(model=student, optimizer=self.optimizer, config=config)[0]
        self._flat: dict[int, Tensor] = {}
        # DeepSpeed looks through all parameters in every step, also through those of old experts that are frozen
        self._dense = [parameter for parameter in trainable if getattr(parameter, "allreduce", True)]
        self._expert = [parameter for parameter in trainable if not getattr(parameter, "allreduce", True)]
        if not settings.zero_stage:
            self.engine.buffered_allreduce_fallback = self._average_all
            self.engine.zero_grad = self._drop_gradients
        self._held: list[tuple[Tensor, Tensor, Tensor]] = []
        self._zero = self.engine.optimizer if settings.zero_stage else None
        self.world_size = torch.distributed.get_world_size()

    def forward(self, *inputs: Any, **others: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(actions [B, L, act], load-balancing loss, gate probabilities [B, L, M, E]); see `Student.forward`."""
        result: tuple[Tensor, Tensor, Tensor] = self.engine(*inputs, **others)
        return result

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Global gradients of `loss`, scaled as for `step`, in the order of the parameters that learn. Not under ZeRO.

        A collective that changes nothing.
        """
        self.engine.backward(loss)
        taken = [parameter.grad for parameter in self.student.parameters() if parameter.requires_grad]
        self._drop_gradients()
        return [gradient for gradient in taken if gradient is not None]  # none is missing: `_average_all`

    def step(self, loss: Tensor, step: int, reference: list[Tensor] | None = None) -> float:
        """One update from this rank's share of the loss; returns the global gradient norm before clipping.

        `loss` must be scaled so that its mean over ranks is the global loss: DeepSpeed averages gradients. `reference`:
        gradients of another loss, for the method. Raises FloatingPointError on every rank, before the update, when a
        gradient is not finite.
        """
        self.engine.backward(loss)
        if self._zero is None:
            self.method.gradients(self.student, reference)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, step, self.total_steps)
        norm = self._clip() if self._zero is None else math.nan
        if self._zero is not None or math.isfinite(norm):
            self.engine.step()  # under ZeRO it clips, and leaves out a step that is not finite
        with torch.no_grad():
            for parameter, fixed, values in self._held:  # weight decay has no gradient
                parameter.copy_(torch.where(fixed, values, parameter))
        if self._zero is not None:
            norm = float(self.engine.get_global_grad_norm())
        if not math.isfinite(norm):
            raise FloatingPointError(f"the norm of the gradient is {norm}")
        self.method.after_step(self.student)
        return norm

    def hold(self, fixed: Mapping[str, Tensor]) -> None:
        """From now on let the entries flagged in `fixed` (bool, by parameter name) keep every bit.

        Their gradients are zero before anybody sees them: the norm, the clip, AdamW's moments.
        """
        for name, parameter in self.student.named_parameters():
            if name in fixed and parameter.requires_grad:
                flags = fixed[name].to(parameter.device)
                parameter.register_hook((~flags).to(parameter).mul)  # not a number stays one, and is found
                self._held.append((parameter, flags, parameter.detach().clone()))

    def moments(self) -> Moments:
        """What a checkpoint keeps of AdamW (a collective under ZeRO)."""
        return read_moments(self.student, self.optimizer, self._zero)

    def restore(self, moments: Moments) -> None:
        """Go on with the moments of a checkpoint. The student's weights must be loaded before the engine is built."""
        write_moments(self.student, self.optimizer, moments, self._zero)

    def close(self) -> None:
        """Free the engine and its hooks before the next phase builds another."""
        self.engine.destroy()
        del self.engine, self.optimizer, self._zero, self._flat, self._held, self._dense, self._expert
        gc.collect()

    def _drop_gradients(self) -> None:
        for parameter in self._dense + self._expert:
            parameter.grad = None

    def _average_all(self, **unused: Any) -> None:
        """Average the gradients of what learns, those of experts over the ranks that hold them, each in one piece.

        A parameter that nothing on this rank used has a gradient of zero: on every rank the pieces are alike.
        """
        from deepspeed.utils import groups

        for parameter in self._dense + self._expert:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._average([parameter.grad for parameter in self._dense if parameter.grad is not None], None)
        if self._expert:
            group = groups._get_expert_data_parallel_group(f"ep_size_{self.student.expert_parallel_size}")
            self._average([parameter.grad for parameter in self._expert if parameter.grad is not None], group)

    def _average(self, gradients: list[Tensor], group: Any) -> None:
        ranks, factor = torch.distributed.get_world_size(group), 1.0 / self.world_size
        if not gradients:
            return
        if ranks == 1:
            if factor != 1.0:
                torch._foreach_mul_(gradients, factor)
            return
        sizes = [gradient.numel() for gradient in gradients]
        flat = self._flat.get(sum(sizes))
        if flat is None:
            flat = self._flat[sum(sizes)] = gradients[0].new_empty(sum(sizes))
        parts = [part.view_as(gradient) for part, gradient in zip(flat.split(sizes), gradients, strict=True)]
        torch._foreach_copy_(parts, gradients)
        torch.distributed.all_reduce(flat, group=group)
        flat.mul_(factor)
        torch._foreach_copy_(gradients, parts)

    def _clip(self) -> float:
        # ZeRO 0 would average the ranks' local norms, which depends on where the experts live.
        dense, expert = (
            [parameter.grad for parameter in part if parameter.grad is not None] for part in (self._dense, self._expert)
        )
        squares = torch.zeros(2, dtype=torch.float64, device=device_of_rank())
        for slot, gradients in enumerate((dense, expert)):
            if gradients:
                norms = torch.stack(torch._foreach_norm(gradients)).double()
                squares[slot] = (norms * norms).sum()
        if self.world_size > 1:
            torch.distributed.all_reduce(squares[1:])  # every expert is held by world / expert-parallel-size ranks
        replicas = self.world_size // self.student.expert_parallel_size
        dense_square, expert_square = squares.tolist()  # the one time that every step waits for a GPU
        norm = math.sqrt(dense_square + expert_square / replicas)
        scale = self.settings.max_gradient_norm / (norm + 1e-6)
        if scale < 1.0:
            torch._foreach_mul_(dense + expert, scale)
        return norm


def learning_rate(settings: DistillSettings, step: int, total_steps: int) -> float:
    """Step size of update `step` (from 0): linear warm-up, then a cosine down to a tenth."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps)
    return settings.learning_rate * (0.55 + 0.45 * math.cos(math.pi * min(1.0, done)))


def read_moments(student: Student, optimizer: torch.optim.Optimizer, zero: Any = None) -> Moments:
    """The moments of this rank's trainable parameters; none before the first step.

    `zero`: DeepSpeed's optimizer around `optimizer` under ZeRO 1 or 2, where this is a collective.
    """
    if zero is None:
        return {
            name: {moment: optimizer.state[parameter][moment] for moment in MOMENTS}
            for name, parameter in student.named_parameters()
            if parameter in optimizer.state
        }
    if not optimizer.state:
        return {}
    _link(zero)
    step = next(iter(optimizer.state.values()))["step"]
    return {
        name: {"step": step.clone()} | {moment: parameter.get_full_hp_param(moment) for moment in MOMENTS[1:]}
        for name, parameter in _trainable(student)
    }


def write_moments(student: Student, optimizer: torch.optim.Optimizer, moments: Moments, zero: Any = None) -> None:
    """Let `optimizer` go on from `moments`, in which nothing may be missing unless it is empty."""
    if not moments:
        return
    if zero is None:
        for name, parameter in _trainable(student):
            # AdamW keeps its step count on the CPU
            optimizer.state[parameter] = {
                moment: value if moment == "step" else value.to(parameter) for moment, value in moments[name].items()
            }
        return
    step = next(iter(moments.values()))["step"]
    for group in optimizer.param_groups:
        for flat in group["params"]:
            zeros = {moment: torch.zeros_like(flat) for moment in MOMENTS[1:]}
            optimizer.state[flat] = {"step": step.clone(), **zeros}
    _link(zero)
    for name, parameter in _trainable(student):
        for moment in MOMENTS[1:]:
            parameter.set_full_hp_param(moments[name][moment].to(parameter), moment)


def _trainable(student: Student) -> list[tuple[str, Any]]:
    """(name, parameter), in the same order on every rank; DeepSpeed gives parameters methods of its own."""
    return [(name, parameter) for name, parameter in student.named_parameters() if parameter.requires_grad]


def _link(zero: Any) -> None:
    # DeepSpeed 0.19 links once, within the first step, when only the first group has a state
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()
