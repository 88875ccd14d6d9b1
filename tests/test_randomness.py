"""Keys of random numbers: no two purposes share one, and none is a shorter one filled up with zeros."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest
import torch

from hpc_cpd.randomness import numpy_generator, torch_generator

PACKAGE = Path(__file__).parents[1] / "hpc_cpd"


@pytest.mark.parametrize("other", [("batch", 1, 2, 0), ("batch", 2, 1), ("batch", 1), ("task embedding", 1, 2)])
def test_another_purpose_or_other_indices_are_another_key(other: tuple[str, int]) -> None:
    one, two = numpy_generator(3, "batch", 1, 2), numpy_generator(3, *other)
    assert one.integers(2**62, size=4).tolist() != two.integers(2**62, size=4).tolist()
    tensors = [torch.rand(4, generator=torch_generator(3, *key)) for key in (("batch", 1, 2), other)]
    assert not torch.equal(*tensors)


def test_the_same_key_gives_the_same_numbers_whatever_was_drawn_before() -> None:
    torch.rand(3)
    first = torch.rand(4, generator=torch_generator(0, "gate", 1))
    torch.rand(3)
    assert torch.equal(first, torch.rand(4, generator=torch_generator(0, "gate", 1)))


def test_every_purpose_stands_at_one_place_in_the_package() -> None:
    purposes: Counter[str] = Counter()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Call) and called in ("numpy_generator", "torch_generator"):
                purposes[ast.unparse(node.args[1])] += 1
    assert len(purposes) >= 7 and set(purposes.values()) == {1}
