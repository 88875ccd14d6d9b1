"""A forward pass from what the student before computed once is the whole forward pass, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hpc_cpd.settings import StudentSettings
from hpc_cpd.student.moe.precomputed import joined, unpack
from hpc_cpd.student.network import Student, StudentShape, grown

ROWS, HISTORY = 48, 4


def shape(top_k: int, shared: int = 0) -> StudentShape:
    settings = StudentSettings(
        width=16, history=HISTORY, expert_hidden=24, shared_expert_hidden=shared, top_k=top_k, backbone={"heads": 2}
    )
    return StudentShape.from_settings(
        settings, observation_size=5, action_size=3, task_vector_size=4, initial_gate_bias=-5.0
    )


def windows() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    at = torch.randint(HISTORY, (ROWS,), generator=generator)
    valid = torch.arange(HISTORY) == at[:, None]
    return (
        torch.randn(ROWS, HISTORY, 5, generator=generator),
        torch.randn(ROWS, 4, generator=generator),
        valid,
    )


def students(top_k: int, shared: int = 0) -> tuple[Student, Student]:
    """(the student before a stage, that of the stage, whose new experts the gate chooses for some rows)."""
    sizes = shape(top_k, shared)
    past = Student(sizes, [[0, 1, 2]], seed=1, executor="stacked").requires_grad_(False)
    now = grown(past.state_dict(), sizes, [[0, 1, 2]], [3, 4], seed=1)
    with torch.no_grad():
        now.mixtures[0].gate.bias_2.fill_(0.02)
    now.requires_grad_(False)
    for name, parameter in now.named_parameters():
        parameter.requires_grad_("experts.3." in name or "experts.4." in name or name.endswith("_2"))
    return past, now


@pytest.mark.parametrize("shared", [0, 8])
@pytest.mark.parametrize("top_k", [0, 1, 2, 4])
def test_outputs_and_gradients_are_those_of_the_whole_pass(top_k: int, shared: int) -> None:
    past, now = students(top_k, shared)
    observations, vectors, valid = windows()
    override = torch.arange(ROWS) < ROWS // 3
    known, answers = past.precompute(observations, vectors, valid)
    assert torch.allclose(answers, past(observations, vectors, valid)[0][valid], atol=1e-6)
    results = []
    for precomputed in (None, known.without_experts(), known):
        now.zero_grad()
        actions, balance, gate = now(observations, vectors, valid, override, precomputed=precomputed)
        (actions.square().sum() + balance + gate[..., -2:].sum()).backward()
        gradients = [p.grad for p in now.parameters() if p.requires_grad and p.grad is not None]
        results.append([actions, balance, gate, *gradients])
    whole, *others = results
    served = whole[2].detach()[valid][:, 0]
    if top_k:
        assert served.argmax(dim=1).unique().numel() > 2  # old and new experts are chosen
    for other in others:
        assert len(other) == len(whole)
        for mine, wanted in zip(other, whole, strict=True):
            assert torch.allclose(mine, wanted, atol=1e-6), (mine - wanted).abs().max()


@pytest.mark.parametrize("top_k", [0, 2])
def test_packed_rows_are_the_same_bits(top_k: int) -> None:
    past, _ = students(top_k)
    known, _ = past.precompute(*windows())
    again = joined([known.rows(slice(0, 5)), unpack(known.pack()[5:], known)])
    for mine, wanted in ((again.inputs, known.inputs), (again.old.logits, known.old.logits)):
        assert torch.equal(mine, wanted)
    assert torch.equal(again.old.outputs, known.old.outputs)
    assert top_k == 0 or torch.equal(again.old.selected, known.old.selected)


def test_of_equal_logits_only_experts_whose_outputs_are_known_are_chosen() -> None:
    past, now = students(2)
    with torch.no_grad():
        for student in (past, now):
            student.mixtures[0].gate.weight_1.zero_()  # all old logits are equal
            student.mixtures[0].gate.bias_1.zero_()
        now.mixtures[0].gate.bias_2.fill_(-9.0)
    inputs = windows()
    known, answers = past.precompute(*inputs)
    swapped = unpack(known.pack(), known)
    swapped.old.selected.copy_(torch.tensor([2, 1]).expand(ROWS, 2))
    mixture = now.mixtures[0]
    swapped.old.outputs.copy_(torch.stack([mixture.experts[e](known.inputs) for e in ("2", "1")], dim=1).detach())
    actions = now(*inputs, precomputed=swapped)[0][inputs[2]]
    wanted = now.head(now.backbone.finish(known.inputs[:, :16] + swapped.old.outputs.mean(dim=1)))
    assert torch.allclose(actions, wanted, atol=1e-6)
