"""One rank that learns stages on a device that is not there: ``rank_devices.py WORDS``, the words of rank_stage.py, or
``rank_devices.py --left WHAT RUN [WHAT RUN ...]``.

To STAGE/waits.json goes, for every phase, where a step that is not logged waited for the device: a list of places in
hpc_cpd, each as often as it did. With ``--left``, something is left on the CPU in stage 2 of each RUN (see `LEFT`), and
what stopped the stage is printed: ``WHAT: FUNCTION in hpc_cpd: the error``.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from tests.other_device import OTHER, WAITS, install

install()

from hpc_cpd.distributed import torch as distributed  # noqa: E402

distributed.device_of_rank = lambda: OTHER  # before others import it

from hpc_cpd.distill import train  # noqa: E402
from hpc_cpd.distill.batches import StageBatches  # noqa: E402
from hpc_cpd.distill.engine import PhaseEngine  # noqa: E402
from hpc_cpd.distill.frozen import FrozenParts  # noqa: E402
from hpc_cpd.methods._quadratic import QuadraticMethod  # noqa: E402
from hpc_cpd.run.publish import read_json, write_json  # noqa: E402
from hpc_cpd.worker import leave  # noqa: E402
from tests.distill import rank_stage  # noqa: E402

STEP, RUN_PHASE = train._step, train._run_phase
NOTED: list[str] = []


def step(*arguments: Any) -> Any:
    WAITS.clear()
    record = STEP(*arguments)
    if record is None:
        NOTED[:] = sorted(WAITS.elements())
    return record


def run_phase(stage: Any, phase: Any, *others: Any) -> None:
    RUN_PHASE(stage, phase, *others)
    if distributed.dist.get_rank() == 0:
        path = stage.run.stage(stage.number) / "waits.json"
        write_json(path, (read_json(path) if path.exists() else []) + [NOTED])


def with_rows_left(method: Callable[..., Any]) -> Callable[..., Any]:
    def left(*arguments: Any) -> Any:
        known = method(*arguments)
        return known.with_rows(known.rows.cpu())

    return left


def with_penalty_left(extra_loss: Callable[..., Any]) -> Callable[..., Any]:
    def left(self: QuadraticMethod, *arguments: Any) -> Any:
        self._on_device = {name: (self.importance[name], self.anchor[name]) for name in self.importance}
        return extra_loss(self, *arguments)

    return left


def with_flags_left(hold: Callable[..., Any]) -> Callable[..., Any]:
    def left(self: PhaseEngine, fixed: Any) -> None:
        hold(self, fixed)
        self._held = [(parameter, flags.cpu(), values) for parameter, flags, values in self._held]

    return left


def with_gradients_left(gradients: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, loss: [gradient.cpu() for gradient in gradients(self, loss)]


def with_columns_left(tensor: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, column: tensor(self, column).cpu()


LEFT: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "batches": (StageBatches, "_tensor", with_columns_left),
    "gradients": (PhaseEngine, "gradients", with_gradients_left),
    "penalty": (QuadraticMethod, "extra_loss", with_penalty_left),
    "tables": (FrozenParts, "of_steps", with_rows_left),
    "what is held": (PhaseEngine, "hold", with_flags_left),
}


def leave_on_the_cpu(what: str, run: str) -> None:
    kind, name, left = LEFT[what]
    rank_stage.learn(run, "1")
    with patch.object(kind, name, left(getattr(kind, name))):
        try:
            rank_stage.learn(run, "2")
        except RuntimeError as error:
            names = [frame.name for frame in traceback.extract_tb(error.__traceback__) if "/hpc_cpd/" in frame.filename]
            print(f"{what}: {names[-1]}: {error}")


def main() -> int:
    if sys.argv[1] != "--left":
        return rank_stage.main()
    rank_stage.distill_stage.finish_distributed = lambda: None
    rank_stage.distill_evaluate.evaluate_policy = rank_stage.evaluate
    for what, run in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
        leave_on_the_cpu(what, run)
    return 0


if __name__ == "__main__":
    train._step, train._run_phase = step, run_phase
    leave(main())
