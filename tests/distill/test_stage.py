"""Properties of a whole stage, on real DeepSpeed ranks."""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hpc_cpd.distill.stage import run_stage
from hpc_cpd.distill.train import newest_checkpoint
from hpc_cpd.errors import UserError
from hpc_cpd.run.metrics_log import read_metrics
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done, read_json
from hpc_cpd.student.policy import load_student, load_student_parts
from tests.distill.rank_forks import learn_on_forks
from tests.distill.ranks import finish, in_turn, start_ranks
from tests.distill.synthetic import TASKS, make_run


def student_hash(run: Run, stage: int) -> str:
    return hashlib.sha256((run.stage(stage) / "student" / "student.json").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Both stages on two ranks that share the experts."""
    words = ("evaluation.infer_task=true", "evaluation.forward_transfer=true")
    run = make_run(tmp_path_factory.mktemp("undisturbed") / "run", *words)
    finish(start_ranks(2, *in_turn((run.folder, 1), (run.folder, 2))))
    return run


# What is changed in the settings of stage 2, and at which look at `stop` two ranks are asked to stop.
VARIANTS: dict[str, tuple[dict[str, str], int | None]] = {
    "phase 1 alone": ({"phase2_steps: 20": "phase2_steps: 0"}, None),
    "phase 2 alone": ({"phase1_steps: 30": "phase1_steps: 0"}, None),
    "old ones frozen": ({"freeze_old_experts: false": "freeze_old_experts: true"}, None),
    "nothing frozen": ({"freeze_shared_layers: true": "freeze_shared_layers: false"}, None),
    "every expert on every rank": ({"expert_parallel_size: 0": "expert_parallel_size: 1"}, None),
    "ZeRO 1": ({"zero_stage: 0": "zero_stage: 1", "expert_parallel_size: 0": "expert_parallel_size: 2"}, None),
    "ZeRO 2": ({"zero_stage: 0": "zero_stage: 2", "expert_parallel_size: 0": "expert_parallel_size: 1"}, None),
    "stopped in phase 1": ({}, 7),
    "stopped in phase 2": ({"in_memory_gigabytes: 8.0": "in_memory_gigabytes: 0.0"}, 31),  # its data stay in files
    "stopped with old ones frozen": ({"freeze_old_experts: false": "freeze_old_experts: true"}, 13),
    "stopped in between": ({}, 20),
    "stopped in bfloat16": ({"precision: float32": "precision: bfloat16"}, 35),
}
RESUMED = ("stopped in phase 1", "stopped in phase 2", "stopped with old ones frozen")


@pytest.fixture(scope="module")
def variants(undisturbed: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Stage 2 on two ranks in every variant. One start for all of them: starting takes longer than the work."""
    folder = tmp_path_factory.mktemp("variants")
    runs = {name: copy_of(undisturbed, folder / name, 2) for name in VARIANTS}
    wishes: list[tuple[object, ...]] = []
    for name, (changes, stop_after) in VARIANTS.items():
        change_settings(runs[name], changes | {"forward_transfer: true": "forward_transfer: false"})  # it looks too
        wishes.append((runs[name].folder, 2) if stop_after is None else (runs[name].folder, 2, stop_after))
    output = finish(start_ranks(2, *in_turn(*wishes)), expected=3)
    stopped = {name for name in VARIANTS if not is_done(runs[name].stage(2))}
    assert stopped == {name for name, (_, stop_after) in VARIANTS.items() if stop_after is not None}
    assert output.count("all ranks saved") == 2 * len(stopped)
    assert all(newest_checkpoint(runs[name].stage(2) / "checkpoints") for name in stopped)
    return runs


@pytest.fixture(scope="module")
def resumed(variants: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Those of RESUMED, finished by two new processes."""
    folder = tmp_path_factory.mktemp("resumed")
    runs = {name: copy_of(variants[name], folder / name) for name in RESUMED}
    finish(start_ranks(2, *in_turn(*((run.folder, 2) for run in runs.values()))))
    return runs


@pytest.fixture(scope="module")
def on_one_rank(undisturbed: Run, variants: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Stage 2 on a single rank: begun there; gone on with after a stop of two; and one that two ranks have finished."""
    folder = tmp_path_factory.mktemp("one_rank")
    runs = {
        "begun": copy_of(undisturbed, folder / "begun", 2),
        "finished": copy_of(undisturbed, folder / "finished"),
        "stopped in between": copy_of(variants["stopped in between"], folder / "stopped"),
        "stopped in bfloat16": copy_of(variants["stopped in bfloat16"], folder / "bfloat16"),
    }
    change_settings(runs["begun"], {"expert_parallel_size: 0": "expert_parallel_size: 1"})
    change_settings(runs["stopped in bfloat16"], {"precision: bfloat16": "precision: float32"})
    finish(start_ranks(1, *in_turn(*((run.folder, 2) for run in runs.values()))))
    return runs


def copy_of(run: Run, folder: Path, stage: int | None = None) -> Run:
    """A copy of `run` with its times, without what `stage` and later ones made."""
    copy = Run(shutil.copytree(run.folder, folder / "run"))
    for later in range(stage or 3, 3):
        shutil.rmtree(copy.stage(later), ignore_errors=True)
    return copy


def change_settings(run: Run, changes: dict[str, str]) -> None:
    text = run.config_file.read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    run.config_file.write_text(text)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_student_parts(folder).state)


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_the_student_learns_and_publishes_every_file_of_the_run_layout(undisturbed: Run) -> None:
    for stage in (1, 2):
        folder = undisturbed.stage(stage)
        assert is_done(folder)
        for name in ("student/model.safetensors", "student/student.json", "memory/selection.json"):
            assert (folder / name).is_file()
        for name in ("metrics.jsonl", "routing.json", "evaluation.json"):
            assert (folder / name).is_file()
        losses = [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]
        assert losses[-1] < losses[0]
    before = read_json(undisturbed.stage(2) / "evaluation_before.json")
    assert before["stage"] == 1 and list(before["untrained"]) == list(before["before"]) == TASKS[2:]
    told, untold = (read_json(undisturbed.stage(2) / f"evaluation{name}.json")["tasks"] for name in ("", "_inferred"))
    assert list(told) == list(untold) == TASKS
    assert [task["successes"] for task in told.values()] == [2] * 4
    assert [task["successes"] for task in untold.values()] == [0] * 4  # as rank_stage.py has it for who is not told
    memory = read_json(undisturbed.stage(1) / "memory" / "selection.json")["memories"]
    assert all(0 < task["kept_steps"] <= task["budget_steps"] <= 0.2 * task["total_steps"] for task in memory)


def test_frozen_parameters_do_not_move_by_a_bit_in_their_phase(variants: dict[str, Run]) -> None:
    for phase in (1, 2):
        run = variants[f"phase {phase} alone"]
        start = run.stage(2) / "start"
        moved = changed(state_of(start), state_of(run.stage(2) / "student"))
        parts = load_student_parts(start)
        new = {f".{expert}." for expert in parts.experts_by_stage[1]}
        moved_experts = {name for name in moved if ".experts." in name}
        moved_gate = {name for name in moved if ".gate." in name}
        assert not moved - moved_experts - moved_gate - {name for name in moved if "anchor" in name}
        old_moved = {name for name in moved_experts if not any(part in name for part in new)}
        assert moved_experts - old_moved, "the new experts must learn"
        if phase == 1:
            assert not old_moved
            assert moved_gate
        else:
            assert old_moved
            assert not moved_gate


def test_what_is_old_never_moves_by_a_bit_where_it_is_frozen(variants: dict[str, Run]) -> None:
    run = variants["old ones frozen"]
    start = run.stage(2) / "start"
    moved = changed(state_of(start), state_of(run.stage(2) / "student"))
    new = {f".experts.{expert}." for expert in load_student_parts(start).experts_by_stage[1]}
    born = {name for name in moved if any(part in name for part in new)}
    assert {part for part in new if any(part in name for name in born)} == new, "every new expert must learn"
    assert {name for name in moved - born if "anchor" not in name} == {
        "mixtures.0.gate.weight_2",
        "mixtures.0.gate.bias_2",
    }


def same_files(one: Path, other: Path) -> set[str]:
    """Names of the tensors' files of two folders that are the same file."""
    both = {path.name for path in one.glob("*.safetensors")} & {path.name for path in other.glob("*.safetensors")}
    return {name for name in both if (one / name).samefile(other / name)}


def test_files_of_experts_that_do_not_move_are_those_of_the_stage_before(variants: dict[str, Run]) -> None:
    old = {f"mixture-0-expert-{expert:04d}.safetensors" for expert in (0, 1)}
    run, stopped = variants["old ones frozen"], variants["stopped with old ones frozen"]
    checkpoint = newest_checkpoint(stopped.stage(2) / "checkpoints")
    assert checkpoint is not None
    for before, after in (
        (run.stage(1) / "student", run.stage(2) / "start"),
        (run.stage(1) / "student", run.stage(2) / "student"),
        (stopped.stage(1) / "student", checkpoint),
    ):
        assert same_files(before, after) == old
    moving = variants["phase 2 alone"]
    assert not same_files(moving.stage(1) / "student", moving.stage(2) / "student")


def test_a_finished_stage_keeps_what_later_ones_need_and_no_more(undisturbed: Run, tmp_path: Path) -> None:
    run = copy_of(undisturbed, tmp_path, 1)
    learn_on_forks(1, tmp_path / "log", ("--forget", run.folder, 1), (run.folder, 2))
    kept = {"DONE", "student", "memory", "routing.json", "metrics.jsonl", "progress.json"}
    kept |= {"evaluation.json", "evaluation_inferred.json", "evaluation_before.json"}
    assert {path.name for path in run.stage(2).iterdir()} == kept
    assert {path.name for path in run.stage(1).iterdir()} == {*kept, "start"}  # for forward transfer


def test_shared_layers_go_on_learning_when_the_freeze_is_switched_off(variants: dict[str, Run]) -> None:
    run = variants["nothing frozen"]
    moved = changed(state_of(run.stage(2) / "start"), state_of(run.stage(2) / "student"))
    assert any(".experts." not in name and ".gate." not in name and "anchor" not in name for name in moved)


def test_new_experts_are_born_with_gate_bias_minus_five(undisturbed: Run) -> None:
    for stage in (1, 2):
        state = state_of(undisturbed.stage(stage) / "start")
        biases = sorted(name for name in state if "gate.bias" in name)  # the file holds its tensors in any order
        assert len(biases) == stage
        assert torch.equal(state[biases[-1]], torch.full((2,), -5.0 if stage > 1 else 0.0))


def test_old_task_vectors_never_change(undisturbed: Run) -> None:
    first = load_student_parts(undisturbed.stage(1) / "student").task_vectors
    second = load_student_parts(undisturbed.stage(2) / "student").task_vectors
    assert list(second) == TASKS
    for task in first:
        assert (first[task] == second[task]).all()


def test_the_normaliser_of_stage_1_is_carried_to_the_last_bit(undisturbed: Run) -> None:
    first = load_student_parts(undisturbed.stage(1) / "start").normaliser()
    assert first[1].min() > 0
    for stage, name in ((1, "student"), (2, "start"), (2, "student")):
        later = load_student_parts(undisturbed.stage(stage) / name).normaliser()
        assert all((a == b).all() for a, b in zip(first, later, strict=True))


def test_growth_leaves_actions_on_old_tasks_as_they_were(undisturbed: Run) -> None:
    old, grown = (load_student(undisturbed.stage(k) / name) for k, name in ((1, "student"), (2, "start")))
    observations = torch.randn(16, 39, generator=torch.Generator().manual_seed(0)).numpy()
    for task in TASKS[:2]:
        old.reset(task, 16)
        grown.reset(task, 16)
        before, after = old.act(observations), grown.act(observations)
        assert abs(before - after).max() <= 1e-2 * abs(before).max()


def assert_equal_up_to_rounding(run: Run, undisturbed: Run) -> None:
    ours, theirs = (state_of(r.stage(2) / "student") for r in (run, undisturbed))
    start = state_of(run.stage(2) / "start")
    for name in ours:
        moved = (theirs[name] - start[name]).abs().max()
        assert (ours[name] - theirs[name]).abs().max() <= 1e-3 * moved + 1e-5, name


def test_ranks_expert_parallel_size_and_zero_do_not_change_the_student(
    undisturbed: Run, variants: dict[str, Run], on_one_rank: dict[str, Run]
) -> None:
    """50 steps from the same start, equal up to float rounding."""
    for name in ("every expert on every rank", "ZeRO 1", "ZeRO 2"):
        assert_equal_up_to_rounding(variants[name], undisturbed)
    assert_equal_up_to_rounding(on_one_rank["begun"], undisturbed)


@pytest.mark.parametrize("name", RESUMED)
def test_stopped_ranks_save_together_and_the_resumed_student_has_the_same_bits(
    undisturbed: Run, variants: dict[str, Run], resumed: dict[str, Run], name: str
) -> None:
    """Also when the trajectories, and what is computed of them once, stay in files."""
    run, whole = resumed[name], variants["old ones frozen"] if "frozen" in name else undisturbed
    assert student_hash(run, 2) == student_hash(whole, 2)
    for file in ("metrics.jsonl", "evaluation.json", "memory/selection.json", "routing.json"):
        assert (run.stage(2) / file).read_bytes() == (whole.stage(2) / file).read_bytes()


def test_a_student_killed_at_any_moment_ends_with_the_same_bits(undisturbed: Run, tmp_path: Path) -> None:
    """Twice in each stage, a moment after one of the five things that a stage says it does."""
    run = copy_of(undisturbed, tmp_path, 1)
    change_settings(run, {"checkpoint_every_seconds: 20.0": "checkpoint_every_seconds: 0.2"})
    both = in_turn((run.folder, 1), (run.folder, 2))
    moments = random.Random(0)
    for stage in (1, 2):
        for _ in range(2):
            ranks = start_ranks(2, *both)
            left = moments.randint(1, 4)
            for line in ranks[0].stdout or ():
                left -= line.startswith(f"stage {stage}: ")
                if not left or line.startswith(f"stage {stage + 1}: "):
                    break
            time.sleep(moments.uniform(0.0, 0.6))
            for rank in ranks:
                rank.kill()
            for rank in ranks:
                rank.communicate()
    finish(start_ranks(2, *both))
    for stage in (1, 2):
        assert student_hash(run, stage) == student_hash(undisturbed, stage)


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_a_stage_stopped_on_two_ranks_goes_on_on_another_number(
    undisturbed: Run, variants: dict[str, Run], on_one_rank: dict[str, Run], tmp_path: Path, ranks: int
) -> None:
    run = on_one_rank["stopped in between"]
    if ranks > 1:
        run = copy_of(variants["stopped in between"], tmp_path)
        finish(start_ranks(ranks, run.folder, 2))
    losses, wanted = (read_metrics(r.stage(2) / "metrics.jsonl") for r in (run, undisturbed))
    assert len(losses) == len(wanted) == 2
    for key in ("loss", "new_loss", "replay_loss", "load_balancing_loss"):
        assert [line[key] for line in losses] == pytest.approx([line[key] for line in wanted], rel=0, abs=1e-5)
    assert_equal_up_to_rounding(run, undisturbed)


def test_bfloat16_learns_like_float32_and_its_checkpoint_serves_both(
    undisturbed: Run, variants: dict[str, Run], on_one_rank: dict[str, Run]
) -> None:
    checkpoint = newest_checkpoint(variants["stopped in bfloat16"].stage(2) / "checkpoints")
    assert checkpoint is not None
    for file in checkpoint.glob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}
    run = on_one_rank["stopped in bfloat16"]
    losses, wanted = ([line["loss"] for line in read_metrics(r.stage(2) / "metrics.jsonl")] for r in (run, undisturbed))
    assert losses == pytest.approx(wanted, rel=0.05)
    assert losses[0] != wanted[0]


def test_a_finished_stage_is_not_done_again(undisturbed: Run, on_one_rank: dict[str, Run]) -> None:
    before, after = (
        {path.relative_to(run.folder): path.stat().st_mtime_ns for path in run.stage(2).rglob("*") if path.is_file()}
        for run in (undisturbed, on_one_rank["finished"])
    )
    assert before == after
    assert student_hash(undisturbed, 2) == student_hash(on_one_rank["finished"], 2)


def test_what_is_missing_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    """Before any rank waits for another; tests/journey sees what a launch makes of it."""
    run = make_run(tmp_path / "run")
    shutil.rmtree(run.trajectories(TASKS[3]))
    with pytest.raises(UserError) as refusal:
        run_stage(run, 2, lambda: False)
    output = str(refusal.value)
    assert f"the trajectories of {TASKS[3]}" in output
    assert "--stage teachers" in output
    assert f"the student of stage 1 (make it with: python -m hpc_cpd.launch --run {run.folder} --stage 1)" in output
    with pytest.raises(UserError, match="there is no stage 3"):
        run_stage(run, 3, lambda: False)
    assert not torch.distributed.is_initialized()
