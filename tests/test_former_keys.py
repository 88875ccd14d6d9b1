"""Settings of version 1: refused with their names of today, and rewritten by benchmarks/migrate_settings.py."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hpc_cpd.config import load_config
from hpc_cpd.errors import UserError
from hpc_cpd.former_keys import FORMER_KEYS
from hpc_cpd.settings import Config
from tests.test_public_interface import keys

ROOT = Path(__file__).parents[1]
TODAY = {re.sub(r"\[\w+\]", "", key) for key in keys(Config)}
PLAIN = {  # the combination of settings that was fine-tuning
    "student": {"grow": False, "experts_per_task": 5},
    "distill": {"freeze_shared": False, "replay_fraction": 0.0, "anchor_fraction": 0.0},
}


def test_every_former_key_leads_to_a_setting_of_today_and_is_none_itself():
    for former, today in FORMER_KEYS.items():
        assert former not in TODAY
        assert today.split(" ")[0] in {*TODAY, "method.self_distillation", "method.dagger", "method.growth"}, former


def test_the_table_in_the_changelog_is_the_one_that_is_used():
    row = rf"^\| `((?:memory|{'|'.join(Config.model_fields)})\.[\w.]+)` \| (.+) \|$"
    rows = re.findall(row, (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert {former: today for former, today in rows if former not in TODAY} == FORMER_KEYS


@pytest.mark.parametrize(
    ("text", "words", "told"),
    [
        ("", ["distill.penalty=ewc"], ["'distill.penalty' is now method (method: {name: ewc, coefficient: 100}"]),
        ("", ["student.grow=false", "memory.selection=uniform"], ["method.growth: null", "method.memory.selection"]),
        ("distill: {freeze_old: false}", [], ["config.yaml: setting 'distill.freeze_old' is now method.growth.fr"]),
        ("schema_version: 1\nmemory: {budget_fraction: 0.1}", [], ["schema_version 1", "reads 2: setting 'memory.bu"]),
        ("schema_version: 1", [], ["schema_version 1, but this version reads 2"]),
        ("schema_version: 1\n" + yaml.safe_dump(PLAIN), [], ["method.freeze_shared_layers", "and 2 more"]),
    ],
)
def test_a_former_key_is_refused_in_one_sentence_with_its_name_of_today(tmp_path, text, words, told):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as refusal:
        load_config(file, words)
    sentence = str(refusal.value)
    assert "\n" not in sentence and all(part in sentence for part in told), sentence
    assert "CHANGELOG.md" in sentence or text == "schema_version: 1"


SCRIPT = str(ROOT / "benchmarks" / "migrate_settings.py")


def write(folder: Path, values: dict) -> Path:
    file = folder / "run" / "config.yaml"
    file.parent.mkdir()
    file.write_text(yaml.safe_dump(values))
    return file


def plain(**distill: object) -> dict:
    return {"schema_version": 1, **PLAIN, "distill": PLAIN["distill"] | distill}


@pytest.mark.parametrize(
    ("former", "method"),
    [
        (plain(), {"name": "fine_tuning"}),
        (plain(penalty="ewc"), {"name": "ewc", "coefficient": 1000.0}),  # what version 1 had as its default
        (
            plain(penalty="online_ewc", penalty_coefficient=3.0, online_ewc_decay=0.5),
            {"coefficient": 3.0, "decay": 0.5},
        ),
        (plain(isolation="lora", lora_rank=3), {"name": "lora", "rank": 3}),
        (plain(replay_fraction=0.25), {"name": "replay", "replay_fraction": 0.25, "memory": "dpp"}),
        (plain(replay_fraction=0.5, gradient_projection=True), {"name": "a_gem", "memory": "dpp"}),
        (plain(replay_fraction=0.5, replay_targets="past_student"), {"name": "clonex", "experts_per_task": 5}),
        ({"method": "paper", "memory": {"selection": "uniform"}}, {"name": "paper", "self_distillation": None}),
        ({"distill": {"relabelled_episodes": 4}}, {"name": "ours", "dagger": {"episodes": 4, "steps": 1000}}),
        ({"student": {"grow": False}}, {"name": "ours", "growth": None, "experts_per_task": 1}),
    ],
)
def test_what_was_a_combination_of_settings_becomes_one_method(tmp_path, former, method):
    file, main = write(tmp_path, former), runpy.run_path(SCRIPT)["main"]
    main([str(tmp_path)])
    made = load_config(file).method.model_dump()
    made["memory"] = made["memory"]["selection"]["name"] if "memory" in method else None
    assert made.items() >= method.items()
    once = file.read_bytes()
    main([str(file)])
    assert file.read_bytes() == once


def test_a_combination_that_is_no_method_of_today_is_refused_and_left_alone(tmp_path):
    former = {"distill": {"penalty": "ewc"}}  # with growth, replay and frozen layers
    file = write(tmp_path, former)
    done = subprocess.run([sys.executable, SCRIPT, str(file)], capture_output=True, text=True)
    assert done.returncode == 1 and f"{file}: no method of today" in done.stderr and "Traceback" not in done.stderr
    assert yaml.safe_load(file.read_text()) == former
