"""Errors of clipped actions."""

import torch

from hpc_cpd.losses import bounded_errors


def test_nothing_is_asked_beyond_the_bounds_of_an_action() -> None:
    means = torch.tensor([1.7, 0.5, -3.0, 0.5, -0.2, 1.7])
    targets = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.3, 0.3])
    expected = torch.tensor([0.0, -0.5, 0.0, 1.5, -0.5, 1.4])
    assert torch.allclose(bounded_errors(means, targets), expected)
