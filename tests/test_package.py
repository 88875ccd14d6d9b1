"""``import hpc_cpd``: cheap, and complete; and what it requires."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hpc_cpd

ROOT = Path(__file__).parents[1]


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, hpc_cpd; print([n for n in ('numpy', 'torch', 'h5py', 'gymnasium') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", hpc_cpd.__all__)
def test_every_public_name_is_there(name):
    assert name in dir(hpc_cpd)
    assert getattr(hpc_cpd, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'load_pupil'"):
        hpc_cpd.load_pupil  # noqa: B018


def pins(file: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", (ROOT / file).read_text(), re.M))


def test_the_files_of_versions_agree_with_the_requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = dict(re.match(r"([\w-]+)>=([\d.]+),<", line.lower()).groups() for line in project["dependencies"])
    lowest = pins("constraints-lowest.txt")
    assert lowest.keys() == bounds.keys() <= pins("constraints.txt").keys()
    assert all(lowest[name] == bound or lowest[name].removesuffix(".0") == bound for name, bound in bounds.items())


def test_the_lock_file_is_for_machines_with_a_gpu_and_without_one():
    text = (ROOT / "constraints.txt").read_text()
    assert pins("constraints.txt")["torch"] and "+" not in text and "nvidia" not in text and "--" not in text
