"""Weights that stages have to themselves: who owns them, what they add up to, and who acts with which."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hpc_cpd.errors import UserError
from hpc_cpd.methods._adapters import Adapters, add_adapters
from hpc_cpd.methods.lora import is_adapter
from hpc_cpd.methods.packnet import PackNetMasks
from hpc_cpd.student.checkpoint import MethodState
from hpc_cpd.student.embeddings.one_hot import OneHotSettings
from hpc_cpd.student.network import Student
from hpc_cpd.student.policy import StudentParts, load_student, load_student_parts, save_student
from hpc_cpd.student.task_inference import EpisodeStatistics
from tests.student.reference import make_student, small_shape

EXPERTS = [[0, 1, 2]]
PLAN = [["a/one"], ["a/two", "a/three"]]
TASKS = [task for tasks in PLAN for task in tasks]


def new_student(top_k: int = 0) -> Student:
    return make_student(small_shape(top_k, layers=2, mixtures=2, shared_expert_hidden=4), EXPERTS, for_training=False)


def random_adapters(student: Student, rank: int = 2) -> dict[str, Tensor]:
    """Adapters of stage 2 that have learnt something; `student` then holds them."""
    add_adapters(student, rank, seed=0, stage=2)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name.endswith("_up"):
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return {name: tensor.clone() for name, tensor in student.state_dict().items() if is_adapter(name)}


def of_stage_two(adapters: dict[str, Tensor]) -> Adapters:
    return Adapters({f"2/{name}": tensor for name, tensor in adapters.items()})


def publish(folder: Path, state: dict[str, Tensor], method_state: MethodState | None) -> None:
    vectors = {task: row for task, row in zip(TASKS, np.eye(5, dtype=np.float32), strict=False)}
    metadata = {"tasks_by_stage": PLAN}
    statistics = {task: EpisodeStatistics(100, np.ones((2, 6), np.float32)) for task in vectors}
    shape = new_student().shape
    parts = StudentParts(state, shape, EXPERTS, vectors, statistics, OneHotSettings(), {}, method_state, metadata)
    save_student(folder, parts)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, 6, generator=generator), torch.randn(6, 5, generator=generator)


def test_each_stage_gets_the_largest_of_its_share_of_what_is_free_and_the_rest_is_zero() -> None:
    weights = torch.tensor([[5.0, -1.0, 3.0], [0.5, -4.0, 2.0], [0.1, 0.2, -6.0]])
    state = {"w": weights, "b": torch.ones(3)}
    owners, state = PackNetMasks.of_nobody(state).pruned(state, 1, 4)  # ceil(9 / 4) = 3
    assert owners.owners["w"].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert state["w"].tolist() == [[5.0, 0.0, 0.0], [0.0, -4.0, 0.0], [0.0, 0.0, -6.0]]
    assert list(owners.owners) == ["w"] and state["b"].tolist() == [1.0, 1.0, 1.0]
    # now larger than all that is owned, or equal to each other: the first of equals
    state["w"] = torch.where(owners.owners["w"] > 0, state["w"], 9.0)
    owners, state = owners.pruned(state, 2, 4)  # 6 / 3 = 2
    assert owners.owners["w"].tolist() == [[1, 2, 2], [0, 1, 0], [0, 0, 1]]
    owners, state = owners.pruned(state, 3, 4)
    owners, state = owners.pruned(state, 4, 4)
    assert [int((owners.owners["w"] == stage).sum()) for stage in range(5)] == [0, 3, 2, 2, 2]
    assert owners.state_of_stage(state, 1)["w"].tolist() == [[5.0, 0.0, 0.0], [0.0, -4.0, 0.0], [0.0, 0.0, -6.0]]
    assert owners.state_of_stage(state, 2)["w"][0].tolist() == [5.0, 9.0, 9.0]


@pytest.mark.parametrize("top_k", [0, 1, 2])
def test_a_student_with_new_adapters_does_what_it_did_and_with_learnt_ones_what_the_sums_do(top_k: int) -> None:
    student, plain = new_student(top_k), new_student(top_k)
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    add_adapters(student, 2, seed=0, stage=2)
    linear = {name for name, weight in plain.named_parameters() if weight.dim() > 1}
    assert {name.removesuffix("_up") for name in student.state_dict() if name.endswith("_up")} == linear
    with torch.no_grad():
        assert torch.equal(student(*inputs())[0], plain(*inputs())[0])
        student = new_student(top_k)
        learnt = random_adapters(student)
        plain.load_canonical(of_stage_two(learnt).state_of_stage(state, 2))
        ours, theirs = student(*inputs()), plain(*inputs())
        assert not torch.allclose(ours[0], new_student(top_k)(*inputs())[0], atol=1e-2)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[2], theirs[2], rtol=0, atol=1e-5)


def test_how_an_adapter_starts_depends_on_seed_stage_and_name_alone() -> None:
    def start(seed: int, stage: int) -> dict[str, Tensor]:
        student = new_student()
        add_adapters(student, 2, seed, stage)
        return {name: tensor for name, tensor in student.state_dict().items() if name.endswith("_down")}

    one, again, other_stage, other_seed = start(0, 2), start(0, 2), start(0, 3), start(1, 2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(
        torch.equal(one[name], other_stage[name]) or torch.equal(one[name], other_seed[name]) for name in one
    )
    assert len({tensor.numpy().tobytes() for tensor in one.values()}) == len(one)


def test_adapters_are_refused_to_a_student_that_has_grown() -> None:
    student = make_student(small_shape(0), [[0, 1], [2]], for_training=False)
    with pytest.raises(ValueError, match=r"experts of \[1, 2\]"):
        add_adapters(student, 2, 0, 2)


@pytest.mark.parametrize("method", ["packnet", "lora"])
def test_a_published_student_acts_with_the_weights_of_the_tasks_stage(tmp_path: Path, method: str) -> None:
    state = {name: tensor.clone() for name, tensor in new_student().state_dict().items()}
    acting: PackNetMasks | Adapters
    if method == "packnet":
        owners, after = PackNetMasks.of_nobody(state).pruned(state, 1, 3)
        refilled = {name: torch.where(after[name] == 0, state[name], after[name]) for name in state}
        acting, state = owners.pruned(refilled, 2, 3)
        kept = dict(acting.owners)
    else:
        acting = of_stage_two(random_adapters(new_student()))
        kept = dict(acting.tensors)
    publish(tmp_path / "student", state, MethodState(method, kept))
    found = load_student_parts(tmp_path / "student").method_state
    assert found is not None and found.method == method and found.tensors.keys() == kept.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in found.tensors.items())
    policy = load_student(tmp_path / "student")
    seen = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    told = {}
    for task in (*TASKS, *reversed(TASKS)):
        policy.reset(task, 4)
        told.setdefault(task, []).append(policy.act(seen))
    for stage, tasks in enumerate(PLAN, start=1):
        publish(tmp_path / str(stage), acting.state_of_stage(state, stage), None)
        alone = load_student(tmp_path / str(stage))
        for task in tasks:
            alone.reset(task, 4)
            expected = alone.act(seen)
            assert all((actions == expected).all() for actions in told[task])
    alone.reset(TASKS[0], 4)
    assert abs(alone.act(seen) - told[TASKS[0]][0]).max() > 1e-3  # the stages do act with other weights
    with pytest.raises(UserError, match=r"must be told the task.*a/one, a/two, a/three"):
        policy.reset(None, 4)
    with pytest.raises(ValueError, match=r"stages \[1, 2\]"):
        policy.act_as_learnt(TASKS)
    policy.act_as_learnt(TASKS[1:])


def test_an_ordinary_folder_names_no_method_and_one_that_is_not_installed_is_named(tmp_path: Path) -> None:
    publish(tmp_path / "student", dict(new_student().state_dict()), None)
    file = tmp_path / "student" / "student.json"
    description = json.loads(file.read_text())
    assert description["method"] is None and load_student_parts(tmp_path / "student").method_state is None
    file.write_text(json.dumps({**description, "method": "hat"}))
    with pytest.raises(UserError, match=r"there is no method 'hat'"):
        load_student(tmp_path / "student")
