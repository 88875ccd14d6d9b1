"""Uniform selection."""

from __future__ import annotations


class _uniform:
    from typing import Literal as _L

    from hpc_cpd.settings import PluginSettings as _P

    class Settings(_P):
        name: str = "uniform"


plugin = _uniform
