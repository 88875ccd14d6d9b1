"""How a student of this method acts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from hpc_cpd.settings import PluginSettings

if TYPE_CHECKING:
    from torch import Tensor


class LoRASettings(PluginSettings):
    """None yet."""

    name: Literal["lora"] = "lora"


class LoRA:
    """See `hpc_cpd.student.isolation.Adapters`."""

    Settings = LoRASettings

    @staticmethod
    def acting(tensors: Mapping[str, Tensor]) -> Any:
        from hpc_cpd.student.isolation import Adapters

        return Adapters.from_tensors(tensors)


plugin = LoRA
