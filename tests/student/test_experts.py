"""Spread experts under DeepSpeed's engine equal the plain mixture, however tokens and experts are distributed."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_cpd.student.moe.mixture import Mixture
from tests.student.ranks import run_ranks
from tests.student.reference import make_batch, make_student, reference_forward, small_shape

TOLERANCE = 1e-6


def cases(world_size: int) -> list[dict[str, Any]]:
    """Sizes of the expert groups x top-k, each with its own distributions of tokens, experts and frozen parts."""
    even = [6] * world_size
    uneven = [9, 2, 4, 1][:world_size]
    empty = [0, 7, 3, 0][:world_size] if world_size > 1 else [7]
    found: list[dict[str, Any]] = []
    sizes = {1: [1], 2: [1, 2], 3: [3], 4: [1, 2, 4]}[world_size]
    most = sizes if world_size < 4 else [4]  # four ranks share two cores
    for size, zero in product(most, (1, 2)):
        base = {"expert_parallel_size": size, "top_k": 1, "experts": [[0, 1, 2, 3, 4]], "shares": uneven, "zero": zero}
        found += [base, {**base, "top_k": 0, "shares": empty}, {**base, "experts": [[0], [1]], "top_k": 2}]
        found += [
            {**base, "frozen": frozen} for frozen in ("shared", "gate+shared", "shared+experts", "shared+gate+even")
        ]
    deep = {"layers": 3, "mixtures": 2, "shared_expert_hidden": 8}
    for size, top_k in product(most, (0, 1, 2)):
        base = {"expert_parallel_size": size, "top_k": top_k, "experts": [[0, 1], [2, 3, 4]], "shape": deep}
        found += [{**base, "shares": uneven, "override": True}, {**base, "shares": empty, "frozen": "gate+shared"}]
        found.append(
            {
                "expert_parallel_size": size,
                "top_k": top_k,
                "experts": [list(range(25))],
                "shares": uneven,
                "override": True,
            }
        )
    for size, top_k in product(sizes, (0, 1, 2) if world_size < 4 else (0, 2)):
        base = {"expert_parallel_size": size, "top_k": top_k, "experts": [[0, 1, 2, 3, 4]], "shares": uneven}
        found += [base, {**base, "shares": even}, {**base, "shares": empty}]
        found.append({**base, "experts": [[0, 1], [2, 3, 4]], "override": True})
        found.append({**base, "experts": [[0]]})  # other ranks hold no expert
        if world_size == 4 and size < 4:
            continue
        if world_size > 1:
            found.append({**base, "invalid_rank": world_size - 1})
        for frozen in ("shared", "gate+shared", "shared+even", "gate+shared+even", "shared+experts", "even"):
            found.append({**base, "experts": [[0, 1], [2, 4]], "frozen": frozen})
        found.append({**base, "experts": [[0, 2, 4]], "shares": empty, "frozen": "shared+gate"})
        found.append({**base, "experts": [[0, 2, 4]], "shares": even, "frozen": "shared"})
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_outputs_and_gradients_equal_the_plain_mixture(world_size: int, tmp_path: Path) -> None:
    tried = cases(world_size)
    results = run_ranks("rank_mixture.py", world_size, tmp_path, {"cases": tried})
    wrong = [(case, result) for case, result in zip(tried, results, strict=True) if max(result.values()) >= TOLERANCE]
    assert len(results) == len(tried)
    assert not wrong, wrong[:3]


@pytest.mark.parametrize("top_k", [0, 1, 2, 7])
def test_one_process_needs_no_distributed_start(top_k: int) -> None:
    shape = small_shape(top_k)
    student = make_student(shape, [[0, 1], [2, 3, 4]], for_training=False)
    observations, tasks, valid, override, _ = make_batch(9, 4, shape)
    actions, balance, gate = student(observations, tasks, valid, override)
    expected, expected_balance = reference_forward(student, observations, tasks, valid, override)
    torch.testing.assert_close(actions[valid], expected[valid], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(balance, expected_balance, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(gate.sum(dim=-1), valid[..., None].float())
    assert not torch.distributed.is_initialized()


def make_mixture(experts: list[list[int]], expert_parallel_size: int, top_k: int, seed: int) -> Mixture:
    return Mixture(small_shape(top_k, width=8, expert_hidden=8), 4, experts, expert_parallel_size, seed)


def test_new_experts_start_at_the_initial_bias_and_old_ones_at_zero() -> None:
    gate = make_mixture([[0, 1], [2, 3]], 1, 0, 0).gate
    assert torch.equal(gate.get_parameter("bias_1"), torch.zeros(2))
    assert torch.equal(gate.get_parameter("bias_2"), torch.full((2,), -5.0))


@pytest.mark.parametrize("top_k", [1, 2])
def test_no_token_is_dropped_when_all_want_one_expert(top_k: int) -> None:
    mixture = make_mixture([[0, 1, 2]], 1, top_k, 0)
    with torch.no_grad():
        mixture.gate.get_parameter("bias_1").copy_(torch.tensor([0.0, 50.0, 0.0]))
    tokens = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    outputs, _, _ = mixture(tokens)
    torch.testing.assert_close(outputs, mixture.experts["1"](tokens), rtol=0, atol=1e-6)


def test_an_overridden_bias_gives_new_experts_tokens_and_only_flagged_ones() -> None:
    mixture = make_mixture([[0, 1], [2, 3]], 1, 1, 0)
    tokens = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    flagged = torch.arange(200) % 2 == 0
    for mask, reached in ((None, False), (flagged, True)):
        mixture.zero_grad()
        outputs, _, _ = mixture(tokens, None, mask)
        outputs.square().sum().backward()
        new = [p.grad for e in "23" for p in mixture.experts[e].parameters()]
        gradient = sum(float(grad.abs().sum()) for grad in new if grad is not None)
        assert (gradient > 0) == reached
    with torch.no_grad():
        overridden, plain = mixture(tokens, None, flagged)[0], mixture(tokens)[0]
    assert torch.equal(overridden[~flagged], plain[~flagged])
    assert not torch.equal(overridden[flagged], plain[flagged])


def test_experts_start_the_same_wherever_they_live() -> None:
    together = make_mixture([[0, 1, 2, 3, 4]], 1, 0, 7)
    spread = make_mixture([[0, 1, 2, 3, 4]], 2, 0, 7)
    assert list(spread.experts) == ["0", "2", "4"]
    for name in spread.experts:
        for one, other in zip(together.experts[name].parameters(), spread.experts[name].parameters(), strict=True):
            assert torch.equal(one, other)
    first, second = together.experts["0"].first.weight, together.experts["1"].first.weight
    assert not torch.equal(first, second)
