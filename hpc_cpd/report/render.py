"""Pages from the templates in ``templates``, in whose HTML no text of a run can become markup."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from hpc_cpd.report.table import interval, percent, points
from hpc_cpd.run.publish import write_bytes

_ENVIRONMENT = Environment(
    loader=PackageLoader("hpc_cpd.report"),
    autoescape=select_autoescape(),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters.update(interval=interval, percent=percent, points=points, quote=shlex.quote)


def render(template: str, **values: Any) -> str:
    """The text of `template` with these values. Where its name ends with ``.html``, all of them are escaped."""
    return _ENVIRONMENT.get_template(template).render(values)


def write_page(folder: Path, template: str, **values: Any) -> Path:
    """Write ``index.html`` into `folder`; return it."""
    write_bytes(folder / "index.html", render(template, **values).encode())
    return folder / "index.html"
