"""Settings from a YAML file, overridden by dotted ``key=value`` words; stored resolved in the run folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from hpc_cpd import plugins
from hpc_cpd.errors import UserError
from hpc_cpd.former_keys import advice, former_keys
from hpc_cpd.settings import (
    METHOD,
    Choice,
    Config,
    PluginSettings,
    Settings,
    choice_of,
    group_within,
    mistake,
)

SCHEMA_VERSION = 2


def load_config(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read `path` (YAML; None: all defaults), apply dotted ``key=value`` words, validate.

    ``cluster.site`` is no setting but names a file with those of the scheduler (configs/cluster/example.yaml): in a
    YAML file it fills in those that the file does not name, as a word it replaces those of the words before it.

    Raises UserError: no such file, not a mapping, an unknown key, or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = _read_mapping(Path(path), "there is no config file {}; give one of configs/*.yaml with --config")
        version = values.pop("schema_version", SCHEMA_VERSION)
        former = former_keys(values)
        if version != SCHEMA_VERSION:
            told = f": {advice(former)}" if former else ""
            raise UserError(f"{path} has schema_version {version}, but this version reads {SCHEMA_VERSION}{told}")
        if former:
            raise UserError(f"{path}: {advice(former)}")
        cluster = values.get("cluster")
        if isinstance(cluster, dict) and "site" in cluster:
            site = _site(cluster.pop("site"))
            cluster["scheduler"] = site | _named(cluster.get("scheduler"))
    for word in overrides:
        key, separator, text = word.partition("=")
        if not separator:
            raise UserError(f"'{word}' is not an override; write key=value, for example seed=1")
        if key == "cluster.site":
            cluster = values.get("cluster") or {}
            if not isinstance(cluster, dict):
                raise UserError(f"'cluster' is a single value, {cluster!r}, so 'cluster.site' is not a setting")
            values["cluster"] = cluster | {"scheduler": _named(cluster.get("scheduler")) | _site(text)}
        else:
            _assign(values, key.split("."), text)
    return parse_config(values)


def _read_mapping(file: Path, absent: str) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(absent.format(file))
    try:
        values = read_yaml(file.read_text()) or {}
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are no UTF-8, a date that does not exist
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} must hold settings as 'key: value' lines")
    return values


class _OnceLoader(yaml.SafeLoader):
    """YAML's safe loader, for which a key that stands twice is a mistake; plain YAML takes the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError, also where a key stands twice in one mapping."""
    loader = _OnceLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _site(file: Any) -> dict[str, Any]:
    absent = "there is no site file {} (cluster.site); copy configs/cluster/example.yaml and edit it"
    values = _read_mapping(Path(str(file)), absent)
    known = plugins.load("schedulers", str(values.get("name", "slurm"))).Settings.model_fields
    for key in values:
        if key not in known:
            names = ", ".join(known)
            raise UserError(f"{file}: unknown setting '{key}'; a site file holds settings of a scheduler only: {names}")
    return values


def _named(value: Any) -> dict[str, Any]:
    """What a file says about its scheduler, as a mapping: it may give the name alone."""
    return {"name": value} if isinstance(value, str) else dict(value or {})


def parse_config(values: Mapping[str, Any]) -> Config:
    """Validate plain values. Raises UserError with one sentence for the first mistake.

    A method may have presets: settings of other groups that it wants where nobody says otherwise.
    """
    if former := former_keys(values):
        raise UserError(advice(former))
    filled = dict(values)
    method = METHOD.resolve(filled.get("method", {}))
    for group, presets in plugins.load("methods", method.name).presets.items():
        given = filled.get(group)
        if given is None or isinstance(given, Mapping):
            filled[group] = {**presets, **(given or {})}
    try:
        return Config.model_validate(filled)
    except ValidationError as failure:
        raise UserError(mistake(failure.errors()[0], Config)) from None


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
    group: type[BaseModel] | None = Config
    for key in keys[:-1]:
        chosen = choice_of(group, key) if group is not None else None
        inner = values.setdefault(key, {})
        if chosen is not None and isinstance(inner, str):  # "method: ewc" in the file, "method.coefficient=10" here
            inner = values[key] = {"name": inner}
        if not isinstance(inner, dict):
            raise UserError(f"'{key}' is a single value, so '{'.'.join(keys)}' is not a setting")
        group = _group_of(group, key, chosen, inner)
        values = inner
    field = group.model_fields.get(keys[-1]) if group is not None else None
    if "," in text and not text.lstrip().startswith(("[", "{", "'", '"')) and "list" in str(field and field.annotation):
        raise UserError(f"'{'.'.join(keys)}={text}': a list is written in brackets: '{'.'.join(keys)}=[{text}]'")
    try:
        values[keys[-1]] = read_yaml(text)
    except (yaml.YAMLError, ValueError):  # ValueError: a date that does not exist
        values[keys[-1]] = text


def _group_of(
    group: type[BaseModel] | None, key: str, chosen: Choice | None, values: Mapping[str, Any]
) -> type[BaseModel] | None:
    """The settings that stand under `key`; None: unknown, which is told when all is validated."""
    if chosen is not None:
        settings: type[BaseModel] = plugins.load(chosen.kind, str(values.get("name", chosen.default))).Settings
        return settings
    return group_within(group, key) if group is not None else None


def _differences(old: Settings, new: Settings, prefix: str) -> Iterable[tuple[str, bool]]:
    """A sentence for each setting that differs, and whether it is resumable."""
    for name, field in type(old).model_fields.items():
        before, after = getattr(old, name), getattr(new, name)
        extra = field.json_schema_extra
        resumable = isinstance(extra, dict) and bool(extra.get("resumable"))
        if isinstance(before, Settings) and type(before) is type(after):
            for sentence, inner in _differences(before, after, f"{prefix}{name}."):
                yield sentence, resumable or inner
        elif before != after:
            told = (one.name if isinstance(one, PluginSettings) else one for one in (before, after))
            yield "{}{} was {!r} and is now {!r}".format(prefix, name, *told), resumable
