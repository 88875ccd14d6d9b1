"""Where a result comes from: also what has never been tested."""

import re
from importlib import metadata
from pathlib import Path

from hpc_cpd.cluster import provenance

ROOT = Path(__file__).parents[2]


def test_the_tested_versions_are_those_of_the_lock_file():
    pins = dict(re.findall(r"^([a-z0-9-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert provenance.TESTED.items() <= pins.items()


def test_a_simulator_of_another_version_is_told_in_the_provenance(monkeypatch):
    true = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "4.0.0" if name == "mujoco" else true(name))
    assert provenance.describe_origin()["untested_versions"].get("mujoco") == "4.0.0"
    monkeypatch.setattr(metadata, "version", lambda name: provenance.TESTED.get(name) or true(name))
    assert provenance.describe_origin()["untested_versions"] == {}
