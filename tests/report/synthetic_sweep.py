"""The folder of a finished sweep over made-up runs: two rows, one of two seeds, with the same teachers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from hpc_cpd.config import config_as_yaml, load_config
from hpc_cpd.report.comparison import write_sweep_file
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import read_json, write_json
from tests.report.synthetic import synthetic_run

SEEDS = {"ours": [0, 1], "other": [0]}
SECONDS = 90.0


def synthetic_sweep(folder: Path, tasks: object = "MT10", per_stage: int = 5) -> Path:
    """`ours` keeps what the made-up run has; seed 1 and `other` lose a success per task and stage behind it."""
    source = synthetic_run(folder / "source", tasks, per_stage)
    shared = folder / "shared" / "abc"
    shared.mkdir(parents=True)
    for name in ("config.yaml", "provenance.json"):
        shutil.copyfile(source.folder / name, shared / name)
    shutil.move(source.folder / "teachers", shared / "teachers")
    for row, seeds in SEEDS.items():
        for seed in seeds:
            run = Run(folder / row / f"seed-{seed}")
            shutil.copytree(source.folder, run.folder)
            os.symlink("../../shared/abc/teachers", run.folder / "teachers")
            words = [f"seed={seed}", f"method.freeze_shared_layers={json.dumps(row == 'ours')}"]
            run.config_file.write_text(config_as_yaml(load_config(run.config_file, words)))
            for path in run.folder.glob("stages/*"):
                write_json(path / "attempt.json", {"number": 1, "started": 10.0, "ended": 10.0 + SECONDS})
                if (row, seed) != ("ours", 0):
                    evaluation = read_json(path / "evaluation.json")
                    for record in evaluation["tasks"].values():
                        record["successes"] = max(0, record["successes"] - int(path.name))
                    write_json(path / "evaluation.json", evaluation)
    shutil.rmtree(source.folder)
    rows = {
        row: {
            "seeds": seeds,
            "title": "",
            "teaches": f"{row} | teaches",
            "command": f"hpc-cpd sweep x.yaml --only {row}",
        }
        for row, seeds in SEEDS.items()
    }
    write_sweep_file(folder, "made-up", rows)
    return folder
