"""The method is a word; what it sets gives way to what a user says."""

from pathlib import Path

import pytest

from hpc_cpd.config import config_as_yaml, load_config
from hpc_cpd.errors import UserError
from hpc_cpd.settings import METHODS, Config


def test_our_method_is_the_default() -> None:
    assert load_config(None) == load_config(None, ["method=ours"]) == Config()


@pytest.mark.parametrize("file", [True, False])
def test_the_method_of_the_paper_sets_what_nobody_said_otherwise(file: bool, tmp_path: Path) -> None:
    words = ["method=paper", "distill.anchor_fraction=0.25"]
    path = None
    if file:
        path, words = tmp_path / "config.yaml", words[:1]
        path.write_text("distill: {anchor_fraction: 0.25}\n")
    config = load_config(path, words)
    assert config.distill.anchor_fraction == 0.25
    assert not config.student.experts_see_observation
    assert config.memory.budget_fraction == METHODS["paper"]["memory"]["budget_fraction"]
    assert config.distill.phase1_steps == Config().distill.phase1_steps


def test_a_stored_config_is_read_as_it_was(tmp_path: Path) -> None:
    config = load_config(None, ["method=paper", "student.experts_see_observation=true"])
    (tmp_path / "config.yaml").write_text(config_as_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_an_unknown_method_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"setting 'method'.*'ours' or 'paper'.*'better'"):
        load_config(None, ["method=better"])
