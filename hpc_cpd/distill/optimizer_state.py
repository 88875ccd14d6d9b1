"""AdamW's moments as a checkpoint holds them: one tensor per parameter, whatever ZeRO made of them.

ZeRO stages 1 and 2 replace the parameters of each group by one flat tensor, of which every rank keeps a part; DeepSpeed
links the parts to the parameters they come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hpc_cpd.student.checkpoint import MOMENTS, Moments
from hpc_cpd.student.network import Student

_OF_PARAMETERS = [name for name in MOMENTS if name != "step"]


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
        name: {"step": step.clone()} | {moment: parameter.get_full_hp_param(moment) for moment in _OF_PARAMETERS}
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
            zeros: Mapping[str, Tensor] = {moment: torch.zeros_like(flat) for moment in _OF_PARAMETERS}
            optimizer.state[flat] = {"step": step.clone(), **zeros}
    _link(zero)
    for name, parameter in _trainable(student):
        for moment in _OF_PARAMETERS:
            parameter.set_full_hp_param(moments[name][moment].to(parameter), moment)


def _trainable(student: Student) -> list[tuple[str, Any]]:
    """(name, parameter), in the same order on every rank; DeepSpeed gives parameters methods of its own."""
    return [(name, parameter) for name, parameter in student.named_parameters() if parameter.requires_grad]


def _link(zero: Any) -> None:
    # DeepSpeed 0.19 links once, within the first step, when only the first group has a state
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()
