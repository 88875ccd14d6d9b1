"""Weight regularisers: the quadratics of EWC, Online EWC and L2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hpc_cpd.config import DistillSettings
from hpc_cpd.distill.penalties import Penalty, fisher_diagonal, next_penalty
from hpc_cpd.errors import UserError
from hpc_cpd.student.policy import load_student_parts
from hpc_cpd.student.transformer import Student, StudentShape
from tests.distill.ranks import finish, start_ranks
from tests.distill.synthetic import make_run

SHAPE = StudentShape(
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
    gate_bias_at_birth=-5.0,
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


def test_l2_weighs_every_parameter_alike() -> None:
    penalty = next_penalty(settings("l2"), None, {"w": torch.randn(3)}, {"w": torch.rand(3)})
    assert penalty.importance["w"].tolist() == [1.0, 1.0, 1.0]


class Linear(torch.nn.Module):
    """A policy whose Fisher diagonal is known: the sum of squares of its inputs, per output."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1, 3))

    def forward(self, observations: torch.Tensor, *_: object) -> tuple[torch.Tensor, None, None]:
        return observations @ self.w.T, None, None


def test_fisher_diagonal_of_a_linear_policy_is_the_mean_squared_input() -> None:
    generator = torch.Generator().manual_seed(0)
    observations = torch.randn(64, 4, 3, generator=generator) * torch.tensor([1.0, 2.0, 3.0])
    valid = torch.ones(64, 4, dtype=torch.bool)
    valid[:, 3] = False
    batches = [(observations, torch.zeros(64, 1), valid)] * 400
    fisher = fisher_diagonal(Linear(), batches, generator)["w"][0]  # type: ignore[arg-type]
    expected = observations[:, :3].square().mean(dim=(0, 1))
    torch.testing.assert_close(fisher, expected, rtol=0.2, atol=0.0)


def test_a_missing_penalty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"penalty\.safetensors is missing"):
        Penalty.load(tmp_path / "penalty.safetensors")


def test_the_penalty_pulls_a_parameter_back_with_the_gradient_of_its_quadratic() -> None:
    student = Student(SHAPE, [[0]], inference=True)
    student.requires_grad_(False)
    bias = student.get_parameter("head.bias").requires_grad_(True)
    anchor = bias.detach() - 2.0
    penalty = Penalty({"head.bias": torch.tensor([1.0, 3.0])}, {"head.bias": anchor})
    assert penalty.loss(student).item() == pytest.approx(0.5 * (1 * 4 + 3 * 4))
    penalty.loss(student).backward()
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad, torch.tensor([2.0, 6.0]))


def test_ewc_runs_through_both_stages_and_changes_the_second_student(tmp_path: Path) -> None:
    states = {}
    for penalty in ("none", "ewc"):
        overrides = (f"distill.penalty={penalty}", "distill.penalty_coefficient=10", "distill.freeze_shared=false")
        run = make_run(tmp_path / penalty, *overrides)
        for stage in (1, 2):
            finish(start_ranks(2, run.folder, stage))
        states[penalty] = [load_student_parts(run.stage(stage) / "student").state for stage in (1, 2)]
        assert (run.stage(2) / "penalty.safetensors").is_file() == (penalty == "ewc")
    (free_1, free_2), (held_1, held_2) = states["none"], states["ewc"]
    assert all(torch.equal(free_1[name], held_1[name]) for name in free_1)
    assert any(not torch.equal(free_2[name], held_2[name]) for name in free_2)
