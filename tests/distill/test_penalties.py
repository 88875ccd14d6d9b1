"""Weight regularisers: the quadratics of EWC, Online EWC and L2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hpc_cpd.distill.penalties import Penalty, importance_of, next_penalty
from hpc_cpd.errors import UserError
from hpc_cpd.settings import DistillSettings
from hpc_cpd.student.network import Student
from hpc_cpd.student.policy import load_student_parts
from tests.distill.ranks import finish, in_turn, start_ranks
from tests.distill.synthetic import make_run
from tests.student.reference import small_shape

SHAPE = small_shape(
    observation_size=3,
    action_size=2,
    task_vector_size=2,
    width=8,
    layers=1,
    mixtures=1,
    heads=2,
    history=2,
    expert_hidden=8,
    shared_expert_hidden=0,
    experts_see_observation=True,
    top_k=0,
    initial_gate_bias=-5.0,
)


def settings(penalty: str) -> DistillSettings:
    return DistillSettings.model_validate({"penalty": penalty, "online_ewc_decay": 0.5})


def quadratic(penalty: Penalty, at: torch.Tensor) -> torch.Tensor:
    return (penalty.importance["w"] * (at - penalty.anchor["w"]).square()).sum()


def test_merged_ewc_has_the_gradient_of_one_quadratic_per_stage() -> None:
    generator = torch.Generator().manual_seed(0)
    fishers = [torch.rand(5, generator=generator) for _ in range(3)]
    optima = [torch.randn(5, generator=generator) for _ in range(3)]
    merged = None
    for fisher, optimum in zip(fishers, optima, strict=True):
        merged = next_penalty(settings("ewc"), merged, {"w": optimum}, {"w": fisher})
    assert merged is not None
    at = torch.randn(5, generator=generator, requires_grad=True)
    one = torch.autograd.grad(quadratic(merged, at), at)[0]
    many = torch.autograd.grad(sum((f * (at - o).square()).sum() for f, o in zip(fishers, optima, strict=True)), at)[0]
    torch.testing.assert_close(one, many)


def test_online_ewc_decays_old_importance_and_anchors_at_the_latest_optimum() -> None:
    first = next_penalty(settings("online_ewc"), None, {"w": torch.zeros(1)}, {"w": torch.tensor([2.0])})
    second = next_penalty(settings("online_ewc"), first, {"w": torch.ones(1)}, {"w": torch.tensor([3.0])})
    assert second.importance["w"].item() == 0.5 * 2.0 + 3.0
    assert second.anchor["w"].item() == 1.0


def test_l2_weighs_every_parameter_alike_and_needs_no_samples() -> None:
    student = Student(SHAPE, [[0]], for_training=False)
    nothing = (torch.zeros(0, 2, 3), torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    importance = importance_of(settings("l2"), student, nothing)
    assert importance.keys() == dict(student.named_parameters()).keys()
    state = student.state_dict()
    first = next_penalty(settings("l2"), None, state, importance)
    second = next_penalty(settings("l2"), first, {name: value + 1 for name, value in state.items()}, importance)
    assert all((value == 1).all() for value in second.importance.values())
    assert torch.equal(second.anchor["head.bias"], state["head.bias"] + 1)


def test_mas_sums_importance_over_stages_and_anchors_at_the_parameters_reached_last() -> None:
    first = next_penalty(settings("mas"), None, {"w": torch.zeros(1)}, {"w": torch.tensor([2.0])})
    second = next_penalty(settings("mas"), first, {"w": torch.ones(1)}, {"w": torch.tensor([3.0])})
    assert second.importance["w"].item() == 2.0 + 3.0
    assert second.anchor["w"].item() == 1.0


def test_a_missing_penalty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"penalty\.safetensors is missing"):
        Penalty.load(tmp_path / "penalty.safetensors")


def test_the_penalty_pulls_a_parameter_back_with_the_gradient_of_its_quadratic() -> None:
    student = Student(SHAPE, [[0]], for_training=False)
    student.requires_grad_(False)
    bias = student.get_parameter("head.bias").requires_grad_(True)
    anchor = bias.detach() - 2.0
    penalty = Penalty({"head.bias": torch.tensor([1.0, 3.0])}, {"head.bias": anchor})
    assert penalty.loss(student).item() == pytest.approx(0.5 * (1 * 4 + 3 * 4))
    penalty.loss(student).backward()
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad, torch.tensor([2.0, 6.0]))


def test_ewc_runs_through_both_stages_and_changes_the_second_student(tmp_path: Path) -> None:
    kinds = {"none": 2, "ewc": 2, "mas": 1}  # stages of each; MAS differs from EWC in what stage 1 leaves alone
    words = ("distill.penalty_coefficient=10", "distill.freeze_shared=false")
    runs = {name: make_run(tmp_path / name, f"distill.penalty={name}", *words) for name in kinds}
    turns = [(runs[name].folder, stage) for name, stages in kinds.items() for stage in range(1, stages + 1)]
    finish(start_ranks(2, *in_turn(*turns)))
    states, importances = {}, []
    for name, run in runs.items():
        for stage in range(1, kinds[name] + 1):
            states[name, stage] = load_student_parts(run.stage(stage) / "student").state
            assert (run.stage(stage) / "penalty.safetensors").is_file() == (name != "none")
        if name != "none":
            importances.append(Penalty.load(run.stage(1) / "penalty.safetensors").importance)
    for name in ("ewc", "mas"):
        assert all(torch.equal(states["none", 1][key], value) for key, value in states[name, 1].items())
    assert any(not torch.equal(states["none", 2][key], value) for key, value in states["ewc", 2].items())
    for importance in importances:
        assert importance.keys() == dict(Student(SHAPE, [[0, 1]], for_training=False).named_parameters()).keys()
        assert all(value.isfinite().all() and (value >= 0).all() for value in importance.values())
        assert all(importance[f"mixtures.0.experts.{expert}.last.weight"].any() for expert in (0, 1))
    assert not torch.equal(*(importance["head.weight"] for importance in importances))
    alone = make_run(tmp_path / "alone", "distill.penalty=ewc", *words)  # two ranks shared the samples out
    finish(start_ranks(1, alone.folder, 1))
    for key, value in Penalty.load(alone.stage(1) / "penalty.safetensors").importance.items():
        torch.testing.assert_close(importances[0][key], value, rtol=1e-3, atol=1e-6)
