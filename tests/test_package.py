"""``import hpc_cpd``: cheap, and complete."""

import subprocess
import sys

import pytest

import hpc_cpd


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
