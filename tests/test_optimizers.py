"""Our Adam and AdamW are torch's, to the last bit, and leave torch's compiler where it is."""

import subprocess
import sys

import pytest
import torch

from hpc_cpd import optimizers

WORDS = {"Adam": {"eps": 1e-5, "fused": True}, "AdamW": {"weight_decay": 0.1, "foreach": True}}


def learnt(kind: type[torch.optim.Optimizer], **words: object) -> list[torch.Tensor]:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))
    optimizer = kind([{"params": list(network.parameters()), "lr": 1e-2}], **words)  # type: ignore[call-arg]
    for _ in range(20):
        optimizer.zero_grad(set_to_none=True)
        network(torch.randn(16, 8)).square().sum().backward()
        optimizer.step()
    return [parameter.detach() for parameter in network.parameters()]


@pytest.mark.parametrize("name", WORDS)
def test_they_learn_the_same_bits_as_torchs(name: str) -> None:
    ours, theirs = (learnt(getattr(module, name), **WORDS[name]) for module in (optimizers, torch.optim))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_a_process_that_learns_does_not_import_torchs_compiler() -> None:
    script = f"""
import sys
from hpc_cpd import optimizers
from tests.test_optimizers import learnt
for name, words in {WORDS}.items():
    learnt(getattr(optimizers, name), **words)
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
