"""What is known of arXiv 2601.22475, whose body could not be read: our reading of its abstract and of summaries.

Where they say nothing, the defaults of our method stand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from hpc_cpd.methods._replay import BUDGET, MemorySettings
from hpc_cpd.methods.ours import WITHOUT_GROWTH, GrowthSettings, Ours, OurSettings, SelfDistillationSettings


class PaperGrowthSettings(GrowthSettings):
    """Phase 2 trains old experts too."""

    freeze_old_experts: bool = Field(False, description="true: old experts and their rows of the gate stay frozen")


class PaperMemorySettings(MemorySettings):
    """Below 10% of the data."""

    budget_fraction: float = Field(0.095, gt=0, le=1, description=BUDGET)


class PaperSettings(OurSettings):
    """As ours, but phase 2 trains old experts too, 9.5% of the data are kept, and all replay asks the teachers."""

    name: Literal["paper"] = "paper"  # type: ignore[assignment]
    growth: PaperGrowthSettings | None = Field(PaperGrowthSettings(), description=WITHOUT_GROWTH)
    memory: PaperMemorySettings = PaperMemorySettings()
    self_distillation: SelfDistillationSettings | None = Field(None, description="null: none")


class Paper(Ours):
    """Our reading of the paper's method: old experts learn in phase 2, and the memory alone protects old tasks."""

    Settings = PaperSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"student": {"experts_see_observation": False}}


plugin = Paper
