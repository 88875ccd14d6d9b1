"""Settings as a flat list, and those in which runs differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpc_cpd.settings import Config, PluginSettings, Settings, choice_of


def flat_settings(settings: Settings, prefix: str = "", changed_only: bool = False) -> dict[str, Any]:
    """Every setting that has a say in what comes out, by its dotted key; not how the work is done (ranks, Slurm).

    `changed_only`: without those at their defaults, where a plug-in's name stands under its setting's own key.
    """
    flat: dict[str, Any] = {}
    for name, field in type(settings).model_fields.items():
        key, value, extra = f"{prefix}{name}", getattr(settings, name), field.json_schema_extra
        if isinstance(extra, dict) and extra.get("resumable"):
            continue
        if isinstance(value, Settings):
            choice = choice_of(type(settings), name)
            if (
                changed_only
                and choice is not None
                and isinstance(value, PluginSettings)
                and value.name != choice.default
            ):
                flat[key] = value.name
            flat |= flat_settings(value, f"{key}.", changed_only)
        elif not changed_only or field.is_required() or value != field.get_default(call_default_factory=True):
            flat[key] = value
    return flat


def differing(configs: Mapping[str, Config]) -> dict[str, dict[str, Any]]:
    """key -> {name of the run: value} for each setting in which the runs differ; seed and name are no settings here.

    A run whose plug-ins have no such setting is left out.
    """
    flat = {name: flat_settings(config) for name, config in configs.items()}
    keys = dict.fromkeys(key for one in flat.values() for key in one if key not in ("seed", "name"))
    values = {key: {name: one[key] for name, one in flat.items() if key in one} for key in keys}
    return {
        key: found
        for key, found in values.items()
        if len(found) < len(flat) or any(one != next(iter(found.values())) for one in found.values())
    }
