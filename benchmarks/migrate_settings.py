"""Rewrite YAML settings of version 1 as those of today:  python benchmarks/migrate_settings.py FILE-OR-FOLDER ...

Of a folder, every ``config.yaml`` below it, so ``docs/results`` brings the published runs up to date. Twice is once.
Comments are lost, so what is written by hand (configs/) is better changed by hand, with the table in CHANGELOG.md.

In version 1 a method was a combination of settings, and every run kept a replay memory, also of the methods that never
replay it: their task encoder read it. Now the combination is one method, and what this method has no setting for is
dropped: the memory of fine-tuning, EWC, Online EWC, L2, MAS, PackNet and LoRA, the teacher's training where teachers
come from the zoo, and so on. No published number depends on what is dropped when the files are read.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hpc_cpd.config import SCHEMA_VERSION, parse_config
from hpc_cpd.errors import UserError
from hpc_cpd.former_keys import FORMER_KEYS
from hpc_cpd.run.publish import write_bytes

# of version 1, where it says nothing: what says which method it is, and what has another default in some methods today
USUAL: dict[str, Any] = {
    "memory": {"budget_fraction": 0.05, "selection": "dpp"},
    "student": {"grow": True, "experts_per_task": 1, "gate_bias_at_birth": -5.0},
    "distill": {
        "newborn_coefficient": 0.1,
        "freeze_old": True,
        "freeze_shared": True,
        "replay_fraction": 0.5,
        "anchor_fraction": 0.5,
        "between_fraction": 0.5,
        "relabelled_episodes": 0,
        "phase3_steps": 1000,
        "penalty": "none",
        "penalty_coefficient": 1000.0,
        "online_ewc_decay": 0.95,
        "isolation": "none",
        "lora_rank": 8,
        "gradient_projection": False,
        "replay_targets": "teacher",
    },
}
OF_PAPER = {"memory": {"budget_fraction": 0.095}, "distill": {"anchor_fraction": 0.0, "freeze_old": False}}
PLUGINS = {  # what version 1 was, where it says nothing
    "teachers.source": "train",
    "teachers.start": "demonstrations",
    "teachers.algorithm": "ppo",
    "student.backbone": "transformer",
    "student.task_embedding": "contrastive",
    "cluster.scheduler": "slurm",
}


def migrated(values: Mapping[str, Any]) -> dict[str, Any]:
    """Today's settings for `values` of version 1. Raises UserError: they are a combination that no method is today."""
    old, new = _flat(values), dict[str, Any]()
    chosen = {key: old.get(key, old.get(f"{key}.name", usual)) for key, usual in PLUGINS.items()}
    of_method = {key for key in FORMER_KEYS if FORMER_KEYS[key].startswith("method")}
    if of_method & old.keys():
        new["method"] = method_of(values)
    for key in [key for key in old if key not in of_method]:
        today, _, condition = FORMER_KEYS.get(key, key).partition(" where ")
        plugin, _, name = condition.partition(" is ")
        if not condition or chosen[plugin] == name:
            _put(new, today, old[key], chosen)
    return new


def method_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The method that the settings `values` of version 1 stand for, with its settings."""
    method = str(values.get("method", "ours"))
    layers = [USUAL, OF_PAPER if method == "paper" else {}, values]
    memory, student, distill = ({k: v for one in layers for k, v in one.get(group, {}).items()} for group in USUAL)
    told = [
        *({distill["penalty"], distill["isolation"]} - {"none"}),
        *["a_gem"] * distill["gradient_projection"],
        *["clonex"] * (distill["replay_targets"] == "past_student"),
    ]
    plain = not (student["grow"] or distill["freeze_shared"] or distill["anchor_fraction"])
    if plain and not told:
        told = ["replay" if distill["replay_fraction"] else "fine_tuning"]
    replays = not told or told[0] in ("replay", "a_gem", "clonex")
    fits = plain and len(told) == 1 and not distill["relabelled_episodes"] if told else distill["replay_fraction"]
    if not fits or replays != (distill["replay_fraction"] > 0):
        raise UserError(
            f"no method of today is what these settings of version 1 make of {' and '.join(told) or method}"
        )
    settings = {"name": told[0] if told else method, "experts_per_task": student["experts_per_task"]}
    if replays:
        kept = {"budget_fraction": memory["budget_fraction"], "selection": memory["selection"]}
        settings |= {"memory": kept, "replay_fraction": distill["replay_fraction"]}
    if distill["penalty"] != "none":
        settings["coefficient"] = distill["penalty_coefficient"]
    if told == ["online_ewc"]:
        settings["decay"] = distill["online_ewc_decay"]
    if told == ["lora"]:
        settings["rank"] = distill["lora_rank"]
    if not told:
        growth = {
            "initial_gate_bias": student["gate_bias_at_birth"],
            "new_expert_routing_coefficient": distill["newborn_coefficient"],
            "freeze_old_experts": distill["freeze_old"],
        }
        own, dagger = distill["anchor_fraction"], distill["relabelled_episodes"]
        settings |= {
            "growth": growth if student["grow"] else None,
            "freeze_shared_layers": distill["freeze_shared"],
            "self_distillation": {"fraction": own, "interpolation_fraction": distill["between_fraction"]}
            if own
            else None,
            "dagger": {"episodes": dagger, "steps": distill["phase3_steps"]} if dagger else None,
        }
    return settings


def migrate(file: Path) -> None:
    """Rewrite `file`. Raises UserError, with its name, when it holds what cannot be said today."""
    old = yaml.safe_load(file.read_text())
    version = {} if old.pop("schema_version", None) is None else {"schema_version": SCHEMA_VERSION}
    try:
        new = migrated(old)
        parse_config(new)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    write_bytes(file, yaml.safe_dump(version | new, sort_keys=False).encode())


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        inner = (
            isinstance(value, Mapping) and value and not key.endswith(".options")
        )  # sbatch's are no settings of ours
        flat |= _flat(value, f"{key}.") if inner else {key: value}
    return flat


def _put(values: dict[str, Any], key: str, value: Any, chosen: Mapping[str, str]) -> None:
    """Set a dotted key; a plug-in that has settings becomes a mapping which begins with its name."""
    groups = key.split(".")
    for depth, group in enumerate(groups[:-1], 1):
        plugin = chosen.get(".".join(groups[:depth]))
        if not isinstance(values.get(group), dict):
            values[group] = {} if plugin is None else {"name": plugin}
        values = values[group]
    if not (isinstance(value, str) and isinstance(values.get(groups[-1]), dict)):  # the name stands there already
        values[groups[-1]] = value


def main(paths: list[str]) -> None:
    for path in map(Path, paths):
        for file in sorted(path.rglob("config.yaml")) if path.is_dir() else [path]:
            migrate(file)
            print(file)


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
