"""Training steps for benchmarks/gpu.py: whole steps of hpc_cpd.distill.engine.PhaseEngine on made-up windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_timing import operations, seconds
from student_step import DIMENSIONS
from torch import Tensor, nn

from hpc_cpd.config import load_config
from hpc_cpd.distill.batches import Batch
from hpc_cpd.distill.engine import PhaseEngine
from hpc_cpd.distill.train import batch_loss
from hpc_cpd.methods.base import Phase, method_of
from hpc_cpd.student.moe.mixture import Expert
from hpc_cpd.student.network import Student, StudentShape, grown

DEFAULT, FROZEN, LARGE, DENSE = "default", "default, old parts frozen", "64 experts, 100M active", "dense, 100M active"
LARGE_SETTINGS = [
    "student.width=1024",
    "student.backbone={layers: 5, mixtures: 2, heads: 16}",
    "student.expert_hidden=2048",
    "student.history=32",
    "student.top_k=2",
]
SMALL_SETTINGS = [
    "student.width=16",
    "student.backbone={layers: 2, mixtures: 2, heads: 2}",
    "student.expert_hidden=16",
    "student.history=8",
    "student.top_k=2",
]


def steps(device: torch.device, small: bool, peak: float) -> list[dict[str, Any]]:
    """A row for each student. Windows are answered at their newest position alone, as in training, so that the last
    mixture, of two in the large students, serves one token of each window, and the first one all of them. Where old
    parts are frozen, what they make of the windows is known, and not part of the step.
    """
    rows = []
    large, windows = (SMALL_SETTINGS, 8) if small else (LARGE_SETTINGS, 512)
    cases: list[tuple[str, list[str], int, int, bool]] = [
        (DEFAULT, ["student.top_k=2"], 25, 16 if small else 256, False),
        (DEFAULT + ", 8,192 windows", ["student.top_k=2"], 25, 16 if small else 8192, False),
        (FROZEN, ["student.top_k=2"], 25, 16 if small else 256, True),
        (LARGE, large, 64, windows, False),
        (DENSE, large, 1, windows, False),
    ]
    for name, settings, experts, count, frozen in cases:
        words = [*settings, "distill.precision=bfloat16"]
        try:
            found = measured(words, experts, count, device, frozen, name == DENSE, small)
        except torch.OutOfMemoryError:
            rows.append({"case": name, "windows": count, "out_of_memory": True})
            continue
        found["share_of_peak"] = found["operations_per_second"] / peak
        rows.append({"case": name, "windows": count} | found)
    return rows


def measured(
    settings: list[str], experts: int, windows: int, device: torch.device, frozen: bool, dense: bool, small: bool
) -> dict[str, Any]:
    """What is told of a student and its step. Raises torch.OutOfMemoryError."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    student, engine, step = stage_step(settings, experts, windows, device, frozen, dense)
    done, spent = operations(step), seconds(step, device, small)
    engine.close()
    found = {
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "active_parameters": active_parameters(student),
        "step_ms": 1000.0 * spent,
        "windows_per_second": windows / spent,
        "tokens_per_second": windows * student.shape.history / spent,
        "operations_per_step": done,
        "operations_per_second": done / spent,
    }
    if device.type == "cuda":
        found["peak_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return found


def active_parameters(student: Student) -> int:
    """The parameters that serve a token: all but those of experts that it did not choose."""
    total = sum(parameter.numel() for parameter in student.parameters())
    experts = sum(parameter.numel() for _, parameter in student.expert_parameters())
    count, chosen = sum(map(len, student.experts_by_stage)), student.shape.top_k
    return total - experts + (experts * min(chosen, count) // count if chosen else experts)


def stage_step(
    settings: list[str], experts: int, windows: int, device: torch.device, frozen: bool, dense: bool
) -> tuple[Student, PhaseEngine, Callable[[], object]]:
    """(the student, its engine, one step of its training)."""
    config = load_config(None, settings)
    shape, method = StudentShape.from_settings(config.student, **DIMENSIONS), method_of(config)
    known = None
    draw = torch.Generator().manual_seed(0)
    observations = torch.randn(windows, shape.history, 39, generator=draw)
    told = torch.randn(windows, 32, generator=draw)
    valid = torch.arange(shape.history).expand(windows, -1) == shape.history - 1
    inputs = [part.to(device) for part in (observations, told, valid)]
    if frozen:
        old = list(range(experts * 4 // 5))
        past = Student(shape, [old], seed=1, executor="stacked", for_training=False).requires_grad_(False)
        born = list(range(len(old), experts))
        student = grown(past.state_dict(), shape, [old], born, seed=1).to(device)
        method.freeze(student, Phase(1, 1, False, True, False, False), born)
        known = past.to(device).precompute(*inputs)[0]
    else:
        student = Student(shape, [list(range(experts))], seed=1).to(device)
    if dense:
        for mixture in student.mixtures:
            widen(mixture.experts, config.student.top_k)  # type: ignore[arg-type]
    engine = PhaseEngine(student, config.distill, 10_000, method)
    target = (torch.rand(windows, shape.history, 4, generator=draw) - 0.5).to(device)
    flags = torch.arange(windows, device=device) < windows // 2
    override, new = flags if frozen else None, windows // 2
    batch = Batch(inputs[0], target, inputs[2], inputs[1], flags, override, windows, new, [], known)
    numbers = iter(range(10_000_000))

    def step() -> None:
        loss, _, _, gate, share = batch_loss(engine, batch, config.distill.load_balancing_coefficient)
        extra = method.extra_loss(student, batch, gate, share) if frozen else None
        engine.step(loss if extra is None else loss + extra, min(next(numbers), 9_999))

    return student, engine, step


class Several(nn.Module):
    """The sum of what several experts say of every token: the arithmetic of a top-k mixture without a choice."""

    def __init__(self, experts: list[Expert]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, tokens: Tensor) -> Tensor:
        first, *others = self.experts
        total: Tensor = first(tokens)
        for expert in others:
            total = total + expert(tokens)
        return total


def widen(experts: nn.ModuleDict, count: int) -> None:
    """Let the only expert be `count` of them."""
    ((name, only),) = experts.items()
    first: Any = only
    device = next(only.parameters()).device
    sizes = first.first.in_features, first.first.out_features, first.last.out_features
    made = [Expert(*sizes, torch.Generator().manual_seed(number)).to(device) for number in range(count)]
    several = Several(made)
    for parameter in several.parameters():
        vars(parameter).update(vars(first.first.weight))  # what DeepSpeed knows an expert's parameters by
    experts[name] = several
