"""Stages with weights of their own, PackNet and low-rank adapters, on real DeepSpeed ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_cpd.distill.finalize import routing_by_task
from hpc_cpd.distill.train import newest_checkpoint, position_of
from hpc_cpd.distill.validation import check_settings
from hpc_cpd.errors import UserError
from hpc_cpd.run.paths import Run
from hpc_cpd.student.policy import StudentParts, load_student, load_student_parts
from hpc_cpd.trajectories.store import open_trajectories
from tests.distill.ranks import finish, start_ranks
from tests.distill.synthetic import OBSERVATION_SIZE, TASKS, make_run, synthetic_config
from tests.student.ranks import run_ranks

STAGES = 3
LEARNT = TASKS[:STAGES]  # one in each stage
METHODS = ["packnet", "lora"]
WORDS = [
    f"stream.tasks=[{','.join(LEARNT)}]",
    "stream.tasks_per_stage=1",
    "distill.phase1_steps=20",
    "distill.phase2_steps=15",
    "distill.weight_decay=0.1",
]
OWN = {  # three experts: unevenly over two ranks
    "packnet": ["method=packnet", "method.experts_per_task=3"],
    "lora": ["method=lora", "method.experts_per_task=3", "method.rank=3"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """All stages of both methods on two ranks that share the experts."""
    made = {}
    for method in METHODS:
        folder = tmp_path_factory.mktemp(method)
        made[method] = make_run(folder / "run", *WORDS, *OWN[method])
        arguments = {"run": str(made[method].folder), "stages": STAGES}
        run_ranks("../distill/rank_growth.py", 2, folder, arguments)
    return made


def parts_of(run: Run, stage: int, name: str = "student") -> StudentParts:
    return load_student_parts(run.stage(stage) / name)


def owners_of(run: Run, stage: int) -> dict[str, torch.Tensor]:
    return kept_by(run, stage)


def kept_by(run: Run, stage: int) -> dict[str, torch.Tensor]:
    """What the method of `run` keeps in the student of `stage`."""
    state = parts_of(run, stage).method_state
    assert state is not None and state.method == run.config().method.name
    return state.tensors


def without_later_stages(run: Run, folder: Path, stage: int, *changes: tuple[str, str]) -> Run:
    """A copy of `run` in which `stage` is the next to learn."""
    copy = Run(shutil.copytree(run.folder, folder / "run"))
    for later in range(stage, STAGES + 1):
        shutil.rmtree(copy.stage(later))
    text = copy.config_file.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    copy.config_file.write_text(text)
    return copy


def actions(run: Run, stage: int, task: str, name: str = "student") -> np.ndarray:
    policy = load_student(run.stage(stage) / name)
    for other in policy.task_ids:  # whoever acted before
        policy.reset(other, 2)
    policy.reset(task, 16)
    seen = np.random.default_rng(0).normal(size=(3, 16, OBSERVATION_SIZE)).astype(np.float32)
    return np.array([policy.act(step) for step in seen])


@pytest.mark.parametrize("method", METHODS)
def test_every_task_goes_on_acting_with_the_very_bits_of_its_own_stage(runs: dict[str, Run], method: str) -> None:
    run = runs[method]
    for taught, task in enumerate(LEARNT, start=1):
        own = actions(run, taught, task)
        for later in range(taught + 1, STAGES + 1):
            assert (actions(run, later, task) == own).all()
            assert (actions(run, later, task, "start") == own).all()
    # and yet each stage learnt
    assert abs(actions(run, 2, LEARNT[1]) - actions(run, 2, LEARNT[1], "start")).max() > 1e-2
    assert abs(actions(run, 3, LEARNT[2]) - actions(run, 3, LEARNT[2], "start")).max() > 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_routing_of_a_task_is_that_of_its_own_stage_also_beside_tasks_of_others(
    runs: dict[str, Run], method: str
) -> None:
    folders = [runs[method].stage(stage) for stage in range(1, STAGES + 1)]
    store = open_trajectories([runs[method].trajectories(task) for task in LEARNT[:2]])
    routings = [routing_by_task(folder / "student", [store], LEARNT)["tasks"] for folder in folders[1:]]
    assert list(routings[0]) == LEARNT[:2]
    assert routings[0] == routings[1]


def test_every_stage_owns_its_share_of_every_matrix_for_good_and_the_rest_is_zero(runs: dict[str, Run]) -> None:
    run = runs["packnet"]
    before: dict[str, torch.Tensor] = {}
    for stage in range(1, STAGES + 1):
        state, owners = parts_of(run, stage).state, owners_of(run, stage)
        assert owners.keys() == {name for name, tensor in state.items() if tensor.dim() > 1}
        for name, owner in owners.items():
            left = owner.numel()
            for past in range(1, stage + 1):
                share = -(-left // (STAGES - past + 1))
                assert int((owner == past).sum()) == share
                left -= share
            assert int((owner == 0).sum()) == left
            assert (state[name][owner == 0] == 0).all()
            if stage > 1:
                old = owners_of(run, stage - 1)[name]
                assert torch.equal(owner[old > 0], old[old > 0])
                assert torch.equal(state[name][old > 0], before[name][old > 0])
                assert (state[name][owner == stage] != 0).any()
        if stage > 1:
            vectors = [name for name, tensor in state.items() if tensor.dim() < 2]
            assert vectors and all(torch.equal(state[name], before[name]) for name in vectors)
        before = state


def test_the_student_of_stage_1_stays_to_the_bit_beneath_its_adapters(runs: dict[str, Run]) -> None:
    first, last = parts_of(runs["lora"], 1), parts_of(runs["lora"], STAGES)
    assert first.state.keys() == last.state.keys()
    assert all(torch.equal(first.state[name], last.state[name]) for name in first.state)
    kept = {stage: kept_by(runs["lora"], stage) for stage in (1, STAGES)}
    matrices = {name for name, tensor in first.state.items() if tensor.dim() > 1}
    names = {f"{stage}/{name}_{part}" for stage in (2, 3) for name in matrices for part in ("up", "down")}
    assert kept[1] == {} and kept[STAGES].keys() == names
    assert all(tensor.any() for tensor in kept[STAGES].values())
    assert kept[STAGES]["3/head.weight_down"].shape == (3, 32)


@pytest.mark.parametrize(("method", "stops"), [("packnet", {7: (1, 4), 19: (2, 0), 8: (2, 5)}), ("lora", {25: (2, 2)})])
def test_a_stage_stopped_in_either_phase_or_between_them_publishes_the_same_bits(
    runs: dict[str, Run], tmp_path: Path, method: str, stops: dict[int, tuple[int, int]]
) -> None:
    """Stage 2, which must leave something to stage 3. `stops`: questions whether to stop -> where that was."""
    run = without_later_stages(runs[method], tmp_path, 2)
    for question, place in stops.items():
        finish(start_ranks(2, run.folder, 2, question), expected=3)
        checkpoint = newest_checkpoint(run.stage(2) / "checkpoints")
        assert checkpoint is not None and position_of(checkpoint) == place
    finish(start_ranks(2, run.folder, 2))
    for name in ("student/student.json", "metrics.jsonl", "routing.json"):
        assert (run.stage(2) / name).read_bytes() == (runs[method].stage(2) / name).read_bytes()


@pytest.mark.parametrize(
    ("method", "ranks", "parallel", "zero"), [("packnet", 1, 1, 0), ("lora", 1, 1, 0), ("lora", 2, 1, 2)]
)
def test_ranks_expert_parallel_size_and_zero_do_not_change_the_student(
    runs: dict[str, Run], tmp_path: Path, method: str, ranks: int, parallel: int, zero: int
) -> None:
    changes = [
        ("expert_parallel_size: 0", f"expert_parallel_size: {parallel}"),
        ("zero_stage: 0", f"zero_stage: {zero}"),
    ]
    run = without_later_stages(runs[method], tmp_path, STAGES, *changes)
    finish(start_ranks(ranks, run.folder, STAGES))
    ours, theirs = (parts_of(r, STAGES) for r in (run, runs[method]))
    if method == "packnet":  # the last stage owns all that is left, so that no rounding decides who owns what
        pairs = {name: (ours.state[name], theirs.state[name]) for name in ours.state}
        before = dict(parts_of(run, STAGES, "start").state)
        for name, owner in owners_of(run, STAGES).items():
            assert torch.equal(owner, owners_of(runs[method], STAGES)[name])
            assert torch.equal(ours.state[name][owner < STAGES], before[name][owner < STAGES])
    else:
        other = kept_by(runs[method], STAGES)
        pairs = {name: (tensor, other[name]) for name, tensor in kept_by(run, STAGES).items()}
        before = {name: torch.zeros_like(tensor) for name, (tensor, _) in pairs.items()}
    for name, (one, two) in pairs.items():
        moved = (two - before[name]).abs().max()
        assert (one - two).abs().max() <= 1e-3 * moved + 1e-5, name


def test_what_is_held_keeps_its_bits_and_nobody_sees_its_gradient(tmp_path: Path) -> None:
    """Without ZeRO, with ZeRO 1 and with ZeRO 2, against a weight decay of half."""
    for found in run_ranks("../distill/rank_hold.py", 1, tmp_path, {"zero": [0, 1, 2]}):
        assert found["norm"] == pytest.approx(found["norm_of_free"], rel=1e-4)
        assert found["norm_of_free"] < 0.9 * found["norm_of_all"]
        assert found["held_moved"] == 0 and found["held_moments"] == 0.0
        assert found["free_that_stayed"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_student_that_must_be_told_its_task_is_not_evaluated_untold(method: str) -> None:
    plan = [[task] for task in LEARNT]
    check_settings(synthetic_config(*WORDS, *OWN[method]), plan)
    with pytest.raises(UserError, match=rf"method {method}.*set evaluation\.infer_task=false"):
        check_settings(synthetic_config(*WORDS, *OWN[method], "evaluation.infer_task=true"), plan)


def test_packnet_needs_a_first_phase_and_stages_that_a_byte_can_name() -> None:
    packnet, lora = OWN["packnet"], OWN["lora"]
    with pytest.raises(UserError, match="phase1_steps is 0"):
        check_settings(synthetic_config(*packnet, "distill.phase1_steps=0"), [LEARNT])
    with pytest.raises(UserError, match=r"255 stages.*256"):
        check_settings(synthetic_config(*packnet), [LEARNT] * 256)
    check_settings(synthetic_config(*packnet), [LEARNT] * 255)
    check_settings(synthetic_config(*lora, "distill.phase1_steps=0"), [LEARNT] * 256)
