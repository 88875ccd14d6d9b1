"""Joint training: all tasks at once, in one stage. The usual upper bound for continual learning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from hpc_cpd.errors import UserError
from hpc_cpd.methods.base import Method, MethodSettings


class JointSettings(MethodSettings):
    """As many experts as our method has after its last stage."""

    name: Literal["joint"] = "joint"
    experts_per_task: int = Field(1, ge=1, description="experts for every task")


class Joint(Method):
    """Joint training: all tasks at once in one stage, the usual upper bound."""

    Settings = JointSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"stream": {"tasks_per_stage": 0}}
    fixed_number_of_stages = True

    def check(self, stages: int) -> None:
        if stages > 1:
            raise UserError(
                "method joint learns all tasks in one stage, but stream.tasks_per_stage cuts the stream into "
                f"{stages}; set stream.tasks_per_stage=0"
            )


plugin = Joint
