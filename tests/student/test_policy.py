"""A published student acts as it was trained to, and a folder that is not one is refused in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc_cpd.errors import UserError
from hpc_cpd.student.embeddings.contrastive import ContrastiveSettings
from hpc_cpd.student.embeddings.one_hot import OneHotSettings
from hpc_cpd.student.moe.executors import FEW_ROWS
from hpc_cpd.student.network import Student
from hpc_cpd.student.policy import (
    StudentParts,
    StudentPolicy,
    TaskAgnosticPolicy,
    load_student,
    load_student_parts,
    save_student,
)
from hpc_cpd.student.task_encoder import TaskEncoder
from hpc_cpd.student.task_inference import EpisodeStatistics
from tests.student.reference import make_student, small_shape

EXPERTS = [[0, 1, 2], [3, 4]]
ENVS, STEPS = 5, 16
ENCODER = ContrastiveSettings(size=5, window=3, width=8)


DEEP = {"layers": 3, "mixtures": 2, "history": 6, "shared_expert_hidden": 8}


def publish(
    folder: Path,
    top_k: int = 0,
    encoder: TaskEncoder | None = None,
    steps: dict[str, int] | None = None,
    **changes: Any,
) -> Student:
    shape = small_shape(top_k, **changes)
    student = make_student(shape, EXPERTS, for_training=False)
    student.tokenizer.set_normaliser(np.full(6, 0.2, np.float32), np.full(6, 2.0, np.float32))
    vectors = np.eye(5, dtype=np.float32)
    tasks = {"metaworld/reach-v3": vectors[0], "metaworld/push-v3": vectors[1]}
    start = np.stack([np.zeros(6), np.full(6, 5.0)]).astype(np.float32)  # of every task: it tells nothing
    statistics = {task: EpisodeStatistics((steps or {}).get(task, 1000), start) for task in tasks}
    parts = StudentParts(
        student.state_dict(), shape, EXPERTS, tasks, statistics, OneHotSettings(), metadata={"stage": 2}
    )
    if encoder is not None:
        parts = replace(parts, task_embedding=ENCODER, task_embedding_state=encoder.state_dict())
    save_student(folder, parts)
    return student


def observations() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(STEPS, ENVS, 6)).astype(np.float32)


def expected_actions(student: Student, seen: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Training forward over the last `history` observations, episode begun at seen[0]; the last position's actions."""
    window = torch.tensor(seen[-student.shape.history :]).transpose(0, 1).contiguous()
    with torch.no_grad():
        actions, _, _ = student(window, torch.tensor(vector).repeat(seen.shape[1], 1))
    return actions[:, -1].clamp(-1, 1).numpy()


def test_many_rows_are_served_like_few(tmp_path: Path) -> None:
    publish(tmp_path / "student")
    policy = load_student(tmp_path / "student")
    seen = np.random.default_rng(0).normal(size=(3, FEW_ROWS + 1, 6)).astype(np.float32)
    policy.reset("metaworld/push-v3", FEW_ROWS + 1)
    many = [policy.act(step) for step in seen]
    policy.reset("metaworld/push-v3", FEW_ROWS)
    few = [policy.act(step[:-1]) for step in seen]
    np.testing.assert_allclose(np.array(many)[:, :-1], few, rtol=0, atol=2e-6)


