"""Growth from 5 to 10 to 25 experts on real DeepSpeed ranks: what it leaves alone, who learns, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hpc_cpd.config import load_config
from hpc_cpd.distill.finalize import routing_by_task
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import mark_done, read_json
from hpc_cpd.student.policy import load_student
from hpc_cpd.tasks.registry import run_plan, task_set
from hpc_cpd.trajectories.store import TrajectoryStore, open_trajectories
from tests.distill.synthetic import SETTINGS, record_task
from tests.student.ranks import run_ranks

SCRIPT = "../distill/rank_growth.py"  # beside tests/student, where run_ranks looks
EXPERTS = [5, 10, 25]  # after each stage, one per task
# Without a second phase the published student is the one that phase 1 made.
GROWING = [
    "stream.tasks_per_stage=15",
    "student.task_embedding.size=32",
    "student.task_embedding.gradient_steps=60",
    "distill.phase2_steps=0",
]
LONG_ENOUGH = ["distill.batch_size=256", "distill.phase1_steps=150", "distill.learning_rate=0.004"]


@dataclass(frozen=True)
class Grown:
    """A run after three stages, and the steps of each stage in which each expert received a gradient."""

    run: Run
    plan: list[list[str]]
    gradients: list[dict[str, int]]

    def store(self, tasks: list[str]) -> TrajectoryStore:
        return open_trajectories([self.run.trajectories(task) for task in tasks], tasks)


def make_run(folder: Path, stream: list[str], recorded: list[str], *words: str) -> Run:
    """A run over `stream` whose teachers of `recorded` are done; the others never will be."""
    run = Run(folder)
    run.open(load_config(None, [*SETTINGS, f"stream.tasks=[{','.join(stream)}]", *words]), {})
    for number, task in enumerate(recorded):
        mark_done(run.teacher(task), {})
        record_task(run, task, number)
    return run


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Grown]:
    """The run with a gate of this `top_k`; new experts have time to learn but for top_k=2."""

    @cache
    def learn(top_k: int) -> Grown:
        folder = tmp_path_factory.mktemp(f"top-{top_k}")
        stream = task_set("MT50")[:45]
        recorded = [*stream[:5], *stream[15:20], *stream[30:45]]  # of 15 tasks a stage, 5, 5 and 15 have a teacher
        words = LONG_ENOUGH if top_k < 2 else ["distill.phase1_steps=10"]
        run = make_run(folder / "run", stream, recorded, f"student.top_k={top_k}", *GROWING, *words)
        answer = run_ranks(SCRIPT, 1, folder, {"run": str(run.folder), "stages": 3})
        return Grown(run, run_plan(run), answer["gradients"])

    return learn


def at_start(grown: Grown, stage: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Every recorded step of the old tasks, before and after the growth that begins `stage`.

    Returns pairs (before, after) of actions, of the pass that learns and of the one that acts at the beginning of an
    episode; and the gate after.
    """
    before, after = (load_student(grown.run.stage(k) / name) for k, name in ((stage - 1, "student"), (stage, "start")))
    assert [sum(map(len, policy.experts_by_stage)) for policy in (before, after)] == EXPERTS[stage - 2 : stage]
    store = grown.store([task for tasks in grown.plan[: stage - 1] for task in tasks])
    windows = store.gather_histories(np.arange(len(store)), before.shape.history)
    observations, valid = torch.tensor(windows["observations"]), torch.tensor(windows["valid"])
    vectors = torch.tensor(np.stack([before.task_vectors[store.task_ids[i]] for i in windows["task_index"]]))
    with torch.inference_mode():
        learning = [policy.student(observations, vectors, valid)[0][valid] for policy in (before, after)]
        acting = []
        for policy in (before, after):
            cache = policy.student.backbone.new_cache(len(observations))
            actions, _, gate = policy.student(observations[:, :1], vectors, cache=cache)
            acting.append((actions[:, 0], gate[:, 0].mean(dim=1)))
    return [(learning[0], learning[1]), (acting[0][0], acting[1][0])], acting[1][1]


def shares(grown: Grown, stage: int) -> tuple[np.ndarray, np.ndarray]:
    """Share of the gate that each new task gives to each new expert, [tasks, new experts]: before and after phase 1."""
    tasks, old = grown.plan[stage - 1], EXPERTS[stage - 2]
    before = routing_by_task(grown.run.stage(stage) / "start", [grown.store(tasks)], tasks)
    after = read_json(grown.run.stage(stage) / "routing.json")
    one, other = (np.array([routing["tasks"][task][old:] for task in tasks]) for routing in (before, after))
    return one, other


@pytest.mark.parametrize("stage", [2, 3])
def test_growth_with_a_dense_gate_moves_old_tasks_by_less_than_one_percent(
    grown: Callable[[int], Grown], stage: int
) -> None:
    pairs, gate = at_start(grown(0), stage)
    assert float(gate[:, EXPERTS[stage - 2] :].sum(dim=1).min()) > 0
    for before, after in pairs:
        assert float((after - before).norm() / before.norm()) <= 1e-2


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("top_k", [1, 2])
def test_growth_with_a_top_k_gate_leaves_old_tasks_to_the_last_bit(
    grown: Callable[[int], Grown], top_k: int, stage: int
) -> None:
    pairs, gate = at_start(grown(top_k), stage)
    assert int(gate.topk(top_k, dim=1).indices.max()) < EXPERTS[stage - 2]  # no new expert is picked
    for before, after in pairs:
        assert torch.equal(before, after)


@pytest.mark.parametrize("top_k", [0, 1])
def test_every_new_expert_receives_a_gradient_in_phase_1(grown: Callable[[int], Grown], top_k: int) -> None:
    for stage in (2, 3):
        old, new = EXPERTS[stage - 2 : stage]
        steps = grown(top_k).gradients[stage - 1]
        assert set(steps) == {str(expert) for expert in range(old, new)}  # and no frozen one
        assert all(steps.values())


@pytest.mark.parametrize("top_k", [0, 1])
def test_new_experts_carry_their_own_tasks_after_phase_1(grown: Callable[[int], Grown], top_k: int) -> None:
    for stage in (2, 3):
        before, after = shares(grown(top_k), stage)
        assert after.sum(axis=1).mean() > 5 * before.sum(axis=1).mean()
        assert after.max(axis=0).min() > 0.005  # each new expert is of use to some new task; before: 0.2% at most
        if top_k:  # the hard gate picks them
            assert after.sum(axis=1).min() > 0.5


def test_ten_stages_in_one_process_do_not_pile_up_memory(tmp_path: Path) -> None:
    """The shared layers are wide: one student or engine that stays alive per stage would show."""
    words = [
        "student.width=320",
        "student.backbone.layers=2",
        "student.history=1",
        "student.task_embedding.gradient_steps=5",
    ]
    words += ["stream.tasks_per_stage=1", "distill.phase1_steps=4", "distill.phase2_steps=4", "distill.warmup_steps=2"]
    tasks = task_set("MT10")
    run = make_run(tmp_path / "run", tasks, tasks, *words)
    held = run_ranks(SCRIPT, 1, tmp_path, {"run": str(run.folder), "stages": len(tasks)})["megabytes"]
    assert len(held) == len(tasks)
    assert held[-1] - held[1] < 50, held  # the first stages warm caches up
