"""Settings from a YAML file, overridden by dotted ``key=value`` words; stored resolved in the run folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from hpc_cpd import plugins
from hpc_cpd.errors import UserError
from hpc_cpd.former_keys import advice, former_keys
from hpc_cpd.settings import METHOD, Config, PluginSettings, Settings, choice_of, group_within, mistake

SCHEMA_VERSION = 2


def load_config(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read `path` (YAML; None: all defaults), apply dotted ``key=value`` words, validate.

    ``cluster.site`` is no setting but names a file with those of the scheduler (configs/cluster/example.yaml): in a
    YAML file it fills in those that the file does not name, as a word it replaces those of the words before it.

    Raises UserError: no such file, not a mapping, an unknown key, or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    if path is not None:
        absent = "there is no config file {}; give one of configs/*.yaml with --config"
        values = read_mapping(Path(path), absent, "settings as 'key: value' lines")
        version = values.pop("schema_version", SCHEMA_VERSION)
        told = f": {advice(former)}" if (former := former_keys(values)) else ""
        if version != SCHEMA_VERSION:
            raise UserError(f"{path} has schema_version {version}, but this version reads {SCHEMA_VERSION}{told}")
        if told:
            raise UserError(f"{path}{told}")
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


def read_mapping(file: Path, absent: str, content: str) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises UserError: it is `absent`, is no YAML, or holds no `content`."""
    if not file.is_file():
        raise UserError(absent.format(file))
    try:
        values = _read_yaml(file.read_text()) or {}
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are no UTF-8, a date that does not exist
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} must hold {content}")
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


def _read_yaml(text: str) -> Any:
    loader = _OnceLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _site(file: Any) -> dict[str, Any]:
    absent = "there is no site file {} (cluster.site); copy configs/cluster/example.yaml and edit it"
    values = read_mapping(Path(str(file)), absent, "settings as 'key: value' lines")
    known = plugins.load("schedulers", str(values.get("name", "slurm"))).Settings.model_fields
    if unknown := [key for key in values if key not in known]:
        only = f"a site file holds settings of a scheduler only: {', '.join(known)}"
        raise UserError(f"{file}: unknown setting '{unknown[0]}'; {only}")
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


def flat_settings(settings: Settings, prefix: str = "", changed_only: bool = False) -> dict[str, Any]:
    """Every setting that has a say in what comes out, by its dotted key; not how the work is done (ranks, Slurm).

    `changed_only`: without those at their defaults, where a plug-in's name stands under its setting's own key.
    """
    flat: dict[str, Any] = {}
    for name, field in type(settings).model_fields.items():
        key, value = f"{prefix}{name}", getattr(settings, name)
        if _resumable(field):
            continue
        if isinstance(value, Settings):
            choice = choice_of(type(settings), name)
            if changed_only and choice and isinstance(value, PluginSettings) and value.name != choice.default:
                flat[key] = value.name
            flat |= flat_settings(value, f"{key}.", changed_only)
        elif not changed_only or field.is_required() or value != field.get_default(call_default_factory=True):
            flat[key] = value
    return flat


def _assign(values: dict[str, Any], keys: list[str], text: str) -> None:
    """Put what the word says into `values`. What no setting is called is told when all is validated."""
    group: type[BaseModel] | None = Config
    for key in keys[:-1]:
        chosen = choice_of(group, key)
        inner = values.setdefault(key, {})
        if chosen is not None and isinstance(inner, str):  # "method: ewc" in the file, "method.coefficient=10" here
            inner = values[key] = {"name": inner}
        if not isinstance(inner, dict):
            raise UserError(f"'{key}' is a single value, so '{'.'.join(keys)}' is not a setting")
        if chosen is not None:
            group = plugins.load(chosen.kind, str(inner.get("name", chosen.default))).Settings
        else:
            group = group_within(group, key)
        values = inner
    field = group.model_fields.get(keys[-1]) if group is not None else None
    if "," in text and not text.lstrip().startswith(("[", "{", "'", '"')) and "list" in str(field and field.annotation):
        raise UserError(f"'{'.'.join(keys)}={text}': a list is written in brackets: '{'.'.join(keys)}=[{text}]'")
    try:
        values[keys[-1]] = _read_yaml(text)
    except (yaml.YAMLError, ValueError):  # ValueError: a date that does not exist
        values[keys[-1]] = text


def _resumable(field: FieldInfo) -> bool:
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("resumable"))


def _differences(old: Settings, new: Settings, prefix: str) -> Iterable[tuple[str, bool]]:
    """A sentence for each setting that differs, and whether it is resumable."""
    for name, field in type(old).model_fields.items():
        before, after = getattr(old, name), getattr(new, name)
        if isinstance(before, Settings) and type(before) is type(after):
            for sentence, inner in _differences(before, after, f"{prefix}{name}."):
                yield sentence, _resumable(field) or inner
        elif before != after:
            told = (one.name if isinstance(one, PluginSettings) else one for one in (before, after))
            yield "{}{} was {!r} and is now {!r}".format(prefix, name, *told), _resumable(field)
