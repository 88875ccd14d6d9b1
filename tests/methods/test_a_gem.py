"""A-GEM: steps that do not go against the replay memory, on real DeepSpeed ranks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hpc_cpd.config import load_config
from hpc_cpd.errors import UserError
from hpc_cpd.losses import action_mean_error
from hpc_cpd.methods.base import method_of
from hpc_cpd.run.metrics_log import read_metrics
from hpc_cpd.run.paths import Run
from hpc_cpd.student.network import Student
from tests.distill.ranks import finish, start_ranks
from tests.distill.synthetic import make_run
from tests.methods.rank_a_gem import shape_of, whole_batch, with_small_actions
from tests.rank_environments import rank_environments

SCRIPT = Path(__file__).with_name("rank_a_gem.py")
CASES = ["against", "along"]
Parts = dict[str, dict[str, dict[str, Tensor]]]


def steps_on(ranks: int, parallel: int, top_k: int, folder: Path) -> Parts:
    """Case -> part -> parameter -> tensor."""
    answer = folder / "answer.safetensors"
    words = [json.dumps({"expert_parallel_size": parallel, "top_k": top_k, "cases": CASES}), str(answer)]
    command = [sys.executable, str(SCRIPT), *words]
    pipe = subprocess.PIPE
    finish(
        [
            subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)
            for environment in rank_environments(ranks)
        ]
    )
    parts: Parts = {}
    for key, tensor in load_file(answer).items():
        case, part, name = key.split("/")
        parts.setdefault(case, {}).setdefault(part, {})[name] = tensor
    return parts


def product(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return sum(float((one[name].double() * other[name].double()).sum()) for name in one)


def plain_gradients(case: str, top_k: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By autograd on one process: of the new rows, and of the replayed ones."""
    student, batch = with_small_actions(Student(shape_of(top_k), [[0, 1, 2]], for_training=False)), whole_batch(case)
    found = []
    for rows in (batch.is_new_task, ~batch.is_new_task):
        student.zero_grad()
        actions, _, _ = student(batch.observations[rows], batch.task_vectors[rows], batch.valid[rows])
        errors = action_mean_error(actions, batch.target[rows], batch.valid[rows])
        (errors.sum() / batch.valid[rows].sum()).backward()
        named = student.named_parameters()
        found.append({name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named})
    return found[0], found[1]


@pytest.mark.parametrize(("top_k", "spread"), [(0, [(1, 1), (2, 2), (2, 1)]), (1, [(2, 2)])])
def test_the_projection_is_that_of_the_whole_student_wherever_its_experts_live(
    top_k: int, spread: list[tuple[int, int]], tmp_path: Path
) -> None:
    first: Parts | None = None
    for ranks, parallel in spread:
        steps = steps_on(ranks, parallel, top_k, tmp_path)
        for case in CASES:
            gradient, reference = plain_gradients(case, top_k)
            for name in gradient:
                torch.testing.assert_close(steps[case]["gradient"][name], gradient[name], rtol=1e-4, atol=1e-6)
                torch.testing.assert_close(steps[case]["reference"][name], reference[name], rtol=1e-4, atol=1e-6)
        against, along = steps["against"], steps["along"]
        size = product(against["reference"], against["reference"])
        before = product(against["gradient"], against["reference"])
        assert before < -1e-2 * size
        assert product(against["projected"], against["reference"]) >= -1e-6
        for name, value in against["gradient"].items():
            wanted = value - before / size * against["reference"][name]
            torch.testing.assert_close(against["projected"][name], wanted, rtol=1e-5, atol=1e-7, msg=name)
        assert product(along["gradient"], along["reference"]) > 0
        assert all(torch.equal(along["projected"][name], value) for name, value in along["gradient"].items())
        assert any(value.any() for value in against["update"].values())
        first = first or steps
        for case in CASES:
            for name, update in first[case]["update"].items():
                # AdamW's first step is little but a sign: where a gradient is rounding alone, that may be any
                sure = first[case]["projected"].get(name, update).abs() > 1e-5
                ours = steps[case]["update"][name]
                torch.testing.assert_close(ours[sure], update[sure], rtol=1e-3, atol=1e-6, msg=name)


def test_zero_that_shares_gradients_out_is_refused() -> None:
    with pytest.raises(UserError, match=re.escape("distill.zero_stage is 2")):
        method_of(load_config(None, ["method=a_gem", "distill.zero_stage=2"])).check(2)


def test_a_stage_with_gradient_projection_goes_on_with_the_same_bits_and_needs_a_memory(tmp_path: Path) -> None:
    words = ("method=a_gem", "method.experts_per_task=1", "method.memory.budget_fraction=0.2")
    run = make_run(tmp_path / "run", *words)
    finish(start_ranks(2, run.folder, 1))
    stopped = Run(shutil.copytree(run.folder, tmp_path / "stopped"))
    without = Run(shutil.copytree(run.folder, tmp_path / "without"))
    finish(start_ranks(2, run.folder, 2))
    finish(start_ranks(2, stopped.folder, 2, 20), expected=3)
    finish(start_ranks(2, stopped.folder, 2))
    whole, resumed = ((r.stage(2) / "student" / "student.json").read_bytes() for r in (run, stopped))
    assert whole == resumed
    assert all(line["replay_loss"] is not None for line in read_metrics(run.stage(2) / "metrics.jsonl"))
    text = without.config_file.read_text()
    without.config_file.write_text(text.replace("batch_size: 32", "batch_size: 1"))
    output = finish(start_ranks(1, without.folder, 2), expected=2)
    assert "stage 2: method a_gem needs new rows and remembered rows" in output
