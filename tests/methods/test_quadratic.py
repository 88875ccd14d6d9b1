"""Weight regularisers: the quadratics of EWC, Online EWC and L2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hpc_cpd.cli import verify
from hpc_cpd.config import load_config
from hpc_cpd.errors import UserError
from hpc_cpd.methods._quadratic import QuadraticMethod
from hpc_cpd.methods.base import Samples, method_of
from hpc_cpd.run.paths import Run
from hpc_cpd.student.network import Student
from hpc_cpd.student.policy import load_student_parts
from tests.distill.ranks import finish, in_turn, start_ranks
from tests.distill.synthetic import make_run
from tests.student.reference import small_shape

SHAPE = small_shape(observation_size=3, action_size=2, task_vector_size=2, width=8, history=2, expert_hidden=8)


def method(name: str, *words: str) -> QuadraticMethod:
    made = method_of(load_config(None, [f"method={name}", *words]))
    assert isinstance(made, QuadraticMethod)
    return made


def after_stages(made: QuadraticMethod, *stages: tuple[torch.Tensor, torch.Tensor]) -> QuadraticMethod:
    """The method after stages of one parameter "w", each of which found (importance, parameters reached)."""
    for number, (importance, reached) in enumerate(stages):
        found = made.carried_on("w", importance, reached) if number else (importance, reached)
        made.importance, made.anchor = {"w": found[0]}, {"w": found[1]}
    return made


def quadratic(made: QuadraticMethod, at: torch.Tensor) -> torch.Tensor:
    return (made.importance["w"] * (at - made.anchor["w"]).square()).sum()


def test_merged_ewc_has_the_gradient_of_one_quadratic_per_stage() -> None:
    generator = torch.Generator().manual_seed(0)
    fishers = [torch.rand(5, generator=generator) for _ in range(3)]
    optima = [torch.randn(5, generator=generator) for _ in range(3)]
    merged = after_stages(method("ewc"), *zip(fishers, optima, strict=True))
    at = torch.randn(5, generator=generator, requires_grad=True)
    one = torch.autograd.grad(quadratic(merged, at), at)[0]
    many = torch.autograd.grad(sum((f * (at - o).square()).sum() for f, o in zip(fishers, optima, strict=True)), at)[0]
    torch.testing.assert_close(one, many)


@pytest.mark.parametrize(("name", "words", "kept"), [("online_ewc", ["method.decay=0.5"], 1.0), ("mas", [], 2.0)])
def test_importance_is_summed_over_stages_and_anchors_are_the_parameters_reached_last(
    name: str, words: list[str], kept: float
) -> None:
    stages = ((torch.tensor([2.0]), torch.zeros(1)), (torch.tensor([3.0]), torch.ones(1)))
    made = after_stages(method(name, *words), *stages)
    assert made.importance["w"].item() == kept + 3.0
    assert made.anchor["w"].item() == 1.0


def test_l2_weighs_every_parameter_alike_and_needs_no_samples() -> None:
    student = Student(SHAPE, [[0]], for_training=False)
    nothing = Samples(torch.zeros(0, 2, 3), torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    importance = method("l2").measure(student, nothing)
    assert importance.keys() == dict(student.named_parameters()).keys()
    assert all((value == 1).all() for value in importance.values())
    made = after_stages(method("l2"), (torch.ones(1), torch.zeros(1)), (torch.ones(1), torch.ones(1)))
    assert (made.importance["w"].item(), made.anchor["w"].item()) == (1.0, 1.0)


def test_the_penalty_pulls_a_parameter_back_with_the_gradient_of_its_quadratic() -> None:
    student = Student(SHAPE, [[0]], for_training=False)
    student.requires_grad_(False)
    bias = student.get_parameter("head.bias").requires_grad_(True)
    anchor = bias.detach() - 2.0
    made = method("ewc", "method.coefficient=10")
    assert made.extra_loss(student, None, torch.zeros(0), 1.0) is None  # in stage 1 there is nothing to hold
    made.load_state_dict({"importance/head.bias": torch.tensor([1.0, 3.0]), "anchor/head.bias": anchor})
    loss = made.extra_loss(student, None, torch.zeros(0), 1.0)
    assert loss is not None and loss.item() == pytest.approx(10 * 0.5 * (1 * 4 + 3 * 4))
    loss.backward()
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad, torch.tensor([20.0, 60.0]))


def kept_by(run: Run) -> dict[str, torch.Tensor]:
    """The importance that stage 1 of `run` published."""
    state = load_student_parts(run.stage(1) / "student").method_state
    assert state is not None
    return {key.removeprefix("importance/"): t for key, t in state.tensors.items() if key.startswith("importance/")}


def test_ewc_runs_through_both_stages_and_changes_the_second_student(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = {"fine_tuning": 2, "ewc": 2, "mas": 1}  # stages of each; MAS differs from EWC in what stage 1 leaves alone
    words = ("method.experts_per_task=1",)
    runs = {name: make_run(tmp_path / name, f"method={name}", *words) for name in kinds}
    turns = [(runs[name].folder, stage) for name, stages in kinds.items() for stage in range(1, stages + 1)]
    finish(start_ranks(2, *in_turn(*turns)))
    assert not (runs["ewc"].stage(1) / "memory").exists()
    with pytest.raises(UserError, match="2 students"):  # the teachers are stand-ins
        verify(runs["ewc"].folder)
    assert "memory" not in capsys.readouterr().out
    states = {
        (name, stage): load_student_parts(runs[name].stage(stage) / "student").state
        for name, stages in kinds.items()
        for stage in range(1, stages + 1)
    }
    assert load_student_parts(runs["fine_tuning"].stage(1) / "student").method_state is None
    importances = [kept_by(runs[name]) for name in ("ewc", "mas")]
    for name in ("ewc", "mas"):
        assert all(torch.equal(states["fine_tuning", 1][key], value) for key, value in states[name, 1].items())
    assert any(not torch.equal(states["fine_tuning", 2][key], value) for key, value in states["ewc", 2].items())
    for importance in importances:
        assert importance.keys() == dict(Student(SHAPE, [[0, 1]], for_training=False).named_parameters()).keys()
        assert all(value.isfinite().all() and (value >= 0).all() for value in importance.values())
        assert all(importance[f"mixtures.0.experts.{expert}.last.weight"].any() for expert in (0, 1))
    assert not torch.equal(*(importance["head.weight"] for importance in importances))
    alone = make_run(tmp_path / "alone", "method=ewc", *words)  # two ranks shared the samples out
    finish(start_ranks(1, alone.folder, 1))
    for key, value in kept_by(alone).items():
        torch.testing.assert_close(importances[0][key], value, rtol=1e-3, atol=1e-6)
