"""What ``hpc-cpd plugins`` prints: every plug-in of a kind, or the settings of one; and the tasks of a family."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from hpc_cpd import plugins
from hpc_cpd.errors import UserError
from hpc_cpd.settings import choice_of
from hpc_cpd.tasks.registry import ask


def print_kind(kind: str, console: Console) -> None:
    """A table of the plug-ins of `kind`. One that cannot be loaded is listed with what is wrong."""
    about = plugins.KINDS[kind]
    title = f"{kind}: what '{about.key}' may name"
    table = Table("Name", "From", "What it is", title=title, title_justify="left")
    for name in plugins.names(kind):
        try:
            what = _first_line(plugins.load(kind, name))
        except UserError as error:
            what = f"error: {error}"
        table.add_row(name, plugins.origin(kind, name), Text(what))
    console.print(table)
    console.print(f"Installed packages add more in the entry-point group {about.group}.\n", soft_wrap=True)


def print_settings(kind: str, name: str, console: Console) -> None:
    """A table of the settings of one plug-in. Raises UserError: no such plug-in, or one that cannot be loaded."""
    plugin, key = plugins.load(kind, name), plugins.KINDS[kind].key
    console.print(Text(f"{name}, from {plugins.origin(kind, name)}: {_first_line(plugin)}"), soft_wrap=True)
    rows = list(_rows(plugin.Settings, f"{key}.")) if hasattr(plugin, "Settings") else []
    if not rows:
        console.print("It has no settings.")
        return
    table = Table(*(Column(heading, overflow="fold") for heading in ("Setting", "Type", "Default", "Meaning")))
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def print_family(name: str, console: Console) -> None:
    """The ids of the tasks that a family lists, a line each. Raises UserError: it cannot be loaded, or fails."""
    family = plugins.load("tasks", name)
    console.print(Text(f"{name}, from {plugins.origin('tasks', name)}: {_first_line(family)}"), soft_wrap=True)
    listed = ask(family.names, "names", f"{name}/...")
    for task in listed:
        console.print(f"{name}/{task}", soft_wrap=True, markup=False, highlight=False)
    told = "The spaces of one" if listed else f"It lists none; an id is written {name}/NAME. The spaces of one"
    console.print(f"{told}: hpc-cpd tasks {name}/NAME", soft_wrap=True)


def _rows(settings: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in settings.model_fields.items():
        kind = field.annotation
        choice = choice_of(settings, name)
        if choice is None and isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _rows(kind, f"{prefix}{name}.")
        elif name != "name":
            default = field.get_default(call_default_factory=True)
            if choice:
                default = default or choice.default
            shown = "null" if default is None else str(getattr(default, "name", default))
            type_ = f"one of: hpc-cpd plugins {choice.kind}" if choice else _words(kind)
            described = field.description or ""
            yield f"{prefix}{name}", type_, "none: must be given" if field.is_required() else shown, described


def _words(annotation: Any) -> str:
    """A type as a reader of YAML would say it: ``list[float] or null``, ``mean or executed``."""
    if annotation is None or annotation is type(None):
        return "null"
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return " or ".join(map(str, parts))
    if isinstance(annotation, type) and not parts:
        return annotation.__name__
    if get_origin(annotation) in (list, tuple, dict):
        return f"{get_origin(annotation).__name__}[{', '.join(map(_words, parts))}]"
    return " or ".join(map(_words, parts)) if parts else str(annotation)


def _first_line(plugin: Any) -> str:
    return (inspect.cleandoc(plugin.__doc__ or "") or "(it has no docstring)").partition("\n")[0]
