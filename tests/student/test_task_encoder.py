"""Task vectors: one per task, apart from each other, and fixed for ever once given."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hpc_cpd.student.embeddings.base import NewTasks
from hpc_cpd.student.embeddings.contrastive import ContrastiveSettings
from hpc_cpd.student.task_encoder import MOST_REMEMBERED, TaskEncoder, info_nce, learn_task_vectors

SETTINGS = ContrastiveSettings(size=16, window=6, width=64, gradient_steps=150)
MEAN, STD = np.full(8, 1.0, np.float32), np.full(8, 2.0, np.float32)
FIRST, SECOND = [f"synthetic/{n}" for n in range(4)], [f"synthetic/{n}" for n in range(4, 8)]


def windows_of(task: str, count: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """A task is a place where things lie and a direction of travel; episodes differ much within a task."""
    number = int(task.rpartition("/")[2])
    character = np.random.default_rng([1, number])
    place, direction = character.normal(size=(2, 8))
    starts = place + rng.normal(scale=0.6, size=(count, 1, 8))
    steps = np.arange(length)[None, :, None] * 0.3 * direction
    observations = starts + steps + rng.normal(scale=0.1, size=(count, length, 8))
    return (observations * STD + MEAN).astype(np.float32)


def new_tasks(tasks: list[str], state: dict | None = None, old: dict[str, np.ndarray] | None = None) -> NewTasks:
    """Of stage 1; of stage 2, with what stage 1 left."""
    known, stage = old or {}, 2 if old else 1
    return NewTasks(tasks, list(known), FIRST + SECOND, windows_of, known, state or {}, MEAN, STD, seed=0, stage=stage)


@pytest.fixture(scope="module")
def stages() -> tuple[tuple[dict, dict], tuple[dict, dict]]:
    first = learn_task_vectors(SETTINGS, new_tasks(FIRST))
    kept = {task: vector.copy() for task, vector in first[1].items()}
    second = learn_task_vectors(SETTINGS, new_tasks(SECOND, first[0], kept))
    for task, vector in kept.items():
        assert np.array_equal(vector, first[1][task]), "an old vector was changed"
    return first, second


def accuracy(state: dict, vectors: dict[str, np.ndarray], tasks: list[str]) -> float:
    encoder = TaskEncoder(8, SETTINGS)
    encoder.load_state_dict(state)
    known = torch.tensor(np.stack(list(vectors.values())))
    right = []
    for task in tasks:
        windows = (windows_of(task, 500, SETTINGS.window, np.random.default_rng(99)) - MEAN) / STD
        nearest = (encoder(torch.tensor(windows)) @ known.T).argmax(dim=1)
        right.append(float((nearest == list(vectors).index(task)).float().mean()))
    return float(np.mean(right))


def test_the_nearest_vector_names_the_task_after_each_stage(stages: tuple) -> None:
    (first_state, first), (second_state, second) = stages
    assert accuracy(first_state, first, FIRST) > 0.9
    everything = {**first, **second}
    assert accuracy(second_state, everything, FIRST) > 0.9
    assert accuracy(second_state, everything, SECOND) > 0.9


def test_vectors_are_units_apart_and_only_new_tasks_get_one(stages: tuple) -> None:
    (_, first), (_, second) = stages
    assert list(first) == FIRST and list(second) == SECOND
    rows = np.stack([*first.values(), *second.values()])
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-6)
    similarity = rows @ rows.T - 2 * np.eye(len(rows))
    assert similarity.max() < 0.9


def test_the_same_arguments_give_the_same_bits(stages: tuple) -> None:
    torch.manual_seed(123)
    (first_state, first), (state, vectors) = stages
    again_state, again = learn_task_vectors(SETTINGS, new_tasks(SECOND, first_state, first))
    assert all(torch.equal(state[name], again_state[name]) for name in state)
    assert all(np.array_equal(vectors[task], again[task]) for task in vectors)


def test_a_single_task_gets_a_vector() -> None:
    settings = SETTINGS.model_copy(update={"gradient_steps": 3})
    _, vectors = learn_task_vectors(settings, new_tasks(FIRST[:1]))
    assert np.linalg.norm(vectors[FIRST[0]]) == pytest.approx(1.0, abs=1e-6)


def test_a_stage_rehearses_no_more_old_tasks_the_longer_the_stream() -> None:
    settings = SETTINGS.model_copy(update={"gradient_steps": 1})
    vectors = np.eye(16, dtype=np.float32)
    asked: dict[int, set[str]] = {}
    for stage, many in ((5, MOST_REMEMBERED), (6, 3 * MOST_REMEMBERED), (7, 3 * MOST_REMEMBERED)):
        old = {f"synthetic/{n}": vectors[n % 16] for n in range(100, 100 + many)}
        given = new_tasks(FIRST[:1], None, old)
        seen = asked[stage] = set()

        def noted(task: str, count: int, length: int, rng: np.random.Generator, seen: set[str] = seen) -> np.ndarray:
            seen.add(task)
            return windows_of(task, count, length, rng)

        learn_task_vectors(settings, replace(given, windows_of=noted, stage=stage))
        assert len(seen) == 1 + MOST_REMEMBERED
    assert asked[6] != asked[7]  # others in another stage


def test_windows_of_one_task_are_not_each_others_negatives() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (F.normalize(torch.randn(4, 3, generator=generator), dim=1) for _ in range(2))
    index = torch.tensor([0, 0, 1, 1])
    similarity = first @ second.T / 0.5
    terms = []
    for row, columns in enumerate([[0, 2, 3], [1, 2, 3], [2, 0, 1], [3, 0, 1]]):  # the positive first
        terms.append(similarity[row, columns].logsumexp(0) - similarity[row, row])
    torch.testing.assert_close(info_nce(first, second, index, torch.empty(0, 3), 0.5), torch.stack(terms).mean())
