"""Stages on a real GPU (``make gpu``); tests/distill/test_devices.py does what can be done without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hpc_cpd.student.policy import load_student_parts
from tests.distill.ranks import finish, in_turn, start_ranks
from tests.distill.synthetic import make_run
from tests.distill.test_devices import CASES, SHORT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]

IN_BFLOAT16 = "a backbone that learns"


def test_stages_on_a_gpu_learn_what_they_learn_on_the_cpu(tmp_path: Path) -> None:
    """Of float32; what bfloat16 rounds may differ, and only has to be learnt."""
    places = {"cpu": {"CUDA_VISIBLE_DEVICES": ""}, "gpu": {"DS_ACCELERATOR": "cuda"}}
    runs = {
        place: {
            name: make_run(tmp_path / place / str(number), *SHORT, *settings)
            for number, (name, (settings, _)) in enumerate(CASES.items())
        }
        for place in places
    }
    for place, variables in places.items():
        wishes = [(run.folder, stage) for run in runs[place].values() for stage in (1, 2)]
        finish(start_ranks(1, *in_turn(*wishes), **variables))
    for name in CASES:
        mine, wanted = (load_student_parts(runs[place][name].stage(2) / "student").state for place in ("gpu", "cpu"))
        assert mine.keys() == wanted.keys()
        assert all(tensor.isfinite().all() for tensor in mine.values())
        if name != IN_BFLOAT16:
            for tensor in mine:
                far = float((mine[tensor] - wanted[tensor]).abs().max())
                assert torch.allclose(mine[tensor], wanted[tensor], atol=1e-3), (name, tensor, far)
