"""A causal Transformer, with mixtures of experts behind its last blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from hpc_cpd.errors import UserError
from hpc_cpd.settings import PluginSettings

if TYPE_CHECKING:
    from torch import Generator

    from hpc_cpd.student.backbones.base import Backbone
    from hpc_cpd.student.network import StudentShape


class TransformerSettings(PluginSettings):
    """Blocks of attention. Together they look back at ``student.history`` observations."""

    name: Literal["transformer"] = "transformer"
    layers: int = Field(1, ge=1, description="blocks")
    mixtures: int = Field(1, ge=1, description="mixtures of experts, one behind each of the last so many blocks")
    heads: int = Field(4, ge=1, description="attention heads; twice this must divide student.width")

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.mixtures > self.layers:
            raise UserError(
                f"student.backbone.mixtures is {self.mixtures}, but there are only as many places as blocks, "
                f"student.backbone.layers, {self.layers}; change either"
            )
        return self

    def require_fit(self, group: Any) -> None:
        """See :class:`PluginSettings`."""
        if group.width % (2 * self.heads):
            raise UserError(
                f"student.width is {group.width}, no multiple of twice student.backbone.heads, which is {self.heads}; "
                "change either"
            )


class TransformerBackbone:
    """A causal Transformer, with mixtures of experts behind its last blocks."""

    Settings = TransformerSettings

    @staticmethod
    def build(settings: TransformerSettings, shape: StudentShape, generator: Generator) -> Backbone:
        from hpc_cpd.student.backbones._transformer import Transformer

        return Transformer(settings, shape, generator)


plugin = TransformerBackbone
