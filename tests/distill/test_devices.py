"""Stages on a device that is not there (tests/other_device.py): nothing of a step, of what is frozen, of a method's
penalty, of what it holds or of a checkpoint is left on the CPU, and the student is the one that the CPU learns."""

from __future__ import annotations

from pathlib import Path

import torch

from hpc_cpd.run.publish import read_json
from hpc_cpd.student.policy import load_student_parts
from tests.distill.ranks import finish, in_turn, start_ranks
from tests.distill.synthetic import make_run

CLIP, FORWARD, ROWS = "distill/engine.py _clip", "student/network.py forward", "student/moe/mixture.py _rows"
AGAIN = [CLIP, FORWARD]  # where a step waits that computes everything
# Settings, and where a step of stage 2 waits for the device, on one rank.
CASES: dict[str, tuple[list[str], list[str]]] = {
    "ours": ([], [CLIP]),
    "ours, two experts chosen": (["student.top_k=2", "method.growth.freeze_old_experts=true"], [CLIP, ROWS]),
    "paper, one expert chosen": (["method=paper", "student.top_k=1"], [CLIP, ROWS]),
    "a backbone that learns": (["method.freeze_shared_layers=false", "distill.precision=bfloat16"], AGAIN),
    "ewc": (["method=ewc"], AGAIN),
    "a_gem": (["method=a_gem"], [*AGAIN, FORWARD, "distill/batches.py split", "methods/a_gem.py gradients"]),
    "packnet": (["method=packnet"], AGAIN),
    "lora": (["method=lora"], AGAIN),
    "replay": (["method=replay"], AGAIN),
    "clonex": (["method=clonex"], AGAIN),
}
OVER_RANKS = {
    "every expert on one rank": ["student.top_k=2", "method.growth.freeze_old_experts=true"],
    "projected gradients": ["method=a_gem"],
    "ZeRO": ["distill.zero_stage=2"],
}
SHORT = ["distill.phase1_steps=8", "distill.phase2_steps=4", "student.task_embedding.gradient_steps=5"]
# What is left on the CPU in stage 2, the settings of a stage that meets it, and the function that it stops.
LEFT = {
    "batches": ([], "normalised"),
    "gradients": (["method=a_gem"], "gradients"),
    "penalty": (["method=ewc"], "half"),
    "tables": ([], "_make"),
    "what is held": (["method=packnet"], "step"),
}


def stages_of(folder: Path, world_size: int, script: str, cases: dict[str, list[str]]) -> dict[str, Path]:
    """Stage 2 of every case."""
    runs = {
        name: make_run(folder / script / str(number), *SHORT, *settings, f"distill.ranks={world_size}")
        for number, (name, settings) in enumerate(cases.items())
    }
    wishes = [(run.folder, stage) for run in runs.values() for stage in (1, 2)]
    finish(start_ranks(world_size, *in_turn(*wishes), script=script))
    return {name: run.stage(2) for name, run in runs.items()}


def compare(folder: Path, world_size: int, cases: dict[str, list[str]]) -> dict[str, Path]:
    """Every case's stage 2 on the other device, whose student must be that of the CPU."""
    found = stages_of(folder, world_size, "rank_devices.py", cases)
    for name, stage in stages_of(folder, world_size, "rank_stage.py", cases).items():
        mine, wanted = (load_student_parts(where / "student").state for where in (found[name], stage))
        assert mine.keys() == wanted.keys()
        for tensor in mine:  # AdamW is not the same program there, and rounds otherwise
            far = float((mine[tensor] - wanted[tensor]).abs().max())
            assert torch.allclose(mine[tensor], wanted[tensor], atol=5e-4), (name, tensor, far)
    return found


def test_a_stage_on_another_device_learns_what_it_learns_on_the_cpu_and_waits_where_it_must(tmp_path: Path) -> None:
    found = compare(tmp_path, 1, {name: settings for name, (settings, _) in CASES.items()})
    for name, (_, places) in CASES.items():
        waits = read_json(found[name] / "waits.json")
        without_lines = [sorted(f"{w.partition(':')[0]} {w.rpartition(' ')[2]}" for w in phase) for phase in waits]
        assert without_lines == [sorted(places)] * 2, (name, waits)


def test_two_ranks_exchange_what_is_on_another_device(tmp_path: Path) -> None:
    compare(tmp_path, 2, OVER_RANKS)


def test_what_is_left_on_the_cpu_is_found(tmp_path: Path) -> None:
    words: list[object] = []
    for number, (what, (settings, _)) in enumerate(LEFT.items()):
        words += [what, make_run(tmp_path / str(number), *SHORT, *settings).folder]
    lines = finish(start_ranks(1, "--left", *words, script="rank_devices.py")).splitlines()
    for what, (_, function) in LEFT.items():
        wanted = f"{what}: {function}: expected all tensors to be on the same device"
        assert [line for line in lines if line.startswith(wanted)], (wanted, lines)
