"""What can be said of a teacher before any job starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from hpc_cpd.config import load_config
from hpc_cpd.errors import UserError
from hpc_cpd.teachers.sources.base import check_teachers
from tests.teachers.jobs import REACH

SCRATCH = "teachers.start=scratch"


@pytest.mark.parametrize(
    ("words", "task", "sentence"),
    [
        ([], "gymnasium/Hopper-v5", "no scripted policy for gymnasium/Hopper-v5.*start=scratch.*teachers.start.folder"),
        (["teachers.start.batch_size=1"], REACH, "teachers.start.batch_size is 1, but there are 2 ranks"),
        ([SCRATCH, "teachers.algorithm.num_envs=1"], REACH, "teachers.algorithm.num_envs is 1, but there are 2 ranks"),
        (["teachers.source=zoo"], "metaworld/reach-v3@1of2", None),
        (["teachers.source=zoo"], "gymnasium/Hopper-v5", "the zoo has no teacher of gymnasium/Hopper-v5"),
        (["teachers.source=student", "teachers.source.folder=/nowhere"], REACH, "/nowhere is not a student folder"),
    ],
)
def test_what_a_source_cannot_make_is_refused_before_any_job(words: list[str], task: str, sentence: str | None) -> None:
    config = load_config(None, ["trajectories.success_only=false", *words])
    if sentence is None:
        check_teachers(config, [task])
    else:
        with pytest.raises(UserError, match=sentence):
            check_teachers(config, [task])


def test_settings_of_another_choice_are_unknown() -> None:
    with pytest.raises(UserError, match=r"unknown setting 'teachers\.start\.gradient_steps'"):
        load_config(None, [SCRATCH, "teachers.start.gradient_steps=5"])


def test_asking_all_of_it_imports_no_torch() -> None:
    program = (
        "import sys\n"
        "from hpc_cpd.config import load_config\n"
        "from hpc_cpd.teachers.sources.base import check_teachers\n"
        "for words in ([], ['teachers.source=zoo'], ['teachers.start=scratch']):\n"
        f"    check_teachers(load_config(None, words), [{REACH!r}])\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == "False", done.stderr
