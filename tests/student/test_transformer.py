"""The student network: causal, normalised, and unharmed when it grows."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from hpc_cpd.errors import UserError
from hpc_cpd.student.network import Student, StudentShape, expert_of, grown
from tests.student.reference import make_batch, make_student, masked_loss, small_shape
from tests.student.renamed_tensors import new_name

OLD, NEW = [[0, 1, 2, 3, 4]], [5, 6, 7, 8, 9]


def grow(top_k: int, **changes: int) -> tuple[Student, Student]:
    old = make_student(small_shape(top_k, width=32, **changes), OLD, opinion=0.1)
    return old, grown(old.state_dict(), old.shape, OLD, NEW, seed=3)


def test_growth_with_a_dense_gate_leaves_old_outputs_to_one_percent() -> None:
    old, new = grow(0)
    observations, tasks, _, _, _ = make_batch(64, 4, old.shape)
    with torch.no_grad():
        before, after = old(observations, tasks)[0], new(observations, tasks)[0]
        share = new(observations, tasks)[2][..., 5:].sum(dim=-1)
    assert float((after - before).norm() / before.norm()) < 1e-2
    assert 0 < float(share.max()) < 0.1


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_growth_with_a_top_k_gate_leaves_old_outputs_exactly(top_k: int) -> None:
    old, new = grow(top_k)
    observations, tasks, valid, _, _ = make_batch(64, 4, old.shape)
    with torch.no_grad():
        assert torch.equal(old(observations, tasks, valid)[0][valid], new(observations, tasks, valid)[0][valid])


def test_growth_keeps_every_old_tensor_and_adds_only_the_new_experts() -> None:
    old, new = grow(0)
    before, after = old.state_dict(), new.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    added = set(after) - set(before)
    assert {expert_of(name) for name in added} == {None, *NEW}
    assert {name for name in added if expert_of(name) is None} == {
        "mixtures.0.gate.weight_2",
        "mixtures.0.gate.bias_2",
    }
    assert torch.equal(after["mixtures.0.gate.bias_2"], torch.full((5,), -5.0))
    assert new.experts_by_stage == [*OLD, NEW]


def test_growth_refuses_a_state_that_lacks_an_expert() -> None:
    old = make_student(small_shape(), OLD)
    state = {name: tensor for name, tensor in old.state_dict().items() if expert_of(name) != 4}
    with pytest.raises(ValueError, match=r"mixtures\.0\.experts\.4\."):
        grown(state, old.shape, OLD, NEW, seed=3)


def test_parameters_keep_the_order_in_which_they_stood_before_the_parts_had_names() -> None:
    student = make_student(small_shape(layers=2, mixtures=2), [[0], [1]], for_training=False)
    block = [
        "norm_attention",
        "query_key_value",
        "attention_out",
        "norm_feed_forward",
        "feed_forward_in",
        "feed_forward_out",
    ]
    layers = ["embed_observation", "embed_task", *(f"blocks.{number}.{layer}" for number in (0, 1) for layer in block)]
    layers += ["norms_features.0", "norms_features.1", "norm_head", "head"]
    old = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    for mixture in (0, 1):
        old.append(f"mixtures.{mixture}.anchor")
        old += [f"mixtures.{mixture}.gate.{kind}_{stage}" for stage in (1, 2) for kind in ("weight", "bias")]
        experts = [f"experts.{expert}.{layer}" for expert in (0, 1) for layer in ("first", "second", "last")]
        old += [f"mixtures.{mixture}.{layer}.{kind}" for layer in experts for kind in ("weight", "bias")]
    # sums over parameters, such as the norm of the gradient, are rounded as their order says
    assert [name for name, _ in student.named_parameters()] == [new_name(name) for name in old]


def test_parameters_are_parted_into_shared_gate_and_experts() -> None:
    student = make_student(small_shape(layers=2, mixtures=2, shared_expert_hidden=4), OLD)
    parts = [student.shared_parameters(), student.gate_parameters(), student.expert_parameters()]
    names = [name for part in parts for name, _ in part]
    assert sorted([*names, "mixtures.0.anchor", "mixtures.1.anchor"]) == sorted(
        name for name, _ in student.named_parameters()
    )
    assert {expert_of(name) for name, _ in student.expert_parameters([1, 3])} == {1, 3}
    assert all(".experts." not in name for name, _ in student.gate_parameters())
    assert "mixtures.1.shared.first.weight" in dict(student.shared_parameters())


@pytest.mark.parametrize("top_k", [0, 1])
def test_the_future_cannot_be_seen(top_k: int) -> None:
    student = make_student(small_shape(top_k), OLD)
    observations, tasks, _, _, _ = make_batch(16, 4, student.shape)
    later = observations.clone()
    later[:, 2:] += 1.0
    with torch.no_grad():
        one, other = student(observations, tasks)[0], student(later, tasks)[0]
    torch.testing.assert_close(one[:, :2], other[:, :2], rtol=0, atol=1e-6)
    assert not torch.allclose(one[:, 2:], other[:, 2:], atol=1e-3)


def test_the_normaliser_is_part_of_the_state_and_clips() -> None:
    student = make_student(small_shape(), OLD)
    mean, std = np.arange(6, dtype=np.float32), np.array([1, 2, 3, 4, 5, 0], dtype=np.float32)
    student.tokenizer.set_normaliser(mean, std)
    state = student.state_dict()
    assert state["tokenizer.observation_mean"].tolist() == mean.tolist()
    assert state["tokenizer.observation_std"].tolist() == [1, 2, 3, 4, 5, 1]
    tasks = torch.zeros(1, 5)
    far, further = (torch.full((1, 1, 6), value) for value in (1e3, 1e6))
    with torch.no_grad():
        assert torch.equal(student(far, tasks)[0], student(further, tasks)[0])


def test_the_same_seed_gives_the_same_student_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one, other = (Student(small_shape(), OLD, seed=5, for_training=for_training) for for_training in (True, False))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
    third = Student(small_shape(), OLD, seed=6, for_training=False)
    assert not torch.equal(one.head.weight, third.head.weight)


def test_a_step_is_the_same_to_the_last_bit_when_repeated() -> None:
    gradients = []
    for _ in range(2):
        student = make_student(small_shape(2), OLD)
        observations, tasks, valid, override, target = make_batch(32, 4, student.shape)
        actions, balance, _ = student(observations, tasks, valid, override)
        ((actions - target).square().mean() + balance).backward()
        gradients.append([p.grad for p in student.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_sizes_that_do_not_fit_are_refused() -> None:
    for heads in (3, 16):
        with pytest.raises(
            UserError, match=f"width is 16, no multiple of twice student.backbone.heads, which is {heads}"
        ):
            small_shape(heads=heads)
    with pytest.raises(UserError, match=r"mixtures is 2, .* student\.backbone\.layers, 1"):
        small_shape(mixtures=2)


@pytest.mark.parametrize(("history", "layers"), [(1, 1), (1, 3), (4, 1), (4, 2), (5, 3), (9, 4), (3, 6)])
def test_all_blocks_together_see_exactly_the_history(history: int, layers: int) -> None:
    student = make_student(small_shape(layers=layers, history=history), OLD)
    observations, tasks, _, _, _ = make_batch(8, history + 3, student.shape)
    observations.requires_grad_()
    student(observations, tasks)[0][:, -1].square().sum().backward()
    assert observations.grad is not None
    seen = observations.grad.abs().sum(dim=(0, 2)) > 0
    assert seen.tolist() == [False] * 3 + [True] * history


def test_the_shape_survives_json() -> None:
    shape = small_shape(2)
    assert StudentShape.model_validate(json.loads(json.dumps(shape.model_dump()))) == shape


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("top_k", [0, 1, 2])
def test_bfloat16_gradients_point_where_those_of_float32_do(top_k: int, deep: bool) -> None:
    sizes = {"layers": 2, "mixtures": 2, "shared_expert_hidden": 8} if deep else {}
    student = make_student(small_shape(top_k, **sizes), [[0, 1], [2, 3, 4]], for_training=False)
    observations, tasks, valid, override, target = make_batch(64, 4, student.shape)
    gradients, gates = [], []
    for low in (False, True):
        student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            actions, balance, gate = student(observations, tasks, valid, override)
        assert actions.dtype == (torch.bfloat16 if low else torch.float32) and gate.dtype == torch.float32
        (masked_loss(actions.float(), target, valid, 64.0) + 0.1 * balance).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
        gates.append(gate.detach()[:, :, 0])  # a later one may see another choice of the first
    assert gradients[1].dtype == torch.float32 and not torch.equal(*gradients)
    assert float(torch.nn.functional.cosine_similarity(*gradients, dim=0)) > 0.9995
    torch.testing.assert_close(*gates, rtol=0, atol=0.02)
