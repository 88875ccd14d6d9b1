"""Settings as a flat list, and those in which runs differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpc_cpd.settings import Config, Settings


def flat_settings(settings: Settings, prefix: str = "") -> dict[str, Any]:
    """Every setting that has a say in what comes out, by its dotted key; not how the work is done (ranks, Slurm)."""
    flat: dict[str, Any] = {}
    for name, field in type(settings).model_fields.items():
        value, extra = getattr(settings, name), field.json_schema_extra
        if isinstance(extra, dict) and extra.get("resumable"):
            continue
        if isinstance(value, Settings):
            flat |= flat_settings(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def differing(configs: Mapping[str, Config]) -> dict[str, dict[str, Any]]:
    """key -> {name of the run: value} for each setting in which the runs differ; seed and name are no settings here."""
    flat = {name: flat_settings(config) for name, config in configs.items()}
    keys = next(iter(flat.values()), {})
    values = {key: {name: one[key] for name, one in flat.items()} for key in keys if key not in ("seed", "name")}
    return {
        key: found for key, found in values.items() if any(one != next(iter(found.values())) for one in found.values())
    }
