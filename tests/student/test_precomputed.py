"""A forward pass from what the student before computed once is the whole forward pass, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hpc_cpd.settings import StudentSettings
from hpc_cpd.student.moe.precomputed import OldExperts, Precomputed
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
def test_what_is_kept_as_rows_is_what_was_computed(top_k: int) -> None:
    past, _ = students(top_k)
    known, _ = past.precompute(*windows())
    mixture = past.mixtures[0]
    wanted = mixture.as_old(known.inputs.contiguous())
    assert torch.equal(known.old.logits, wanted.logits) and torch.equal(known.old.outputs, wanted.outputs)
    assert (known.old.selected is None) == (wanted.selected is None) == (top_k == 0)
    assert top_k == 0 or torch.equal(known.old.selected, wanted.selected)
    assert known.without_experts().old is None and torch.equal(known.without_experts().inputs, known.inputs)


@pytest.mark.parametrize("top_k", [0, 1, 2])
def test_a_rank_without_rows_takes_part(top_k: int) -> None:
    past, now = students(top_k)
    inputs = [column[:0] for column in windows()]
    known, answers = past.precompute(*inputs)
    actions, balance, gate = now(*inputs, precomputed=known)
    assert answers.shape == (0, 3) and actions.shape == (0, HISTORY, 3) and gate.shape == (0, HISTORY, 1, 5)
    (actions.sum() + balance).backward()


def test_of_equal_logits_only_experts_whose_outputs_are_known_are_chosen() -> None:
    past, now = students(2)
    with torch.no_grad():
        for student in (past, now):
            student.mixtures[0].gate.weight_1.zero_()  # all old logits are equal
            student.mixtures[0].gate.bias_1.zero_()
        now.mixtures[0].gate.bias_2.fill_(-9.0)
    inputs = windows()
    known, _ = past.precompute(*inputs)
    outputs = torch.stack([now.mixtures[0].experts[e](known.inputs) for e in ("2", "1")], dim=1).detach()
    swapped = OldExperts(known.old.logits, torch.tensor([2, 1]).expand(ROWS, 2), outputs)
    actions = now(*inputs, precomputed=Precomputed.of(known.inputs, swapped))[0][inputs[2]]
    wanted = now.head(now.backbone.finish(known.inputs[:, :16] + outputs.mean(dim=1)))
    assert torch.allclose(actions, wanted, atol=1e-6)
