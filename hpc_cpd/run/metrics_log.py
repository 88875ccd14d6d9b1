"""``metrics.jsonl``: one JSON object per line, the same file whether a run was interrupted or not."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpc_cpd.run.publish import ask_guards, write_bytes


class MetricsLog:
    """A ``metrics.jsonl``: one JSON object per line, each with a ``step``.

    On resume, lines past the checkpoint are dropped, so that a resumed run leaves the same file as an
    undisturbed one. A line cut short by a kill is dropped as well.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        """Keep the lines with ``step <= resume_step`` and append after them."""
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step]
        write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def append(self, step: int, **values: Any) -> None:
        ask_guards(self.path)  # a new owner may be writing this very file
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file, in order; an absent file has none."""
    lines: list[dict[str, Any]] = []
    with suppress(FileNotFoundError, ValueError):
        lines.extend(map(json.loads, path.read_text().splitlines()))  # up to the first that is cut short
    return lines
