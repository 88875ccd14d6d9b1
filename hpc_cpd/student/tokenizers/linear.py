"""Flat observations: normalised, clipped, embedded by one linear layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from hpc_cpd.settings import PluginSettings

if TYPE_CHECKING:
    from torch import Generator

    from hpc_cpd.student.network import StudentShape
    from hpc_cpd.student.tokenizers.base import Tokenizer


class LinearTokenizerSettings(PluginSettings):
    """It has none."""

    name: Literal["linear"] = "linear"


class Linear:
    """Flat observations: normalised, clipped, embedded by one linear layer."""

    Settings = LinearTokenizerSettings

    @staticmethod
    def build(settings: Any, shape: StudentShape, generator: Generator) -> Tokenizer:
        from hpc_cpd.student.tokenizers.base import LinearTokenizer

        return LinearTokenizer(shape, generator)


plugin = Linear
