"""Actions by one linear layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from hpc_cpd.settings import PluginSettings

if TYPE_CHECKING:
    from torch import Generator, nn

    from hpc_cpd.student.network import StudentShape


class LinearHeadSettings(PluginSettings):
    """It has none."""

    name: Literal["linear"] = "linear"


class LinearHead:
    """Actions by one linear layer."""

    Settings = LinearHeadSettings

    @staticmethod
    def build(settings: Any, shape: StudentShape, generator: Generator) -> nn.Module:
        from hpc_cpd.layers import seeded_linear

        return seeded_linear(shape.width, shape.action_size, generator)


plugin = LinearHead
