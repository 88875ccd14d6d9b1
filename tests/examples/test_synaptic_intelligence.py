"""Synaptic Intelligence as an installed package: what it does to a student, and that a kill changes nothing of it."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hpc_cpd.config import load_config
from hpc_cpd.distill.train import newest_checkpoint, position_of
from hpc_cpd.distill.validation import check_settings
from hpc_cpd.errors import UserError
from hpc_cpd.methods.base import method_of
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done
from hpc_cpd.student.policy import StudentParts, load_student_parts
from tests.distill.rank_forks import learn_on_forks, start_forks
from tests.distill.synthetic import make_run
from tests.examples.installed import install_here
from tests.student.reference import make_student, small_shape

METHOD = "synaptic_intelligence"
STEPS = 30  # of each phase


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The package is installed here and in every process that a test starts."""
    with pytest.MonkeyPatch.context() as patch:
        install_here(patch, tmp_path_factory.mktemp("site"), METHOD)
        yield


def a_run(folder: Path, method: str, *words: str) -> Run:
    steps = [f"distill.phase{phase}_steps={STEPS}" for phase in (1, 2)]
    return make_run(folder, f"method={method}", "method.experts_per_task=1", *steps, *words)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Two stages on two ranks that share the experts, with fine-tuning and with this method."""
    folder = tmp_path_factory.mktemp("undisturbed")
    runs = {name: a_run(folder / name, name) for name in ("fine_tuning", METHOD)}
    learn_on_forks(2, folder / "log", *((run.folder, stage) for run in runs.values() for stage in (1, 2)))
    return runs


def student(run: Run, stage: int) -> StudentParts:
    return load_student_parts(run.stage(stage) / "student")


def state_kept(run: Run, stage: int) -> dict[str, torch.Tensor]:
    kept = student(run, stage).method_state
    assert kept is not None and kept.method == METHOD
    return kept.tensors


def test_the_first_student_is_that_of_fine_tuning_and_the_second_another(undisturbed: dict[str, Run]) -> None:
    for stage, same in ((1, True), (2, False)):
        plain, ours = (student(undisturbed[name], stage).state for name in ("fine_tuning", METHOD))
        assert plain.keys() == ours.keys()
        assert all(torch.equal(plain[name], ours[name]) for name in plain) == same


def test_what_was_important_stays_nearer_to_where_it_was(undisturbed: dict[str, Run]) -> None:
    """Distances that the penalty weighs, from the first student to the second one."""
    kept = state_kept(undisturbed[METHOD], 1)
    first = student(undisturbed[METHOD], 1).state
    weighed = {}
    for method, run in undisturbed.items():
        second = student(run, 2).state
        weighed[method] = sum(
            float((kept[f"{name}|importance"] * (second[name] - first[name]).square()).sum())
            for name in first
            if f"{name}|importance" in kept
        )
    assert 0 < weighed[METHOD] < 0.9 * weighed["fine_tuning"]


def test_the_state_of_every_expert_is_published(undisturbed: dict[str, Run]) -> None:
    first, second = (state_kept(undisturbed[METHOD], stage) for stage in (1, 2))
    assert first.keys() == second.keys()
    names = {key.partition("|")[0] for key in first}
    assert {key.partition("|")[2] for key in first} == {"importance", "start"}  # no path is left over
    assert {f"mixtures.0.experts.{expert}.last.weight" for expert in range(2)} <= names  # one lives on each rank
    for name in names:
        assert (first[f"{name}|importance"] >= 0).all()
        assert torch.equal(first[f"{name}|start"], student(undisturbed[METHOD], 1).state[name])
        assert torch.equal(second[f"{name}|start"], student(undisturbed[METHOD], 2).state[name])
    assert sum(float(first[f"{name}|importance"].sum()) for name in names) > 0


def test_one_rank_goes_on_from_two_with_the_importance_of_all_experts(
    undisturbed: dict[str, Run], tmp_path: Path
) -> None:
    wanted = undisturbed[METHOD]
    run = Run(shutil.copytree(wanted.folder, tmp_path / "run"))
    shutil.rmtree(run.stage(2))
    learn_on_forks(1, tmp_path / "log", (run.folder, 2))
    start = student(wanted, 1).state
    one, two = (student(r, 2).state for r in (run, wanted))
    for name in one:
        moved = (two[name] - start[name]).abs().max()
        assert (one[name] - two[name]).abs().max() <= 1e-3 * moved + 1e-5, name


class Small:
    """The method around a real student of which one vector learns, by plain descent on 0.5 * weights * (p - goal)^2."""

    def __init__(self, coefficient: float = 1.0) -> None:
        config = load_config(None, [f"method={METHOD}", f"method.coefficient={coefficient}"])
        self.method = method_of(config)
        self.student = make_student(small_shape(), [[0]]).requires_grad_(False)
        named = self.student.named_parameters()
        self.name, self.parameter = next((name, value) for name, value in named if value.dim() == 1)
        self.parameter.requires_grad_(True)
        self.weights = torch.zeros_like(self.parameter)
        self.weights[:2] = torch.tensor([1.0, 4.0])

    def loss(self, goal: float) -> torch.Tensor:
        return 0.5 * (self.weights * (self.parameter - goal).square()).sum()

    def penalty(self) -> torch.Tensor:
        penalty = self.method.extra_loss(self.student, None, torch.empty(0), 1.0)
        assert penalty is not None
        return penalty

    def learn(self, goal: float, steps: int, rate: float = 0.001) -> None:
        for _ in range(steps):
            (self.loss(goal) + self.penalty()).backward()
            self.method.gradients(self.student, None)
            with torch.no_grad():
                assert self.parameter.grad is not None
                self.parameter.sub_(rate * self.parameter.grad)
            self.parameter.grad = None  # as DeepSpeed does
            self.method.after_step(self.student)

    def end_stage(self) -> None:
        state = {name: tensor.detach().clone() for name, tensor in self.student.state_dict().items()}
        self.method.end_stage(state, lambda: self.student, lambda _: pytest.fail("it needs no samples"))

    def kept(self, word: str) -> torch.Tensor:
        return self.method.state_dict()[f"{self.name}|{word}"]


def test_the_path_integral_adds_up_to_what_the_loss_was_lowered_by() -> None:
    small = Small()
    before = float(small.loss(1.0).detach())
    small.learn(1.0, steps=200)
    lowered = before - float(small.loss(1.0).detach())
    path = small.kept("path")
    assert float(path.sum()) == pytest.approx(lowered, rel=0.01)
    assert path[1] > path[0] > 0 and not path[2:].any()


def test_importance_is_never_negative() -> None:
    small = Small()
    small.learn(1.0, steps=50)
    small.end_stage()
    first = small.kept("importance").clone()
    assert first[1] > first[0] > 0 and not first[2:].any()
    small.method.state_dict()[f"{small.name}|path"] = torch.full_like(first, -1e6)  # a stage of unlucky steps
    small.end_stage()
    assert (small.kept("importance") == 0).all()


def test_the_penalty_pulls_back_to_where_the_last_stage_ended() -> None:
    small = Small(coefficient=3.0)
    assert not small.penalty().requires_grad  # nothing is important yet
    small.learn(1.0, steps=50)
    small.end_stage()
    reached, importance = small.parameter.detach().clone(), small.kept("importance")
    assert small.penalty().item() == 0.0
    with torch.no_grad():
        small.parameter.add_(0.5)
    assert small.penalty().item() == pytest.approx(3.0 * 0.25 * float(importance.sum()))
    small.penalty().backward()
    assert small.parameter.grad is not None
    torch.testing.assert_close(small.parameter.grad, 3.0 * 2 * importance * (small.parameter.detach() - reached))


def test_the_path_integral_of_a_later_stage_leaves_the_penalty_out() -> None:
    small = Small()
    small.learn(1.0, steps=50)
    small.end_stage()
    with torch.no_grad():
        small.parameter.add_(0.5)
    gradient = small.weights * (small.parameter.detach() + 1.0)
    before = small.parameter.detach().clone()
    small.learn(-1.0, steps=1)
    torch.testing.assert_close(small.kept("path"), -gradient * (small.parameter.detach() - before))


def test_a_new_object_goes_on_from_the_state_of_another() -> None:
    one, other = Small(), Small()
    one.learn(1.0, steps=20)
    with torch.no_grad():
        other.parameter.copy_(one.parameter)
    other.method.load_state_dict({key: value.clone() for key, value in one.method.state_dict().items()})
    for small in (one, other):
        small.learn(1.0, steps=20)
        small.end_stage()
    assert torch.equal(one.kept("importance"), other.kept("importance"))


def test_zero_is_refused_before_anything_is_written() -> None:
    config = load_config(None, [f"method={METHOD}", "distill.zero_stage=1"])
    with pytest.raises(UserError, match=r"whole gradients.*distill\.zero_stage is 1; set distill\.zero_stage=0"):
        check_settings(config, [["a"], ["b"]])


@pytest.mark.parametrize("stage", [1, 2])
def test_killed_at_five_moments_of_a_stage_it_ends_with_the_same_bits(
    undisturbed: dict[str, Run], tmp_path: Path, stage: int
) -> None:
    """Two kills come after a checkpoint within phase 1 or 2, from which the path integrals are restored."""
    wanted, moments, log = undisturbed[METHOD], random.Random(stage), tmp_path / "log"
    run = a_run(tmp_path / "run", METHOD, "checkpoint_every_seconds=0.05")
    if stage == 2:
        shutil.copytree(wanted.stage(1), run.stage(1))
    restored, phases = 0, [0, 1, 0, 2, 0]  # 0: wait for nothing
    while phases:
        ranks = start_forks(2, log, run.folder, stage)
        while all(rank.is_alive() for rank in ranks) and phases[0] > within_a_phase(run, stage):
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 0.3))
        alive = all(rank.is_alive() for rank in ranks)
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.join()
        if alive and ranks[0].exitcode == -signal.SIGKILL:
            phases.pop(0)
            restored += within_a_phase(run, stage) > 0
        else:  # it was done before: once more
            assert [rank.exitcode for rank in ranks] == [0, 0], log.read_text()
            assert_same_bits(run, wanted, stage)
            shutil.rmtree(run.stage(stage))
    assert restored >= 1
    learn_on_forks(2, log, (run.folder, stage))
    assert_same_bits(run, wanted, stage)


def within_a_phase(run: Run, stage: int) -> int:
    """The phase of the checkpoint that would be restored now; 0: none would, or one of a phase's beginning."""
    newest = newest_checkpoint(run.stage(stage) / "checkpoints")
    phase, step = position_of(newest) if newest is not None else (0, 0)
    return phase if step else 0


def assert_same_bits(run: Run, wanted: Run, stage: int) -> None:
    assert is_done(run.stage(stage))
    one, other = ((r.stage(stage) / "student" / "student.json").read_bytes() for r in (run, wanted))
    assert one == other
    mine, theirs = state_kept(run, stage), state_kept(wanted, stage)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
