"""What README.md says is true: its numbers are the published ones, its links and commands exist."""

from __future__ import annotations

import re
from pathlib import Path

from hpc_cpd import cli
from hpc_cpd.report.comparison import cells, compare, headings

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
COLUMNS = {
    "success": "Success at the end",
    "forgetting": "Mean forgetting",
    "task not told": "Task not told",
    "seeds": "Seeds",
}


def test_the_table_of_results_has_the_published_numbers() -> None:
    lines = TEXT[TEXT.index("| method | success |") :].split("\n\n")[0].splitlines()
    names, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]
    comparison = compare([ROOT / "docs" / "results" / "baselines"])
    published = {
        group.name: dict(zip(headings(comparison), cells(comparison, group), strict=True)) for group in comparison.begun
    }
    assert len(rows) >= 6
    for row in rows:
        for name, value in zip(names[1:], row[1:], strict=True):
            assert value == published[row[0]][COLUMNS[name]][0], (row[0], name)


def test_links_and_paths_lead_somewhere() -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in target]
    assert targets and all((ROOT / target).exists() for target in targets)
    folders = re.findall(r"`((?:hpc_cpd|configs|slurm|benchmarks|examples)/[\w/.]*)`", TEXT)
    assert folders and all((ROOT / folder).exists() for folder in folders)


def test_every_command_that_it_names_exists() -> None:
    known = {command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback}
    assert set(re.findall(r"hpc-cpd ([a-z]+)", TEXT)) <= known
