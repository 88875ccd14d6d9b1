"""What a stage's batches are made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_cpd.config import load_config
from hpc_cpd.distill.batches import StageBatches, shares_of
from hpc_cpd.errors import UserError
from hpc_cpd.methods._rows import with_replay
from hpc_cpd.methods.base import Stage, StageData, method_of
from hpc_cpd.run.paths import Run
from hpc_cpd.student.embeddings.one_hot import OneHotSettings
from hpc_cpd.student.network import Student
from hpc_cpd.student.policy import StudentParts, StudentPolicy
from hpc_cpd.trajectories.store import TrajectoryStore, open_trajectories
from tests.distill.synthetic import ACTION_SIZE, OBSERVATION_SIZE, TASKS, make_run
from tests.student.reference import small_shape

VECTORS = {task: np.eye(len(TASKS), dtype=np.float32)[number] for number, task in enumerate(TASKS)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("batches") / "run")


@pytest.fixture(scope="module")
def past() -> StudentPolicy:
    """A student that knows the first two tasks."""
    sizes = {"observation_size": OBSERVATION_SIZE, "action_size": ACTION_SIZE, "task_vector_size": len(TASKS)}
    shape = small_shape(**sizes, expert_hidden=8)
    state = Student(shape, [[0, 1]], for_training=False).state_dict()
    vectors = {task: VECTORS[task] for task in TASKS[:2]}
    return StudentPolicy(StudentParts(state, shape, [[0, 1]], vectors, {}, OneHotSettings()))


def data_of(
    new: TrajectoryStore,
    memory: TrajectoryStore | None,
    past: StudentPolicy | None = None,
    target: str = "teacher_mean",
    weights: dict[str, float] | None = None,
) -> StageData:
    return StageData(new, memory, VECTORS, 4, target, lambda store: shares_of(store, weights), past)


def drawn_from(data: StageData, size: int = 32, between: float = 0.0, asks_past_student: bool = False) -> StageBatches:
    rows = with_replay(data, size, 0.5, 0.5, between, asks_past_student)
    return StageBatches(rows, data, 0, 2, torch.device("cpu"))


def batches(
    run: Run, past: StudentPolicy | None, asks_past_student: bool = False, between: float = 0.0
) -> StageBatches:
    new, memory = (open_trajectories([run.trajectories(t) for t in tasks]) for tasks in (TASKS[2:], TASKS[:2]))
    return drawn_from(data_of(new, memory, past), between=between, asks_past_student=asks_past_student)


def test_a_batch_is_half_new_a_quarter_memory_and_a_quarter_anchors(run: Run, past: StudentPolicy) -> None:
    batch = batches(run, past).batch(1, 0, 0, 1)
    assert batch.is_new_task.tolist() == [True] * 16 + [False] * 16
    tasks = batch.task_vectors.argmax(dim=1)
    assert set(tasks[:16].tolist()) == {2, 3}
    assert set(tasks[16:].tolist()) == {0, 1}
    assert (batch.valid.sum(dim=1) == 1).all()
    assert (batch.rows_of_all_ranks, batch.new_rows_of_all_ranks) == (32, 16)


def test_the_executed_action_can_be_asked_for_in_place_of_the_mean(run: Run) -> None:
    asked = {}
    for target in ("teacher_mean", "actions"):
        store = open_trajectories([run.trajectories(task) for task in TASKS[2:]])
        store.actions[:] = -store.teacher_mean
        asked[target] = drawn_from(data_of(store, None, target=target)).batch(1, 0, 0, 1).target
    assert asked["teacher_mean"].abs().max() > 0 and torch.equal(asked["actions"], -asked["teacher_mean"])


def test_tasks_are_drawn_in_proportion_to_their_weights(run: Run, past: StudentPolicy) -> None:
    new, memory = (open_trajectories([run.trajectories(t) for t in tasks]) for tasks in (TASKS[2:], TASKS[:2]))
    weights = dict(zip(TASKS, [0.9, 0.3, 0.0, 0.5], strict=True))
    size = 4096
    made = drawn_from(data_of(new, memory, past, weights=weights), size, between=0.5)
    batch = made.batch(1, 0, 0, 1)
    told = batch.task_vectors.argmax(dim=1)
    assert set(told[: size // 2].tolist()) == {3}
    replayed = told[size // 2 : 3 * size // 4]
    assert (replayed == 0).float().mean() == pytest.approx(0.75, abs=0.05)
    origins = batch.describe(range(size))
    assert len(origins) == size and TASKS[2] not in " ".join(origins)
    ranks = [made.batch(1, 0, rank, 2).observations for rank in range(2)]
    assert torch.equal(torch.stack(ranks, dim=1)[: size // 4].flatten(0, 1), batch.observations[: size // 2])


def test_anchors_ask_at_new_observations_for_what_the_past_student_did(run: Run, past: StudentPolicy) -> None:
    batch = batches(run, past).batch(1, 0, 0, 1)
    store = open_trajectories([run.trajectories(task) for task in TASKS[2:]])
    known = {row.tobytes() for row in store.observations}
    for row in range(24, 32):
        steps = int(batch.valid[row].nonzero()) + 1
        assert batch.observations[row, 0].numpy().tobytes() in known
        past.reset(TASKS[int(batch.task_vectors[row].argmax())], 1)
        for step in range(steps):
            action = past.act(batch.observations[row, step : step + 1].numpy())
        asked = batch.target[row, steps - 1].clamp(-1, 1).numpy()
        np.testing.assert_allclose(asked, action[0], atol=1e-5)


def test_anchors_between_remembered_states_ask_the_past_student_there(run: Run, past: StudentPolicy) -> None:
    batch = batches(run, past, between=0.5).batch(1, 0, 0, 1)
    memory = open_trajectories([run.trajectories(task) for task in TASKS[:2]])
    for row in range(28, 32):
        now = int(batch.valid[row].nonzero())
        task = TASKS[int(batch.task_vectors[row].argmax())]
        steps = memory.observations[memory.steps(task)]
        seen = batch.observations[row, now].numpy()
        # the nearest mixture of two remembered steps of its task is the row itself
        apart = min(distance_to_line(seen, one, steps) for one in steps)
        assert apart < 1e-4 < np.abs(steps - seen).max(axis=1).min()
        with torch.no_grad():
            window = batch.observations[row, : now + 1][None]
            actions, _, _ = past.student(window, batch.task_vectors[row][None])
        torch.testing.assert_close(batch.target[row, now], actions[0, -1], rtol=0, atol=1e-5)


def distance_to_line(point: np.ndarray, one: np.ndarray, others: np.ndarray) -> float:
    """Largest deviation of `point` from the nearest mixture of `one` [obs] and one of `others` [n, obs]."""
    along = others - one
    share = ((point - one) * along).sum(axis=1) / np.maximum((along * along).sum(axis=1), 1e-12)
    return float(np.abs(one + np.clip(share, 0, 1)[:, None] * along - point).max(axis=1).min())


@pytest.mark.parametrize("between", [0.0, 0.5])
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_rows_of_all_ranks_are_the_rows_of_one(
    run: Run, past: StudentPolicy, world_size: int, between: float
) -> None:
    source = batches(run, past, between=between)
    whole = source.batch(2, 7, 0, 1)
    parts = [source.batch(2, 7, rank, world_size) for rank in range(world_size)]
    for name in ("observations", "task_vectors", "valid", "is_new_task"):
        rows = torch.cat([getattr(part, name) for part in parts]).flatten(1) if name != "is_new_task" else None
        if rows is None:
            assert sum(int(part.is_new_task.sum()) for part in parts) == int(whole.is_new_task.sum())
            continue
        one = getattr(whole, name).flatten(1)
        assert sorted(row.numpy().tobytes() for row in rows) == sorted(row.numpy().tobytes() for row in one)


def test_without_a_past_student_the_whole_replay_is_memory(run: Run) -> None:
    batch = batches(run, None).batch(1, 0, 0, 1)
    memory = open_trajectories([run.trajectories(task) for task in TASKS[:2]])
    known = {row.tobytes() for row in memory.observations}
    assert all(batch.observations[row, 0].numpy().tobytes() in known for row in range(16, 32))


def test_batches_are_a_pure_function_of_the_step(run: Run, past: StudentPolicy, tmp_path: Path) -> None:
    first, second = batches(run, past), batches(run, past)
    first.batch(1, 0, 0, 1)  # what was drawn before does not matter
    for name in ("observations", "target", "task_vectors"):
        assert torch.equal(getattr(first.batch(1, 5, 0, 1), name), getattr(second.batch(1, 5, 0, 1), name))
    assert not torch.equal(first.batch(1, 5, 0, 1).observations, first.batch(1, 6, 0, 1).observations)


def test_replayed_rows_ask_for_what_the_past_student_did_when_told_so(run: Run, past: StudentPolicy) -> None:
    told = batches(run, past).batch(1, 0, 0, 1)
    cloned = batches(run, past, asks_past_student=True).batch(1, 0, 0, 1)
    for name in ("observations", "valid", "task_vectors", "is_new_task"):
        assert torch.equal(getattr(told, name), getattr(cloned, name))
    for rows in (slice(0, 16), slice(24, 32)):  # new rows have a teacher, anchors are the past student's anyway
        torch.testing.assert_close(told.target[rows][told.valid[rows]], cloned.target[rows][told.valid[rows]])
    for row in range(16, 24):
        steps = int(cloned.valid[row].nonzero()) + 1
        past.reset(TASKS[int(cloned.task_vectors[row].argmax())], 1)
        for step in range(steps):
            action = past.act(cloned.observations[row, step : step + 1].numpy())
        asked = cloned.target[row, steps - 1].clamp(-1, 1).numpy()
        np.testing.assert_allclose(asked, action[0], atol=1e-5)
        assert np.abs(asked - told.target[row, steps - 1].numpy()).max() > 1e-3


@pytest.mark.parametrize("ranks", [2, 3])
def test_rows_of_all_ranks_are_the_same_whoever_answers_them(run: Run, past: StudentPolicy, ranks: int) -> None:
    drawn = batches(run, past, asks_past_student=True)
    whole = drawn.batch(1, 0, 0, 1)
    for rank in range(ranks):
        new, replayed = drawn.batch(1, 0, rank, ranks).split()
        assert (new.rows_of_all_ranks, replayed.rows_of_all_ranks) == (16, 16)
        assert new.is_new_task.all()
        assert not replayed.is_new_task.any()
        for part, places in ((new, [range(16)]), (replayed, [range(16, 24), range(24, 32)])):
            rows = [row for of in places for row in of[rank::ranks]]
            assert torch.equal(part.observations, whole.observations[rows])
            torch.testing.assert_close(part.target[part.valid], whole.target[rows][part.valid])


@pytest.mark.parametrize("method", ["a_gem", "clonex"])
def test_a_method_that_needs_remembered_rows_says_so_when_there_are_none(
    run: Run, past: StudentPolicy, method: str
) -> None:
    new = open_trajectories([run.trajectories(task) for task in TASKS[2:]])
    config = load_config(None, [f"method={method}"])
    made = method_of(config)
    made.begin_stage(Stage(run, config, [TASKS[:2], TASKS[2:]], 2))
    made.rows(data_of(new, None), 32)  # in stage 1 there is nothing to remember
    with pytest.raises(UserError, match=rf"stage 2: method {method} needs .* 0 are remembered"):
        made.rows(data_of(new, None, past), 32)