@pytest.mark.parametrize("changes", [{}, DEEP, {"history": 1}], ids=["default", "deep", "no history"])
@pytest.mark.parametrize("top_k", [0, 1, 2])
def test_acting_equals_the_training_forward_at_each_position(
    top_k: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    student = publish(tmp_path / "student", top_k, **changes)
    policy = load_student(tmp_path / "student")
    policy.reset("metaworld/push-v3", ENVS)
    seen, restarted = observations(), np.array([False, True, False, False, True])
    vector = policy.task_vectors["metaworld/push-v3"]
    for step in range(STEPS):
        if step == 6:
            policy.reset_rows(restarted)
        actions = policy.act(seen[step])
        assert actions.dtype == np.float32 and actions.shape == (ENVS, 3)
        expected = expected_actions(student, seen[: step + 1], vector)
        if step >= 6:
            expected[restarted] = expected_actions(student, seen[6 : step + 1], vector)[restarted]
        np.testing.assert_allclose(actions, expected, rtol=0, atol=2e-6)
    policy.reset("metaworld/push-v3", ENVS)
    np.testing.assert_allclose(policy.act(seen[0]), expected_actions(student, seen[:1], vector), rtol=0, atol=2e-6)


@pytest.mark.parametrize("changes", [{}, DEEP, {"history": 1}], ids=["default", "deep", "no history"])
@pytest.mark.parametrize("top_k", [0, 1, 2])
def test_acting_in_one_environment_equals_the_training_forward(
    top_k: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    student = publish(tmp_path / "student", top_k, **changes)
    policy = load_student(tmp_path / "student")
    policy.reset("metaworld/push-v3", 1)
    seen, vector = observations()[:, :1], policy.task_vectors["metaworld/push-v3"]
    for step in range(STEPS):
        if step == 9:
            policy.reset_rows(np.array([True]))
        expected = expected_actions(student, seen[9 * (step >= 9) : step + 1], vector)
        np.testing.assert_allclose(policy.act(seen[step]), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("rows", [1, ENVS])
def test_experts_that_nobody_chose_are_not_read(rows: int, tmp_path: Path) -> None:
    publish(tmp_path / "student", top_k=1)
    policy = load_student(tmp_path / "student")
    policy.reset("metaworld/push-v3", rows)
    seen = torch.tensor(observations()[0, :1]).repeat(rows, 1)  # one expert is chosen by all
    with torch.no_grad():
        cache = policy.student.backbone.new_cache(rows)
        chosen = int(policy.student(seen[:, None], policy._vectors, cache=cache)[2][0, 0, 0].argmax())
    expected = policy.act(seen.numpy())
    for _, parameter in policy.student.expert_parameters({0, 1, 2, 3, 4} - {chosen}):
        parameter.fill_(torch.nan)
    policy.student.load_canonical(policy.student.state_dict())
    policy.reset("metaworld/push-v3", rows)
    np.testing.assert_array_equal(policy.act(seen.numpy()), expected)


def test_what_neighbours_do_changes_no_bit(tmp_path: Path) -> None:
    publish(tmp_path / "student")
    policy = load_student(tmp_path / "student")
    seen, actions = observations(), []
    for others in (0.0, 1.0, 2.0, 3.0):
        policy.reset("metaworld/push-v3", ENVS)
        latest = []
        for step in range(STEPS):
            changed = seen[step].copy()
            changed[1:] += others
            latest.append(policy.act(changed)[0])
        actions.append(np.stack(latest))
    assert all(np.array_equal(actions[0], other) for other in actions[1:])


@pytest.mark.parametrize("changes", [{}, DEEP], ids=["default", "deep"])
def test_the_task_is_inferred_from_the_history(changes: dict[str, int], tmp_path: Path) -> None:
    publish(tmp_path / "student", encoder=sign_encoder(), **changes)
    policy = load_student(tmp_path / "student")
    seen = np.abs(observations()) + 1.0
    seen[:, 3:, 0] *= -1.0
    known = {}
    for task in policy.task_ids:
        policy.reset(task, ENVS)
        known[task] = [policy.act(step) for step in seen]
    untold = TaskAgnosticPolicy(policy)
    untold.reset("metaworld/push-v3", ENVS)
    for step in range(STEPS):
        actions = untold.act(seen[step])
        np.testing.assert_array_equal(actions[:3], known["metaworld/reach-v3"][step][:3])
        np.testing.assert_array_equal(actions[3:], known["metaworld/push-v3"][step][3:])


def test_an_episode_that_outlasts_its_inferred_task_is_taken_for_the_next_likeliest(tmp_path: Path) -> None:
    steps = {"metaworld/reach-v3": 3, "metaworld/push-v3": 2}
    publish(tmp_path / "student", encoder=sign_encoder(), steps=steps)
    policy = load_student(tmp_path / "student")
    policy.reset(None, ENVS)
    told = []
    for step in np.abs(observations()) + 1.0:  # everything speaks for the first task
        policy.act(step)
        told.append(policy._vectors.argmax(dim=1).tolist())
        if len(told) == 9:
            policy.reset_rows(np.arange(ENVS) < 2)
    everyone = [0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0]
    begun_anew = [*everyone[:9], *everyone[:7]]
    assert [row[-1] for row in told] == everyone
    assert [row[0] for row in told] == begun_anew


@pytest.mark.parametrize("changes", [DEEP])
def test_when_the_inferred_task_changes_the_past_is_seen_with_it(changes: dict[str, Any], tmp_path: Path) -> None:
    student = publish(tmp_path / "student", encoder=sign_encoder(), **changes)
    policy = load_student(tmp_path / "student")
    seen = np.abs(observations()) + 1.0
    for row in range(ENVS):  # the evidence turns at another step in each row
        seen[2 + row :, row, 0] *= -9.0
    policy.reset(None, ENVS)
    told, begun = [], np.zeros(ENVS, int)
    for step in range(STEPS):
        if step == 5:  # from here on some rows have less past to look at again than others
            begun[[1, 4]] = step
            policy.reset_rows(begun == step)
        actions = policy.act(seen[step])
        told.append(policy._vectors.argmax(dim=1).tolist())
        for row in range(ENVS):
            window = torch.tensor(seen[max(begun[row], step + 1 - changes["history"]) : step + 1, row])[None]
            with torch.no_grad():
                expected = student(window, policy._vectors[row, None])[0][0, -1].clamp(-1, 1)
            np.testing.assert_allclose(actions[row], expected, rtol=0, atol=2e-6)
    assert told[0] == [0] * ENVS and told[-1] == [1] * ENVS and len({tuple(tasks) for tasks in told}) > 3


def sign_encoder() -> TaskEncoder:
    """Tells the two tasks apart by the sign of the first observed number."""
    encoder = TaskEncoder(6, ENCODER)
    with torch.no_grad():
        for layer in (encoder.first, encoder.second, encoder.last):
            layer.weight.zero_()
            layer.bias.zero_()
        encoder.first.weight[0, ::6], encoder.first.weight[1, ::6] = 1.0, -1.0
        encoder.second.weight[:2, :2] = encoder.last.weight[:2, :2] = torch.eye(2)
    return encoder


def test_parts_come_back_as_they_went(tmp_path: Path) -> None:
    encoder = TaskEncoder(6, ENCODER)
    student = publish(tmp_path / "student", encoder=encoder)
    parts = load_student_parts(tmp_path / "student")
    assert parts.shape == student.shape and parts.experts_by_stage == EXPERTS and parts.metadata == {"stage": 2}
    assert list(parts.task_vectors) == ["metaworld/reach-v3", "metaworld/push-v3"]
    assert parts.normaliser()[1].tolist() == [2.0] * 6
    for stored, original in ((parts.state, student), (parts.task_embedding_state, encoder)):
        assert all(torch.equal(stored[name], tensor) for name, tensor in original.state_dict().items())
    assert parts.task_embedding == ENCODER and parts.method_state is None


def test_wrong_use_is_one_sentence(tmp_path: Path) -> None:
    publish(tmp_path / "student")
    policy = load_student(tmp_path / "student")
    with pytest.raises(UserError, match="call reset"):
        policy.act(np.zeros((2, 6), np.float32))
    with pytest.raises(UserError, match=r"did you mean 'metaworld/push-v3'\?.*metaworld/reach-v3"):
        policy.reset("metaworld/pusch-v3", 2)
    with pytest.raises(UserError, match="cannot infer the task"):
        policy.reset(None, 2)
    with pytest.raises(UserError, match="num_envs is 0"):
        policy.reset("metaworld/push-v3", 0)
    policy.reset("metaworld/push-v3", 2)
    with pytest.raises(UserError, match=r"\[3, 6\].*\[2, 6\]"):
        policy.act(np.zeros((3, 6), np.float32))


def rewrite(folder: Path, **changes: object) -> None:
    path = folder / "student.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_that_is_not_a_whole_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a student folder"):
        load_student(tmp_path)
    wrong = {
        "schema_version": (3, r"schema_version 3, but .* reads 4; load it with the version"),
        "files": ({"model.safetensors": "0" * 64}, r"model\.safetensors is damaged"),
        "shape": ({"width": 3}, r"student\.json does not describe a student"),
        "task_embedding": ({"name": "psychic"}, "there is no task embedding 'psychic'"),
        "experts_by_stage": ([[0, 1, 2], [3, 4, 5]], "has no tensor|has shape"),
        "tasks": (["metaworld/unheard-of"], "no vector of it"),
    }
    for key, (value, sentence) in wrong.items():
        publish(tmp_path / key)
        rewrite(tmp_path / key, **{key: value})
        with pytest.raises(UserError, match=sentence):
            load_student(tmp_path / key)
    publish(tmp_path / "damaged")
    with open(tmp_path / "damaged" / "model.safetensors", "r+b") as file:
        file.seek(-5, 2)
        file.write(b"x")
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load_student(tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        load_student(tmp_path / "damaged")


def test_acting_needs_neither_deepspeed_nor_ranks_and_prints_nothing(tmp_path: Path) -> None:
    publish(tmp_path / "student")
    code = (
        "import sys, numpy, torch; from hpc_cpd import load_student; p = load_student(sys.argv[1]);"
        "p.reset('metaworld/push-v3', 2); p.act(numpy.zeros((2, 6), 'f'));"
        "assert 'deepspeed' not in sys.modules and not torch.distributed.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "student")], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b""), done.stderr


def test_the_policy_cannot_be_trained_by_accident(tmp_path: Path) -> None:
    publish(tmp_path / "student")
    policy = load_student(tmp_path / "student")
    assert isinstance(policy, StudentPolicy)
    assert not any(parameter.requires_grad for parameter in policy.student.parameters())
