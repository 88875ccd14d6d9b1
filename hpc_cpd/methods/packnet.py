"""How a student of this method acts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from hpc_cpd.settings import PluginSettings

if TYPE_CHECKING:
    from torch import Tensor


class PackNetSettings(PluginSettings):
    """None yet."""

    name: Literal["packnet"] = "packnet"


class PackNet:
    """See `hpc_cpd.student.isolation.Owners`."""

    Settings = PackNetSettings

    @staticmethod
    def acting(tensors: Mapping[str, Tensor]) -> Any:
        from hpc_cpd.student.isolation import Owners

        return Owners.from_tensors(tensors)


plugin = PackNet
