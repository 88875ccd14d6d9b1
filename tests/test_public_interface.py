"""The contract. A change here needs a line in CHANGELOG.md."""

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import hpc_cpd
from hpc_cpd import errors, plugins
from hpc_cpd.config import load_config
from hpc_cpd.settings import Config, Settings, choice_of

ROOT = Path(__file__).parents[1]
SETTINGS = Path(__file__).with_name("golden_settings.txt")


def test_make_targets():
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", text, re.M))
    known = (
        "setup demo test check lint lock check-lowest bench bench-student bench-teachers gpu clean "
        "cluster-up cluster-down"
    )
    assert targets == set(known.split())
    shown = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "-m hpc_cpd.launch --stage all --config configs/quickstart.yaml" in shown


def test_launch_options():
    from hpc_cpd.launch import _parser

    options = {word for action in _parser()._actions for word in action.option_strings}
    known = "-h --help --stage --config --run --cluster --ranks --dry-run --wait --allow-missing --retry"
    assert options == set(known.split())
    words = ["a=1", "--stage", "all", "--ranks", "2", "b=2", "--wait"]
    assert _parser().parse_intermixed_args(words).settings == ["a=1", "b=2"]
    cluster = next(action for action in _parser()._actions if action.dest == "cluster")
    assert str(cluster.metavar).startswith("{auto,local,slurm") and cluster.default == "auto"


def test_exit_codes():
    codes = errors.EXIT_DONE, errors.EXIT_FAULT, errors.EXIT_USER_ERROR, errors.EXIT_STOPPED
    assert codes == (0, 1, 2, 3)


def test_doors():
    from hpc_cpd.cli import app

    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    known = "status sweep evaluate report results export import verify tasks plugins"
    assert names == set(known.split())


def test_python_names():
    assert set(hpc_cpd.__all__) == {"__version__", "load_student", "load_teacher", "make_batch", "open_trajectories"}
    for name in hpc_cpd.__all__:
        assert getattr(hpc_cpd, name)
    from hpc_cpd.evaluate.metrics import continual_metrics
    from hpc_cpd.trajectories.dpp import greedy_map

    assert callable(continual_metrics) and callable(greedy_map)


def keys(settings: type[Settings], prefix: str = "") -> list[str]:
    """Every dotted key; those of a plug-in as ``method[ewc].coefficient``, for each that comes with the package."""
    found = []
    for name, field in settings.model_fields.items():
        choice = choice_of(settings, name)
        if choice is not None:
            found.append(f"{prefix}{name}")
            for plugin in plugins.built_in(choice.kind):
                inner = keys(plugins.load(choice.kind, plugin).Settings, f"{prefix}{name}[{plugin}].")
                found += [key for key in inner if not key.endswith("].name")]
            continue
        groups = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        group = next((kind for kind in groups if issubclass(kind, Settings)), None)  # of "GrowthSettings | None" too
        found += [f"{prefix}{name}"] if group is None else keys(group, f"{prefix}{name}.")
    return found


def test_settings_keys():
    assert "\n".join(keys(Config)) + "\n" == SETTINGS.read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_valid_short_and_says_what_it_is(path):
    config = load_config(path)
    lines = path.read_text().splitlines()
    assert config.name == path.stem and lines[0].startswith("# ") and len(lines) <= 40


def test_importing_the_launcher_is_cheap():
    heavy = ("torch", "numpy", "submitit", "matplotlib")
    program = f"import sys, hpc_cpd.launch; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("script", "stage"), [("teachers", "teachers"), ("distill", "all")])
def test_cluster_scripts_pass_a_config_and_settings_on(script, stage, tmp_path):
    recorder = tmp_path / ".venv" / "bin" / "python"
    recorder.parent.mkdir(parents=True)
    recorder.write_text('#!/bin/sh\necho "$@"\n')
    recorder.chmod(0o755)
    for words, config in ((["my.yaml", "a=1", "b=2"], "my.yaml"), (["a=1", "b=2"], "configs/mt25.yaml")):
        command = ["bash", str(ROOT / "slurm" / f"{script}.sh"), *words]
        environment = {"SLURM_SUBMIT_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")
        expected = f"-m hpc_cpd.launch --stage {stage} --cluster slurm --config {config} a=1 b=2"
        assert done.stdout.strip() == expected, done.stderr
