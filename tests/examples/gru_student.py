"""What test_gru_backbone.py runs where the example is installed: ``gru_student.py WHAT [ARGUMENT]``.

Tests of the Transformer student are called as they are, with the other backbone.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from hpc_cpd.run.publish import read_json
from hpc_cpd.student.policy import load_student
from tests.distill.ranks import finish, in_turn, start_ranks
from tests.distill.synthetic import TASKS, make_run
from tests.methods import test_importance
from tests.student import test_policy

GRU = {"backbone": {"name": "gru"}, "history": 6}


def acts(top_k: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for number, changes in enumerate((GRU, {**GRU, "history": 1})):
            place = Path(folder) / str(number)
            test_policy.test_acting_equals_the_training_forward_at_each_position(int(top_k), changes, place)
        test_policy.test_when_the_inferred_task_changes_the_past_is_seen_with_it(GRU, Path(folder) / "inferred")


def importance() -> None:
    test_importance.SHAPE = test_importance.SHAPE.model_copy(
        update={"backbone": test_policy.small_shape(**GRU).backbone}
    )
    for top_k in (0, 2):
        with pytest.MonkeyPatch.context() as patch:
            test_importance.test_importance_is_what_a_loop_of_plain_autograd_over_the_samples_finds(top_k, False, patch)


def learns(folder: str) -> None:
    whole, stopped = (make_run(Path(folder) / name, "student.backbone=gru") for name in ("whole", "stopped"))
    finish(start_ranks(2, *in_turn((whole.folder, 1), (whole.folder, 2), (stopped.folder, 1))))
    finish(start_ranks(2, stopped.folder, 2, 7), expected=3)
    assert list((stopped.stage(2) / "checkpoints").glob("phase-1-step-*"))
    finish(start_ranks(2, stopped.folder, 2))
    one, other = (run.stage(2) / "student" for run in (whole, stopped))
    assert (one / "student.json").read_bytes() == (other / "student.json").read_bytes()
    assert read_json(one / "student.json")["shape"]["backbone"] == {"name": "gru", "initial_update_bias": 1.0}
    policy = load_student(one)
    first = load_student(whole.stage(1) / "student").student.state_dict()
    moved = {n for n, t in policy.student.state_dict().items() if n in first and not torch.equal(t, first[n])}
    assert not any(name.startswith("backbone.") for name in moved)  # frozen after stage 1, like any backbone
    losses = [row["loss"] for row in map(json.loads, (whole.stage(1) / "metrics.jsonl").open())]
    assert losses[-1] < 0.5 * losses[0], losses
    assert policy.task_ids == TASKS


def publishes(folder: str) -> None:
    test_policy.publish(Path(folder), **GRU)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"acts": acts, "importance": importance, "learns": learns, "publishes": publishes}[sys.argv[1]](*sys.argv[2:])
    print("the same")
