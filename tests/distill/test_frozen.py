"""What is frozen is computed once, and the student that learns is the one that would have computed it every time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hpc_cpd.student.policy import load_student_parts
from tests.distill.ranks import finish, in_turn, start_ranks
from tests.distill.synthetic import make_run

pytestmark = pytest.mark.ranks

FROZEN = "method.growth.freeze_old_experts=true"
# Settings, and what is computed once in the two phases of stage 2.
CASES: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "old experts learn in phase 2": (("method.growth.freeze_old_experts=false",), ["features", "features"]),
    "all experts mixed": ((FROZEN,), ["experts", "experts"]),
    "two experts chosen": ((FROZEN, "student.top_k=2"), ["experts", "experts"]),
    "every expert on every rank": (
        (FROZEN, "student.top_k=1", "distill.expert_parallel_size=1"),
        ["experts", "experts"],
    ),
    "no growth": (("method.growth=null",), ["features", "features"]),
    "a backbone that learns": (("method.freeze_shared_layers=false",), ["nothing", "nothing"]),
    "two mixtures": (("student.backbone.layers=2", "student.backbone.mixtures=2"), ["nothing", "nothing"]),
}


@pytest.fixture(scope="module", params=[1, 2])
def stages(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Stage 2 of every case, as it is and without computing anything once, on one and on two ranks."""
    world_size, folder = request.param, tmp_path_factory.mktemp("frozen")
    found: dict[str, list[Path]] = {}
    for word in ((), ("never",)):
        runs = {
            name: make_run(folder / "".join(word) / str(number), *settings, f"distill.ranks={world_size}")
            for number, (name, (settings, _)) in enumerate(CASES.items())
        }
        wishes = [(run.folder, stage) for run in runs.values() for stage in (1, 2)]
        finish(start_ranks(world_size, *word, *in_turn(*wishes), script="rank_frozen.py"))
        for name, run in runs.items():
            found.setdefault(name, []).append(run.stage(2))
    return found


@pytest.mark.parametrize("case", CASES)
def test_what_the_method_froze_is_computed_once_and_gives_the_same_student(
    case: str, stages: dict[str, list[Path]]
) -> None:
    once, always = stages[case]
    assert (once / "served.txt").read_text().split() == CASES[case][1]
    assert not (once / "frozen").exists()
    mine, wanted = (load_student_parts(folder / "student").state for folder in (once, always))
    assert mine.keys() == wanted.keys()
    for name in mine:
        assert torch.allclose(mine[name], wanted[name], atol=2e-4), (name, (mine[name] - wanted[name]).abs().max())
