"""Settings from a YAML file, overridden by dotted ``key=value`` words; stored resolved in the run folder."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from hpc_cpd.errors import UserError
from hpc_cpd.settings import METHODS, ClusterSettings, Config, Settings

SCHEMA_VERSION = 1


def load_config(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read `path` (YAML; None: all defaults), apply dotted ``key=value`` words, validate.

    ``cluster.site`` is no setting but names a file of them (configs/cluster/example.yaml): in a YAML file it fills in
    the cluster settings that the file does not name, as a word it replaces those of the words before it.

    Raises UserError: no such file, not a mapping, an unknown key, or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = _read_mapping(Path(path), "there is no config file {}; give one of configs/*.yaml with --config")
        version = values.pop("schema_version", SCHEMA_VERSION)
        if version != SCHEMA_VERSION:
            raise UserError(f"{path} has schema_version {version}, but this version reads {SCHEMA_VERSION}")
        cluster = values.get("cluster")
        if isinstance(cluster, dict) and "site" in cluster:
            values["cluster"] = _site(cluster.pop("site")) | cluster
    for word in overrides:
        key, separator, text = word.partition("=")
        if not separator:
            raise UserError(f"'{word}' is not an override; write key=value, for example seed=1")
        if key == "cluster.site":
            cluster = values.get("cluster") or {}
            if not isinstance(cluster, dict):
                raise UserError(f"'cluster' is a single value, {cluster!r}, so 'cluster.site' is not a setting")
            values["cluster"] = cluster | _site(text)
        else:
            _assign(values, key.split("."), text)
    return parse_config(values)


def _read_mapping(file: Path, absent: str) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(absent.format(file))
    try:
        values = yaml.safe_load(file.read_text()) or {}
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are no UTF-8, a date that does not exist
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} must hold settings as 'key: value' lines")
    return values


def _site(file: Any) -> dict[str, Any]:
    absent = "there is no site file {} (cluster.site); copy configs/cluster/example.yaml and edit it"
    values = _read_mapping(Path(str(file)), absent)
    for key in values:
        if key not in ClusterSettings.model_fields:
            known = ", ".join(ClusterSettings.model_fields)
            raise UserError(f"{file}: unknown setting '{key}'; a site file holds cluster settings only: {known}")
    return values


def parse_config(values: Mapping[str, Any]) -> Config:
    """Validate plain values. Raises UserError with one sentence for the first mistake."""
    filled = dict(values)
    for group, defaults in METHODS.get(str(values.get("method")), {}).items():
        given = values.get(group)
        if given is None or isinstance(given, Mapping):
            filled[group] = {**defaults, **(given or {})}
    try:
        return Config.model_validate(filled)
    except ValidationError as failure:
        raise UserError(_sentence(failure.errors()[0])) from None


def config_as_yaml(config: Config) -> str:
    """The resolved settings with their schema version, as stored in a run folder."""
    return yaml.safe_dump({"schema_version": SCHEMA_VERSION, **config.model_dump()}, sort_keys=False)


def changed_keys(old: Config, new: Config) -> list[str]:
    """Sentences naming each setting that differs and must not, when a run is resumed."""
    return [sentence for sentence, resumable in _differences(old, new, "") if not resumable]


def taken_over(old: Config, new: Config) -> list[str]:
    """Sentences naming each setting that differs and may, for it only says how the work is done."""
    return [sentence for sentence, resumable in _differences(old, new, "") if resumable]


def _assign(values: dict[str, Any], keys: list[str], text: str) -> None:
    for key in keys[:-1]:
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            raise UserError(f"'{key}' is a single value, so '{'.'.join(keys)}' is not a setting")
        values = inner
    try:
        values[keys[-1]] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: a date that does not exist
        values[keys[-1]] = text


def _differences(old: Settings, new: Settings, prefix: str) -> Iterable[tuple[str, bool]]:
    """A sentence for each setting that differs, and whether it is resumable."""
    for name, field in type(old).model_fields.items():
        before, after = getattr(old, name), getattr(new, name)
        extra = field.json_schema_extra
        if isinstance(before, Settings):
            yield from _differences(before, after, f"{prefix}{name}.")
        elif before != after:
            resumable = isinstance(extra, dict) and bool(extra.get("resumable"))
            yield f"{prefix}{name} was {before!r} and is now {after!r}", resumable


def _sentence(error: Mapping[str, Any]) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    group: type[BaseModel] = Config
    for part in location[:-1]:
        annotation = group.model_fields[part].annotation if part in group.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        group = annotation
    if error["type"] == "extra_forbidden":
        names = list(group.model_fields)
        near = difflib.get_close_matches(location[-1], names, n=1) or difflib.get_close_matches(
            location[-1], names, n=1, cutoff=0.3
        )
        hint = f"did you mean '{'.'.join([*location[:-1], near[0]])}'? " if near else ""
        return f"unknown setting '{key}'; {hint}Known here: {', '.join(names)}"
    name = next((part for part in reversed(location) if part in group.model_fields), None)
    about = f" ({group.model_fields[name].description})" if name and group.model_fields[name].description else ""
    text = error["msg"][0].lower() + error["msg"][1:]
    return f"setting '{key}'{about}: {text}, but it is {error['input']!r}"
