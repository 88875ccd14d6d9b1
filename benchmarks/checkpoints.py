"""Time that one checkpoint takes from training, and to load it: ours against torch's and DeepSpeed's own.

    python benchmarks/checkpoints.py [--folder DIR] [--json OUT.json]

Saved are a student and AdamW's moments, once the default one and once one of about fifty million parameters, by one
rank and by two that share the experts. Ours is what training calls (hpc_cpd.distill.train): the ranks copy what they
have to write and go on; a thread writes, hashes and makes durable; later the ranks agree, the folder is renamed into
place, and the older checkpoint is removed. The peers:

torch                torch.distributed.checkpoint of the same tensors, each rank its own; durable, too, but no hash
torch, async         its async_save: copied, then written while training goes on
DeepSpeed            engine.save_checkpoint: pickles, and left to the kernel to write. It cannot save our mixture, so it
                     holds the same student with all experts on every rank
DeepSpeed, durable   the same, and its files made durable afterwards as ours are

"stands still" is the time in which no step can be made. "costs" adds that steps are slower while a checkpoint is being
written: it is all the time until it is there, less what the steps made in it take otherwise (small differences of large
times: look at several runs). Both are given as a share of a minute, at one checkpoint a minute. Every contender keeps
one older checkpoint, takes turns with the others, and gives back exactly what there was when it began. Figures are
medians over the turns, of the slowest rank; loading finds the files in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed.checkpoint as torch_checkpoint
from mixture import RESULT, run_ranks
from student_step import EXPERTS, OBSERVATION, count_parameters, shape_of
from torch import Tensor
from torch import distributed as dist

from hpc_cpd.cluster.provenance import describe_origin
from hpc_cpd.distill.engine import PhaseEngine
from hpc_cpd.distill.train import _Saver, position_of
from hpc_cpd.distributed.torch import all_ranks_max, finish_distributed, start_distributed
from hpc_cpd.errors import run_command
from hpc_cpd.methods.base import method_of
from hpc_cpd.run.paths import Run
from hpc_cpd.run.publish import publish_folder
from hpc_cpd.run.save_due import SaveDue
from hpc_cpd.settings import Config, DistillSettings, StudentSettings
from hpc_cpd.student.backbones.transformer import TransformerSettings
from hpc_cpd.student.checkpoint import load_checkpoint
from hpc_cpd.student.network import Student

SIZES = {
    "default": StudentSettings(),
    "fifty million": StudentSettings(width=512, backbone=TransformerSettings(layers=8, heads=8), expert_hidden=1088),
}
OURS, TORCH, ASYNC, DEEPSPEED, DURABLE = "ours", "torch", "torch, async", "DeepSpeed", "DeepSpeed, durable"
WINDOWS, PLAIN_STEPS = 32, 3
SECONDS_BETWEEN = 60.0
"""One checkpoint a minute."""


@dataclass
class Contender:
    """A way to save, which by itself is done when `begin` returns."""

    engine: PhaseEngine
    folder: Path
    begin: Callable[[Path], None]
    load: Callable[[Path], None]
    is_written: Callable[[], bool] = lambda: True
    finish: Callable[[], None] = lambda: None
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"still": [], "cost": [], "load": []})

    def checkpoint(self, number: int) -> Path:
        return self.folder / f"phase-1-step-{number:08d}"


def make_engine(settings: StudentSettings, expert_parallel_size: int, plain: bool) -> PhaseEngine:
    """`plain`: with a mixture that DeepSpeed does not know as such, all experts on every rank."""
    student = Student(shape_of(settings), [list(range(EXPERTS))], expert_parallel_size, for_training=not plain)
    if plain:
        student.mixtures.get_submodule("0").anchor.requires_grad_(False)  # takes no part outside DeepSpeed's groups
    return PhaseEngine(student.train(), DistillSettings(), 100, method_of(Config()))


def train(engine: PhaseEngine) -> None:
    """One step, on the same made-up windows every time."""
    shape = engine.student.shape
    generator = torch.Generator().manual_seed(0)
    observations = torch.randn(WINDOWS, shape.history, OBSERVATION, generator=generator)
    actions, balance, _ = engine.forward(
        observations, torch.randn(WINDOWS, shape.task_vector_size, generator=generator)
    )
    engine.step(actions.square().mean() + balance, 0)


def tensors_of(engine: PhaseEngine) -> dict[str, Tensor]:
    """What a checkpoint holds, as this rank has it."""
    tensors = dict(engine.student.state_dict())
    for name, moments in engine.moments().items():
        tensors |= {f"{name}|{moment}": value for moment, value in moments.items()}
    return tensors


def make_contenders(settings: StudentSettings, folder: Path) -> dict[str, Contender]:
    ours, plain = make_engine(settings, dist.get_world_size(), False), make_engine(settings, 1, True)
    for engine in (ours, plain):
        train(engine)  # now there are moments
    places = {who: folder / who.replace(", ", "-") for who in (OURS, TORCH, ASYNC, DEEPSPEED, DURABLE)}
    saver = _Saver(places[OURS], ours, SaveDue(Run(folder), 1e9), lambda: False)
    background = dist.new_group()  # its thread must not meet the collectives of training
    writing: list[Any] = []

    def load_ours(checkpoint: Path) -> None:
        ours.restore(load_checkpoint(checkpoint, ours.student)[1])

    def begin_async(checkpoint: Path) -> None:
        writing[:] = [torch_checkpoint.async_save(tensors_of(ours), checkpoint_id=checkpoint, process_group=background)]

    def load_torch(checkpoint: Path) -> None:
        torch_checkpoint.load(tensors_of(ours), checkpoint_id=checkpoint)

    def save_deepspeed(checkpoint: Path) -> None:
        plain.engine.save_checkpoint(str(checkpoint.parent), tag=checkpoint.name)

    def save_durable(checkpoint: Path) -> None:
        temporary = checkpoint.with_suffix(".tmp")
        save_deepspeed(temporary)
        if dist.get_rank() == 0:
            publish_folder(temporary, checkpoint)
        dist.barrier()

    def load_deepspeed(checkpoint: Path) -> None:
        plain.engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)

    return {
        OURS: Contender(
            ours,
            places[OURS],
            lambda checkpoint: saver.begin(*position_of(checkpoint)),
            load_ours,
            lambda: saver.pending is not None and saver.pending.written(),
            saver.finish,
        ),
        TORCH: Contender(
            ours,
            places[TORCH],
            lambda checkpoint: torch_checkpoint.save(tensors_of(ours), checkpoint_id=checkpoint),
            load_torch,
        ),
        ASYNC: Contender(
            ours, places[ASYNC], begin_async, load_torch, lambda: writing[0].done(), lambda: writing[0].result()
        ),
        DEEPSPEED: Contender(plain, places[DEEPSPEED], save_deepspeed, load_deepspeed),
        DURABLE: Contender(plain, places[DURABLE], save_durable, load_deepspeed),
    }


def slowest(seconds: list[float]) -> list[float]:
    """Of all ranks, one by one."""
    tensor = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [float(value) for value in tensor]


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def take_turn(who: str, contender: Contender, number: int) -> None:
    """Train, save while training, and load."""
    checkpoint, engine = contender.checkpoint(number), contender.engine
    if dist.get_rank() == 0:
        os.sync()  # nobody shall pay for what another left to the kernel
    dist.barrier()
    plain = median(timed(lambda: train(engine)) for _ in range(PLAIN_STEPS))
    before = {name: tensor.clone() for name, tensor in tensors_of(engine).items()}
    dist.barrier()
    began, steps = time.perf_counter(), 0
    still = timed(lambda: contender.begin(checkpoint))
    while all_ranks_max([float(not contender.is_written())])[0]:
        train(engine)
        steps += 1
    still += timed(contender.finish)
    if who != OURS and dist.get_rank() == 0:  # ours removes the older one itself
        still += timed(lambda: shutil.rmtree(contender.checkpoint(number - 1), ignore_errors=True))
    cost = time.perf_counter() - began - steps * plain

    with torch.no_grad():
        for tensor in tensors_of(engine).values():
            tensor.zero_()
    dist.barrier()
    load = timed(lambda: contender.load(checkpoint))
    for name, tensor in tensors_of(engine).items():
        if not torch.equal(tensor, before[name]):
            raise RuntimeError(f"{who} does not give back {name}")
    for kind, seconds in zip(contender.seconds, slowest([still, cost, load]), strict=True):
        contender.seconds[kind].append(seconds)


def compare(settings: StudentSettings, folder: Path, turns: int) -> dict[str, Any]:
    """Seconds of each contender, and megabytes of its checkpoint."""
    contenders = make_contenders(settings, folder)
    for number in range(1, turns + 2):  # the first one is to warm up
        for who, contender in contenders.items():
            take_turn(who, contender, number)
    found: dict[str, Any] = {}
    for who, contender in contenders.items():
        size = sum(path.stat().st_size for path in contender.folder.rglob("*") if path.is_file())
        seconds = {kind: round(median(values[1:]), 4) for kind, values in contender.seconds.items()}
        found[who] = {**seconds, "megabytes": round(size / 1e6, 1)}
    for engine in (contenders[OURS].engine, contenders[DEEPSPEED].engine):
        engine.close()
    return found


def play(plan: dict[str, Any]) -> None:
    """What each rank does."""
    rank, _ = start_distributed()
    folder = Path(plan["folder"])
    found = {size: compare(SIZES[size], folder / size.replace(" ", "-"), plan["turns"]) for size in plan["sizes"]}
    if rank == 0:
        print(RESULT + json.dumps(found), flush=True)
    finish_distributed()


def show(ranks: int, results: dict[str, Any]) -> None:
    for size, found in results.items():
        for who, figures in found.items():
            cells = [f"{figures['megabytes']:6.0f} MB"]
            for word, kind in (("stands still", "still"), ("costs", "cost")):
                cells.append(f"{word} {figures[kind]:7.3f} s = {figures[kind] / SECONDS_BETWEEN:6.2%}")
            cells.append(f"load {figures['load']:6.3f} s")
            if who != OURS:
                ratios = [f"{kind} {found[OURS][kind] / figures[kind]:.2f}" for kind in ("still", "cost", "load")]
                cells.append(f"ours/this: {', '.join(ratios)}")
            print(f"{ranks} rank{'s'[: ranks > 1]}, {size}, {who:18s} {'  '.join(cells)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="of the student")
    parser.add_argument("--ranks", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write: the disk that is measured (a temporary folder)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--play", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.play is not None:
        return play(json.loads(given.play))
    parameters = {size: count_parameters(SIZES[size]) for size in given.sizes}
    for size, count in parameters.items():
        print(f"{size}: {count:,} parameters; with AdamW's moments {12 * count / 1e6:,.0f} MB")
    results = {}
    for ranks in given.ranks:
        with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=given.folder) as name:
            plan = {"sizes": given.sizes, "turns": given.turns, "folder": name}
            results[str(ranks)] = run_ranks(__file__, ranks, plan)
        show(ranks, results[str(ranks)])
    if given.json is not None:
        settings = {"sizes": given.sizes, "ranks": given.ranks, "turns": given.turns, "parameters": parameters}
        everything = {"settings": settings, "results": results, "origin": describe_origin()}
        given.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
