"""Nothing of a student, of its gradients or of a penalty is left on another device than the student's.

Without a GPU at hand the other device is torch's ``meta``, on which tensors have no numbers: whatever meets a tensor of
the CPU there is an error, as on a GPU. What the CPU must know by design, the rows of each expert, is given.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor

from hpc_cpd.config import load_config
from hpc_cpd.distill.batches import Batch
from hpc_cpd.losses import action_mean_error
from hpc_cpd.methods.base import method_of
from hpc_cpd.student.moe.mixture import Mixture
from hpc_cpd.student.network import Executor, Student, StudentShape

ROWS, HISTORY = 6, 4
OTHER = torch.device("meta")


@pytest.fixture(autouse=True)
def counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def known(mixture: Mixture, table: Tensor) -> np.ndarray:
        return np.ones((1, 1 + 2 * len(mixture.ids)))

    monkeypatch.setattr(Mixture, "_peers", known)
    monkeypatch.setattr(torch, "autocast", lambda device, enabled: nullcontext())  # there is none on `meta`


def student_there(executor: Executor = "sparse", layers: int = 2) -> Student:
    settings = load_config(None, ["student.width=16", f"student.backbone={{layers: {layers}, heads: 2}}"]).student
    sizes = {"observation_size": 5, "action_size": 3, "task_vector_size": 4, "initial_gate_bias": -5.0}
    shape = StudentShape.from_settings(settings, **sizes)
    return Student(shape, [[0, 1], [2]], executor=executor, for_training=False).to(OTHER)


def windows(length: int = HISTORY) -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, length, 5, device=OTHER), torch.randn(ROWS, 4, device=OTHER)


def learn(student: Student) -> None:
    observations, told = windows()
    actions, balance, _ = student(observations, told)
    target, valid = torch.zeros(ROWS, HISTORY, 3, device=OTHER), torch.ones(ROWS, HISTORY, device=OTHER).bool()
    (action_mean_error(actions, target, valid).sum() + balance).backward()
    assert all(parameter.grad is None or parameter.grad.device == OTHER for parameter in student.parameters())


def act(student: Student) -> None:
    with torch.no_grad():
        cache = student.backbone.new_cache(ROWS)
        for _ in range(2):
            actions, _, gate = student(*windows(1), cache=cache)
    assert actions.device == gate.device == OTHER


def be_sampled(student: Student) -> None:
    actions, _, _ = student(*windows(), at=torch.zeros(ROWS, dtype=torch.int64, device=OTHER))
    assert actions.device == OTHER


def be_precomputed(student: Student) -> None:
    """From the experts on, with everything before them known."""
    known = torch.randn(ROWS, 16 + 5 + 4, device=OTHER)
    mixture = student.mixtures[0]
    assert isinstance(mixture, Mixture)
    old = mixture.as_old(known)
    features = student.backbone.finish(known[:, :16] + old.mixed())
    assert student.head(features).device == OTHER


def be_penalised(student: Student) -> None:
    method = method_of(load_config(None, ["method=ewc"]))
    kept = {name: torch.ones(value.shape) for name, value in student.named_parameters()}  # as loaded, on the CPU
    method.load_state_dict({f"{word}/{name}": t for word in ("importance", "anchor") for name, t in kept.items()})
    penalty = method.extra_loss(student, None, torch.zeros(()), 1.0)
    assert penalty is not None and penalty.device == OTHER
    penalty.backward()


WORK: dict[str, tuple[Callable[[Student], None], Executor]] = {
    "a step": (learn, "sparse"),
    "acting": (act, "stacked"),
    "gradients of single samples": (be_sampled, "functional"),
    "what is frozen": (be_precomputed, "stacked"),
    "a penalty": (be_penalised, "sparse"),
}


@pytest.mark.parametrize("what", WORK)
def test_all_of_it_is_on_the_device_of_the_student(what: str) -> None:
    work, executor = WORK[what]
    work(student_there(executor))


@pytest.mark.parametrize("what", ["a step", "acting"])
def test_a_tensor_that_is_left_on_the_cpu_is_found(what: str) -> None:
    work, executor = WORK[what]
    student = student_there(executor)
    student.tokenizer.observation_mean = torch.zeros(5)
    with pytest.raises(RuntimeError, match=r"device"):
        work(student)


def test_the_parts_of_a_batch_are_where_its_observations_are() -> None:
    observations, told = windows()
    flags = torch.ones(ROWS, dtype=torch.bool, device=OTHER)
    valid = torch.ones(ROWS, HISTORY, dtype=torch.bool, device=OTHER)
    batch = Batch(observations, torch.zeros(ROWS, HISTORY, 3, device=OTHER), valid, told, flags, flags, ROWS, 2, [])
    rows = batch._rows(slice(2), 2, 2)
    assert {tensor.device for tensor in (rows.observations, rows.target, rows.valid, rows.task_vectors)} == {OTHER}
