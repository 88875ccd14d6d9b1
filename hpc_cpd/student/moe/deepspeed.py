"""The mixture under DeepSpeed's engine: its expert-parallel groups and gradient averaging, our layer.

DeepSpeed's own layer wants the number of experts divisible by the ranks, has no gate bias and pads to the fullest
expert. Its engine only asks that the module is a `deepspeed.moe.layer.MoE`, carries a few attributes, marks the
experts' parameters, and takes the group it is handed.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import distributed as dist

from hpc_cpd.student.moe.dispatch import Group
from hpc_cpd.student.moe.mixture import Mixture

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before the import: DeepSpeed would probe, and say so on stdout

from deepspeed.moe.layer import MoE
from deepspeed.utils import groups


class MixtureOfExperts(Mixture, MoE):
    """`Mixture` that DeepSpeed's engine recognises and connects to its groups."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        """The arguments of `Mixture`. Raises ValueError when the ranks cannot be cut into groups of this size."""
        Mixture.__init__(self, *arguments, **keywords)
        size = self.expert_parallel_size
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if world_size % size:
            raise ValueError(f"expert_parallel_size {size} does not divide the number of ranks, {world_size}")
        self.ep_size = size
        self.num_experts = len(self.ids)
        self.num_local_experts = len(self.experts)
        self.expert_group_name = f"ep_size_{size}"
        self.use_residual = False
        self.enable_expert_tensor_parallelism = False
        for parameter in [*self.experts.parameters(), self.anchor]:
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = self.expert_group_name  # type: ignore[attr-defined]

    @property
    def deepspeed_moe(self) -> MixtureOfExperts:
        """Where the engine looks for the dispatching module."""
        return self

    def _create_process_groups(self, use_data_before_expert_parallel_: bool = False) -> None:
        # as inherited, less its print to stdout
        if self.expert_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(
                self.ep_size, use_data_before_expert_parallel_=use_data_before_expert_parallel_
            )
        self._set_ep_group(groups._get_expert_parallel_group(self.expert_group_name))

    def _set_ep_group(self, group: Group) -> None:
        if dist.get_rank(group) != self.expert_parallel_rank:
            raise RuntimeError("DeepSpeed ordered the expert-parallel groups otherwise than the experts were placed")
        self._group = group
