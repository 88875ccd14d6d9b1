"""Importance of parameters: what `torch.func` finds for many samples is what autograd finds for one after the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hpc_cpd.methods import _importance
from hpc_cpd.methods._importance import fisher_diagonal, output_sensitivity
from hpc_cpd.methods.base import Samples
from hpc_cpd.student.network import Student, StudentShape

SHAPE = StudentShape(
    observation_size=5,
    action_size=3,
    task_vector_size=4,
    width=8,
    layers=2,
    mixtures=2,
    heads=2,
    history=4,
    expert_hidden=6,
    shared_expert_hidden=5,
    experts_see_observation=True,
    top_k=0,
    gate_bias_at_birth=-5.0,
)


def student_of(shape: StudentShape) -> Student:
    """Two stages of experts, and gates that prefer different ones for different tokens."""
    student = Student(shape, [[0, 1], [2, 3]], seed=1, inference=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in student.gate_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return student


def samples_of(shape: StudentShape, count: int = 7) -> Samples:
    generator = torch.Generator().manual_seed(1)
    observations = torch.randn(count, shape.history, shape.observation_size, generator=generator)
    steps = torch.arange(count) % shape.history  # an episode that has just begun is asked at an early step
    return Samples(observations, torch.randn(count, shape.task_vector_size, generator=generator), steps)


def one_after_the_other(student: Student, samples: Samples, mas: bool) -> dict[str, torch.Tensor]:
    parameters = dict(student.named_parameters())
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for observations, task_vector, step in zip(*samples, strict=True):
        valid = (torch.arange(len(observations)) == step)[None]
        action = student(observations[None], task_vector[None], valid, None)[0][0, step]
        for number in [action.square().sum()] if mas else action:
            gradients = torch.autograd.grad(number, list(parameters.values()), retain_graph=True, allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient.abs() if mas else gradient.square()
    return {name: value / len(samples[0]) for name, value in total.items()}


@pytest.mark.parametrize("mas", [False, True], ids=["fisher", "mas"])
@pytest.mark.parametrize("top_k", [0, 1, 2])
def test_importance_is_what_a_loop_of_plain_autograd_over_the_samples_finds(
    top_k: int, mas: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = replace(SHAPE, top_k=top_k)
    student, samples = student_of(shape), samples_of(shape)
    numbers = shape.action_size * sum(parameter.numel() for parameter in student.parameters())
    monkeypatch.setattr(_importance, "NUMBERS_AT_ONCE", 3 * numbers)  # pieces of three, three and one sample
    found = (output_sensitivity if mas else fisher_diagonal)(student, samples)
    wanted = one_after_the_other(student, samples, mas)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-7, msg=name)
    assert all(found[f"mixtures.{place}.gate.weight_1"].any() for place in (0, 1))


def test_the_fisher_diagonal_of_the_last_layer_is_the_mean_square_of_its_inputs() -> None:
    student, samples = student_of(SHAPE), samples_of(SHAPE)
    seen: list[torch.Tensor] = []
    student.head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    valid = torch.arange(SHAPE.history) == samples[2][:, None]
    student(*samples[:2], valid)
    fisher = fisher_diagonal(student, samples)
    inputs = seen[0].square().mean(dim=0)  # of the newest observations alone: no other reaches the last layer
    torch.testing.assert_close(fisher["head.weight"], inputs.expand(SHAPE.action_size, -1))
    torch.testing.assert_close(fisher["head.bias"], torch.ones(SHAPE.action_size))
