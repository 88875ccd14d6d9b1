"""Ranks that are lost, and losses that are not finite, on real DeepSpeed ranks."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from hpc_cpd.cluster.ranks import GRACE_SECONDS
from hpc_cpd.distill.train import newest_checkpoint
from hpc_cpd.distributed.failures import ROLL_CALL_SECONDS
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import is_done
from hpc_cpd.settings import DistillSettings
from tests.distill.ranks import finish, start_ranks
from tests.distill.synthetic import make_run


def wait_for_checkpoint(run: Run, stage: int, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while newest_checkpoint(run.stage(stage) / "checkpoints") is None:
        assert time.monotonic() < end, "no checkpoint appeared"
        time.sleep(0.05)


@pytest.mark.parametrize(("lost", "number"), [(0, signal.SIGSTOP), (1, signal.SIGSTOP), (1, signal.SIGKILL)])
def test_a_rank_lost_in_a_step_is_named_by_the_other_and_the_next_launch_goes_on(
    tmp_path: Path, lost: int, number: signal.Signals
) -> None:
    words = ["distill.phase1_steps=3000", "distill.collective_timeout_seconds=4", "checkpoint_every_seconds=4"]
    run = make_run(tmp_path / "run", *words)
    ranks = start_ranks(2, run.folder, 1)
    wait_for_checkpoint(run, 1)
    time.sleep(1.0)  # a rank that publishes a checkpoint is given more time than one in a step
    ranks[lost].send_signal(number)
    began = time.monotonic()
    output, _ = ranks[1 - lost].communicate(timeout=120)
    assert ranks[1 - lost].returncode == 1, output
    assert time.monotonic() - began < 60
    assert "lost: stage 1 phase 1 step" in output and f"rank {lost} of 2 no longer answers" in output
    ranks[lost].kill()
    ranks[lost].communicate()
    reached = newest_checkpoint(run.stage(1) / "checkpoints")
    assert reached is not None and not is_done(run.stage(1))
    text = run.config_file.read_text()
    run.config_file.write_text(text.replace("phase1_steps: 3000", f"phase1_steps: {int(reached.name[-8:]) + 5}"))
    finish(start_ranks(2, run.folder, 1))
    assert is_done(run.stage(1))


def test_a_lost_rank_ends_the_job_within_a_minute_by_default() -> None:
    assert DistillSettings().collective_timeout_seconds + ROLL_CALL_SECONDS + GRACE_SECONDS < 60


@pytest.mark.parametrize("zero", [0, 1])
def test_a_loss_that_is_not_finite_stops_all_ranks_before_the_step_and_names_its_rows(
    tmp_path: Path, zero: int
) -> None:
    words = ["distill.learning_rate=1e30", f"distill.zero_stage={zero}", "checkpoint_every_seconds=0.001"]
    run = make_run(tmp_path / "run", *words)
    output = finish(start_ranks(2, run.folder, 1), expected=2)
    assert "stage 1 phase 1 step " in output and "the step was not made; the last checkpoint stands" in output
    assert "not finite in 32 of the batch's 32 rows: metaworld/" in output and " episode " in output
    assert newest_checkpoint(run.stage(1) / "checkpoints") is not None
    assert not (run.stage(1) / "student").exists()
