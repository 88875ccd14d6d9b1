"""Finding what users bring: one mechanism for every kind of plug-in.

A plug-in is one object (a class, usually) under one name. The built-in ones are the modules of one package each, called
like the plug-in, which hold it as ``plugin``. Installed packages add theirs by entry points, in ``pyproject.toml``::

    [project.entry-points."hpc_cpd.methods"]
    synaptic_intelligence = "mylab.synaptic_intelligence:SynapticIntelligence"

Nothing is imported before its name is asked for.
"""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from typing import Any, get_args

from hpc_cpd.errors import UserError


@dataclass(frozen=True)
class Kind:
    """One kind of plug-in.

    `word`: what one is called in messages. `key`: the setting that names one. `package`: whose modules are the built-in
    ones; its module ``base`` says what a plug-in must offer. `group`: the entry-point group, in which the names begin
    with `prefix`. `needs`: the attributes that are looked for before a plug-in is used.
    """

    word: str
    key: str
    package: str
    group: str
    prefix: str = ""
    needs: tuple[str, ...] = ("Settings",)


_TEACHERS, _STUDENT, _PARTS, _PART = "hpc_cpd.teachers", "hpc_cpd.student", "hpc_cpd.students", ("Settings", "build")
_SELECTIONS, _ORDER, _LEARNER = "hpc_cpd.trajectories.selection", ("Settings", "order"), ("Settings", "learner")
_FAMILIES, _FAMILY = "hpc_cpd.tasks.families", ("names", "describe", "make")
KINDS = {
    "tasks": Kind("task family", "stream.tasks", _FAMILIES, "hpc_cpd.tasks", "", _FAMILY),
    "methods": Kind("method", "method", "hpc_cpd.methods", "hpc_cpd.methods"),
    "selections": Kind("selection", "method.memory.selection", _SELECTIONS, "hpc_cpd.selections", "", _ORDER),
    "algorithms": Kind("teacher algorithm", "teachers.algorithm", f"{_TEACHERS}.algorithms", _TEACHERS, "", _LEARNER),
    "starts": Kind("teacher's start", "teachers.start", f"{_TEACHERS}.starts", "hpc_cpd.teacher_starts"),
    "sources": Kind("source of teachers", "teachers.source", f"{_TEACHERS}.sources", "hpc_cpd.teacher_sources"),
    "tokenizers": Kind("tokenizer", "student.tokenizer", f"{_STUDENT}.tokenizers", _PARTS, "tokenizer.", _PART),
    "backbones": Kind("backbone", "student.backbone", f"{_STUDENT}.backbones", _PARTS, "backbone.", _PART),
    "heads": Kind("head", "student.head", f"{_STUDENT}.heads", _PARTS, "head.", _PART),
    "embeddings": Kind("task embedding", "student.task_embedding", f"{_STUDENT}.embeddings", _PARTS, "embedding."),
    "schedulers": Kind("scheduler", "cluster.scheduler", "hpc_cpd.cluster.schedulers", "hpc_cpd.schedulers"),
}


@cache
def built_in(kind: str) -> tuple[str, ...]:
    """The names that come with the package, sorted; imports none of them."""
    path = import_module(KINDS[kind].package).__path__
    return tuple(sorted(m.name for m in pkgutil.iter_modules(path) if m.name != "base" and not m.name.startswith("_")))


@cache
def installed(kind: str) -> dict[str, metadata.EntryPoint]:
    """Those that installed packages add, by name. Raises UserError for a name that is taken, by us or by another."""
    group, prefix = KINDS[kind].group, KINDS[kind].prefix
    found: dict[str, metadata.EntryPoint] = {}
    for point in metadata.entry_points(group=group):
        if not point.name.startswith(prefix):
            continue
        name = point.name.removeprefix(prefix)
        if name in built_in(kind) or (name in found and found[name].value != point.value):
            raise UserError(
                f"the entry point '{point.name} = {point.value}' in group {group} takes a name that is already in use; "
                "rename it in the package that declares it"
            )
        found[name] = point
    return found


def names(kind: str) -> list[str]:
    """Every name of a kind: the built-in ones, then those of installed packages."""
    return [*built_in(kind), *installed(kind)]


@cache
def load(kind: str, name: str) -> Any:
    """The plug-in `name`. Raises UserError: no such name, one that cannot be imported, or lacks what its kind needs."""
    about = KINDS[kind]
    if name in built_in(kind):
        where = f"{about.package}.{name}"
        plugin = import_module(where).plugin
    else:
        point = installed(kind).get(name)
        if point is None:
            known = f"known: {', '.join(names(kind)) or 'none'}"
            raise UserError(f"{about.key}: there is no {about.word} '{name}'; {hint(name, names(kind))}{known}")
        where = point.value
        try:
            plugin = point.load()
        except Exception as error:  # whatever a module of somebody else's may raise when it is imported
            raise UserError(
                f"the {about.word} '{name}' ({where}) cannot be loaded: {type(error).__name__}: {error}; "
                "repair the package that declares it"
            ) from error
    missing = [attribute for attribute in about.needs if not hasattr(plugin, attribute)]
    if missing:
        raise UserError(
            f"the {about.word} '{name}' ({where}) has no {missing[0]}; what it must offer: docs/extending.md"
        )
    field = plugin.Settings.model_fields["name"] if hasattr(plugin, "Settings") else None
    if field is not None and (field.default != name or get_args(field.annotation) not in ((), (name,))):
        raise UserError(
            f"the {about.word} '{name}' ({where}) needs Settings of its own, in which name is "
            f"Literal['{name}'] = '{name}'"
        )
    return plugin


def ask(failing: str, page: str, method: Callable[..., Any], *arguments: Any) -> Any:
    """What a method of a plug-in returns. Raises UserError: its own, or one sentence for whatever else it raises.

    `failing` begins the sentence, such as ``the selection 'mine' fails in order()``; `page` says what it must offer.
    """
    try:
        return method(*arguments)
    except UserError:
        raise
    except Exception as error:  # a plug-in may be anybody's code
        raise UserError(
            f"{failing}: {type(error).__name__}: {' '.join(str(error).split())}; repair the package that declares it "
            f"(what it must offer: {page})"
        ) from error


def origin(kind: str, name: str) -> str:
    """Where a plug-in comes from: ``hpc_cpd``, or the distribution that declares it, with its version."""
    if name in built_in(kind):
        return "hpc_cpd"
    distribution = installed(kind)[name].dist
    return "unknown" if distribution is None else f"{distribution.name} {distribution.version}"


def hint(word: str, known: Iterable[str], prefix: str = "", cutoffs: Sequence[float] = (0.6,)) -> str:
    """``did you mean 'PREFIX.NAME'? `` for the nearest of `known`; empty when none is near."""
    spelled = {name.lower(): name for name in known}
    for cutoff in cutoffs:
        if near := difflib.get_close_matches(str(word).lower(), list(spelled), n=1, cutoff=cutoff):
            return f"did you mean '{prefix}{spelled[near[0]]}'? "
    return ""
