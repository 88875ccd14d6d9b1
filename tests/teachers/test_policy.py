import json
from pathlib import Path

import numpy as np
import pytest
import torch

import hpc_cpd
from hpc_cpd.errors import UserError
from hpc_cpd.run.publish import mark_done
from hpc_cpd.teachers.policy import TeacherPolicy, save_teacher


def _policy() -> TeacherPolicy:
    policy = TeacherPolicy("lab/task", 5, 2, (16, 8), "relu", -1.0, np.random.default_rng(3))
    policy.set_normaliser(np.arange(5.0), np.linspace(0.5, 2.0, 5), 7)
    with torch.no_grad():
        policy.actor[-1].weight.mul_(500.0)
    return policy


@pytest.fixture
def published(tmp_path: Path) -> Path:
    save_teacher(tmp_path, _policy(), {"seed": 0})
    mark_done(tmp_path, {})
    return tmp_path


def test_a_loaded_teacher_acts_as_the_saved_one_did(published: Path) -> None:
    observations = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    loaded = hpc_cpd.load_teacher(published)
    loaded.reset("lab/task", 6)
    actions = loaded.act(observations)
    assert np.array_equal(actions, _policy().act(observations))
    assert actions.dtype == np.float32 and actions.shape == (6, 2)


def test_actions_are_the_clipped_mean(published: Path) -> None:
    observations = np.random.default_rng(0).normal(size=(50, 5)).astype(np.float32)
    policy = hpc_cpd.load_teacher(published)
    mean = policy.action_mean(torch.tensor(observations)).detach().numpy()
    assert np.abs(mean).max() > 1.0
    assert np.array_equal(policy.act(observations), np.clip(mean, -1.0, 1.0))


def test_the_normaliser_belongs_to_the_policy() -> None:
    policy = _policy()
    there = torch.tensor(np.arange(5.0), dtype=torch.float32)
    assert torch.equal(policy.normalise(there), torch.zeros(5))
    assert torch.allclose(
        policy.normalise(there + torch.tensor(np.sqrt(np.linspace(0.5, 2.0, 5)))).float(), torch.ones(5)
    )
    assert policy.normalise(there + 1e6).max() == 10.0


def test_what_varies_little_is_not_blown_up_and_loading_keeps_that(tmp_path: Path) -> None:
    policy = TeacherPolicy("lab/task", 2, 1, (4,), smallest_std=0.1)
    policy.set_normaliser(np.zeros(2), np.array([1e-4, 4.0]), 7)
    save_teacher(tmp_path, policy, {})
    mark_done(tmp_path, {})
    for each in (policy, hpc_cpd.load_teacher(tmp_path)):
        assert torch.allclose(each.normalise(torch.tensor([0.05, 1.0])), torch.tensor([0.5, 0.5]))


def test_log_density_and_entropy_are_those_of_the_gaussian() -> None:
    policy = _policy()
    mean, actions = torch.randn(4, 2), torch.randn(4, 2)
    gaussian = torch.distributions.Independent(torch.distributions.Normal(mean, policy.log_std.exp()), 1)
    assert torch.allclose(policy.log_prob(mean, actions), gaussian.log_prob(actions), atol=1e-5)
    assert torch.allclose(policy.entropy(), gaussian.entropy()[0])


def test_a_folder_without_done_is_no_teacher(tmp_path: Path) -> None:
    save_teacher(tmp_path, _policy(), {})
    with pytest.raises(UserError, match="no published teacher"):
        hpc_cpd.load_teacher(tmp_path)


def test_a_teacher_of_another_schema_is_refused(published: Path) -> None:
    description = json.loads((published / "policy.json").read_text())
    (published / "policy.json").write_text(json.dumps({**description, "schema_version": 3}))
    with pytest.raises(UserError, match=r"policy\.json has schema_version 3, but this version reads 1 and 2"):
        hpc_cpd.load_teacher(published)


def test_a_teacher_of_an_algorithm_that_is_not_installed_is_named(published: Path) -> None:
    description = json.loads((published / "policy.json").read_text())
    (published / "policy.json").write_text(json.dumps({**description, "algorithm": "ppp"}))
    with pytest.raises(UserError, match=r"policy\.json: .*no teacher algorithm 'ppp'; did you mean 'ppo'\?.*install"):
        hpc_cpd.load_teacher(published)


def test_damaged_weights_are_refused(published: Path) -> None:
    weights = bytearray((published / "policy.safetensors").read_bytes())
    weights[-1] ^= 1
    (published / "policy.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"policy\.safetensors is damaged"):
        hpc_cpd.load_teacher(published)


def test_a_description_that_does_not_fit_the_weights_is_refused(published: Path) -> None:
    description = json.loads((published / "policy.json").read_text())
    (published / "policy.json").write_text(json.dumps({**description, "hidden": [16, 9]}))
    with pytest.raises(UserError, match="is no teacher of schema 2"):
        hpc_cpd.load_teacher(published)


def test_a_teacher_refuses_another_task(published: Path) -> None:
    with pytest.raises(UserError, match="knows lab/task, not lab/other"):
        hpc_cpd.load_teacher(published).reset("lab/other", 1)
