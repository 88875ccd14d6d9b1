"""Continual policy distillation: teachers leave trajectories, one student learns them stage after stage.

The names below are loaded when first used, so that ``import hpc_cpd`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpc_cpd.student.policy import load_student as load_student
    from hpc_cpd.tasks.registry import make_batch as make_batch
    from hpc_cpd.teachers.policy import load_teacher as load_teacher
    from hpc_cpd.trajectories.store import open_trajectories as open_trajectories

__version__: str

__all__ = ["__version__", "load_student", "load_teacher", "make_batch", "open_trajectories"]

_HOMES = {
    "load_student": "hpc_cpd.student.policy",
    "load_teacher": "hpc_cpd.teachers.policy",
    "make_batch": "hpc_cpd.tasks.registry",
    "open_trajectories": "hpc_cpd.trajectories.store",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = metadata.version("hpc_cpd")
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'hpc_cpd' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
