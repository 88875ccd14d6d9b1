"""Our optimizers are torch's to the last bit, our layers too; neither brings in torch's compiler or sympy."""

import subprocess
import sys

import pytest
import torch

from hpc_cpd import optimizers
from hpc_cpd.layers import empty_linear

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


def test_a_layer_is_born_as_torchs_and_moves_no_generator() -> None:
    before = torch.get_rng_state()
    layer, plain = empty_linear(3, 2), torch.nn.utils.skip_init(torch.nn.Linear, 3, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(layer) is type(plain) and repr(layer) == repr(plain)
    for (name, ours), (other, theirs) in zip(layer.named_parameters(), plain.named_parameters(), strict=True):
        assert (name, type(ours), ours.shape, ours.dtype) == (other, type(theirs), theirs.shape, theirs.dtype)
        assert (ours.device, ours.requires_grad) == (theirs.device, theirs.requires_grad)


def test_a_process_that_learns_imports_neither_torchs_compiler_nor_sympy() -> None:
    script = f"""
import sys, torch
from hpc_cpd import optimizers
from hpc_cpd.layers import seeded_linear
from hpc_cpd.randomness import torch_generator
from hpc_cpd.teachers.policy import TeacherPolicy
from tests.test_optimizers import learnt
for name, words in {WORDS}.items():
    learnt(getattr(optimizers, name), **words)
seeded_linear(3, 2, torch_generator(0, "test"))
TeacherPolicy("task", 3, 2, [4])
sys.exit(bool({{"torch._dynamo", "sympy"}} & sys.modules.keys()))
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
