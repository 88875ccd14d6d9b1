"""What is published under docs/results can be read by today's version, and its numbers are those of its files."""

import re
from pathlib import Path

import numpy as np
import pytest

from hpc_cpd.config import flat_settings, load_config
from hpc_cpd.run.publish import read_json
from hpc_cpd.sweep.plan import read_sweep

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
SWEEPS = sorted(path.parent.name for path in RESULTS.glob("*/sweep.json"))


def test_every_published_config_is_one_of_today():
    files = sorted(RESULTS.rglob("config.yaml"))
    assert len(files) > 70
    for file in files:
        load_config(file)


@pytest.mark.parametrize("name", SWEEPS)
def test_numbers_of_the_page_are_those_of_the_evaluations(name):
    """Success at the end and its forgetting, from the successes of every episode and with nothing but arithmetic."""
    section = (ROOT / "docs" / "results.md").read_text().split(f"\n## {name}\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| ([\w-]+) \(.*?\) (\| \d+ \| .*)$", section, re.M))
    assert len(rows) >= 4
    for row, cells in rows.items():
        rates = []  # of every seed: [stage][task]
        for run in sorted((RESULTS / name / row).glob("seed-*")):
            stages = sorted(run.glob("stages/*/evaluation.json"), key=lambda path: int(path.parent.name))
            tasks = [read_json(stage)["tasks"] for stage in stages]
            rates.append([{task: one["successes"] / one["episodes"] for task, one in stage.items()} for stage in tasks])
        last = [np.mean([seed[-1][task] for seed in rates]) for task in rates[0][-1]]
        _, seeds, success, _, _, forgetting, *_ = (cell.strip() for cell in cells.split("|"))
        assert int(seeds) == len(rates)
        assert float(success.partition("%")[0]) == pytest.approx(100 * np.mean(last), abs=0.0501), row
        first = {task: stage for stage in reversed(range(len(rates[0]))) for task in rates[0][stage]}
        lost = [
            np.mean([seed[stage][task] - seed[-1][task] for seed in rates])
            for task, stage in first.items()
            if stage < len(rates[0]) - 1
        ]
        if lost:
            assert float(forgetting.partition(" pp")[0]) == pytest.approx(100 * np.mean(lost), abs=0.0501), row
        else:
            assert forgetting == "-", row


@pytest.mark.parametrize("name", SWEEPS)
def test_published_runs_have_the_settings_that_their_sweep_asks_for(name):
    """But for defaults of training teachers that changed since, and joint training, which was ours in one stage."""
    compared = 0
    for entry in read_sweep(ROOT / "configs" / "sweeps" / f"{name}.yaml").entries:
        file = RESULTS / name / entry.row / f"seed-{entry.seed}" / "config.yaml"
        if not file.is_file() or entry.config.method.name == "joint":
            continue
        made, asked = flat_settings(load_config(file)), flat_settings(entry.config)
        differ = {
            key for key in made.keys() | asked.keys() if (key in made, made.get(key)) != (key in asked, asked.get(key))
        }
        assert differ <= {key for key in differ if re.search(r"^teachers\..*(num_envs|rollout_steps)$", key)}, file
        compared += 1
    assert compared >= 2
