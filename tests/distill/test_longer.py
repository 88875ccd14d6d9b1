"""A run whose stream is made longer goes on as if it had been so from the beginning."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_cpd.config import load_config
from hpc_cpd.distill.validation import lengthens
from hpc_cpd.errors import UserError
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import sha256
from tests.distill.ranks import finish, in_turn, start_ranks
from tests.distill.synthetic import SETTINGS, TASKS, make_run, synthetic_config

SHORT = f"stream.tasks=[{','.join(TASKS[:2])}]"


def student_of(run: Run, stage: int) -> dict[str, str]:
    folder = run.stage(stage) / "student"
    return {path.name: sha256(path) for path in sorted(folder.rglob("*")) if path.suffix == ".safetensors"}


def test_stages_that_are_added_later_give_the_bits_of_a_stream_that_had_them(tmp_path: Path) -> None:
    grown, whole = make_run(tmp_path / "grown", SHORT), make_run(tmp_path / "whole")
    finish(start_ranks(1, grown.folder, 1))
    first = student_of(grown, 1)
    assert first
    with pytest.raises(UserError, match=r"stream\.tasks was"):
        grown.open(synthetic_config(), {})
    grown.open(synthetic_config(), {}, lengthens(grown.config(), synthetic_config()))
    finish(start_ranks(1, *in_turn((grown.folder, 2), (whole.folder, 1), (whole.folder, 2))))
    assert student_of(grown, 1) == first == student_of(whole, 1)
    assert student_of(grown, 2) == student_of(whole, 2)
    assert grown.config() == whole.config()


ONE_HOT, PACKNET = "student.task_embedding=one_hot", "method=packnet"


@pytest.mark.parametrize(
    ("before", "after", "longer"),
    [
        ([], [], True),
        ([], ["stream.tasks_per_stage=1"], False),  # other stages
        ([], ["stream.order_seed=3"], False),  # another order
        ([ONE_HOT], [ONE_HOT], False),  # a place for every task of the stream
        ([PACKNET], [PACKNET], False),  # a share for every stage
    ],
)
def test_a_stream_is_longer_where_stages_follow_and_nothing_before_depends_on_their_number(
    before: list[str], after: list[str], longer: bool
) -> None:
    old, new = load_config(None, [*SETTINGS, SHORT, *before]), synthetic_config(*after)
    assert lengthens(old, new) is longer
    assert not lengthens(new, old) and not lengthens(old, old)
