"""A teacher: two small networks behind a frozen or running observation normaliser, and its folder on disk."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from hpc_cpd import plugins
from hpc_cpd.errors import UserError
from hpc_cpd.layers import empty_linear
from hpc_cpd.run.publish import is_done, read_json, sha256, write_bytes, write_json
from hpc_cpd.teachers.algorithms.base import TrainablePolicy
from hpc_cpd.teachers.sources.student import STUDENT_FOLDER
from hpc_cpd.teachers.sources.zoo import zoo_folder

SCHEMA_VERSIONS = (1, 2)
"""Version 1 is always PPO's; version 2 names the algorithm whose policy it is."""
WEIGHTS = "policy.safetensors"
DESCRIPTION = "policy.json"
ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}
_DESCRIBED = ("observation_size", "action_size", "hidden", "activation", "smallest_std")
"""What a policy is made with, besides its task; smallest_std is new since the first teachers of the zoo."""
ZOO_PREFIX = "zoo:"
_REMEDY = "delete the folder and run 'python -m hpc_cpd.launch --stage teachers' again"


class TeacherPolicy(nn.Module):
    """Gaussian policy with a state-independent standard deviation, and a critic of its own.

    `normaliser_mean`, `normaliser_var` are float64 [obs], `normaliser_count` float64 []: they belong to the
    policy, because a policy without its normaliser is another policy.
    """

    normaliser_mean: Tensor
    normaliser_var: Tensor
    normaliser_count: Tensor

    def __init__(
        self,
        task_id: str,
        observation_size: int,
        action_size: int,
        hidden: Sequence[int] = (256, 256),
        activation: str = "tanh",
        log_std: float = 0.0,
        rng: np.random.Generator | None = None,
        smallest_std: float = 1e-3,
    ) -> None:
        """Orthogonal weights drawn from `rng` (None: a fixed seed); `activation` is a key of ACTIVATIONS.

        `smallest_std`: of a coordinate that varies less, the normaliser takes this for its standard deviation. One
        that never moved must not be blown up by its rounding noise.
        """
        super().__init__()
        self.task_id, self.observation_size, self.action_size = task_id, observation_size, action_size
        self.hidden, self.activation, self.smallest_std = tuple(hidden), activation, smallest_std
        drawn = torch.Generator().manual_seed(int((rng or np.random.default_rng(0)).integers(2**62)))
        self.provenance: dict[str, Any] = {}
        """Where a loaded teacher comes from."""
        self.has_critic = True
        self.actor = _network([observation_size, *hidden, action_size], activation, 0.01, drawn)
        self.critic = _network([observation_size, *hidden, 1], activation, 1.0, drawn)
        self.log_std = nn.Parameter(torch.full((action_size,), float(log_std)))
        self.set_normaliser(np.zeros(observation_size), np.ones(observation_size), 0)

    def set_normaliser(self, mean: NDArray[np.float64], var: NDArray[np.float64], count: float) -> None:
        """Replace the statistics: `mean`, `var` float64 [obs], `count` samples."""
        for name, value in (("mean", mean), ("var", var), ("count", count)):
            self.register_buffer(f"normaliser_{name}", torch.tensor(value, dtype=torch.float64))
        self._cache_normaliser()

    @classmethod
    def from_description(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TeacherPolicy:
        """The policy that `description` and `tensors` were taken from. Raises KeyError, TypeError or RuntimeError."""
        policy = cls(description["task_id"], **{name: description[name] for name in _DESCRIBED if name in description})
        policy.has_critic = description.get("critic", True)
        policy.set_tensors(tensors)
        return policy.eval()

    def description(self) -> dict[str, Any]:
        return {**{name: getattr(self, name) for name in _DESCRIBED}, "critic": self.has_critic}

    def set_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over every weight and statistic (the names of `state_dict`)."""
        absent = {} if self.has_critic else {f"critic.{name}": x for name, x in self.critic.state_dict().items()}
        self.load_state_dict({**absent, **tensors})
        self._cache_normaliser()

    def tensors(self) -> dict[str, Tensor]:
        """A copy of every weight and statistic; without the critic where it was stored without."""
        held = self.state_dict().items()
        return {name: x.detach().clone() for name, x in held if self.has_critic or not name.startswith("critic.")}

    def normalise(self, observations: Tensor) -> Tensor:
        """float32 [..., obs] -> float32 [..., obs], zero mean and unit variance at most, limited to +-10."""
        return ((observations - self._shift) * self._scale).clamp(-10.0, 10.0)

    def action_mean(self, observations: Tensor) -> Tensor:
        """float32 [..., obs] -> float32 [..., act]; not clipped."""
        mean: Tensor = self.actor(self.normalise(observations))
        return mean

    def value(self, observations: Tensor) -> Tensor:
        """float32 [..., obs] -> float32 [...]: the expected discounted, scaled return.

        Raises RuntimeError for a teacher of the zoo, which was stored without its critic.
        """
        if not self.has_critic:
            raise RuntimeError(f"this teacher of {self.task_id} was stored without its critic")
        value: Tensor = self.critic(self.normalise(observations))
        return value.squeeze(-1)

    def log_prob(self, mean: Tensor, actions: Tensor) -> Tensor:
        """Log density of `actions` [..., act] under the Gaussian around `mean` -> float32 [...]."""
        scaled = (actions - mean) * torch.exp(-self.log_std)
        return (-0.5 * scaled.square() - self.log_std - 0.5 * math.log(2.0 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        """Entropy of the Gaussian, in nats."""
        return (self.log_std + 0.5 * math.log(2.0 * math.pi * math.e)).sum()

    def reset(self, task_id: str | None = None, num_envs: int = 1) -> None:
        """Begin new episodes. A teacher keeps no history, and knows one task. Raises UserError for another."""
        if task_id is not None and task_id != self.task_id:
            raise UserError(f"this teacher knows {self.task_id}, not {task_id}; load the teacher of {task_id}")

    @torch.inference_mode()
    def act(self, observations: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 [num_envs, obs] -> float32 [num_envs, act]: the mean action, clipped to [-1, 1]."""
        mean = self.action_mean(torch.tensor(observations, dtype=torch.float32)).clamp_(-1.0, 1.0)
        actions: NDArray[np.float32] = mean.numpy()
        return actions

    def _cache_normaliser(self) -> None:
        self._shift = self.normaliser_mean.to(torch.float32)
        self._scale = (self.normaliser_var.clamp_min(self.smallest_std**2)).rsqrt().to(torch.float32)


def save_teacher(
    folder: Path, policy: TrainablePolicy, provenance: Mapping[str, Any], algorithm: str = "ppo", small: bool = False
) -> None:
    """Write policy.safetensors, then policy.json (`algorithm`, description, `provenance`, the weights' SHA-256).

    `small`: without the critic, weights in float16 (the statistics of the normaliser stay float64).
    """
    description, tensors = policy.description(), policy.tensors()
    if small:
        description["critic"] = False
        acting = {name: x for name, x in tensors.items() if not name.startswith("critic.")}
        tensors = {name: x.half() if x.dtype == torch.float32 else x for name, x in acting.items()}
    write_bytes(folder / WEIGHTS, save(tensors))
    about = {"schema_version": SCHEMA_VERSIONS[-1], "algorithm": algorithm, "task_id": policy.task_id}
    digest = {"sha256": sha256(folder / WEIGHTS), "provenance": dict(provenance)}
    write_json(folder / DESCRIPTION, {**about, **description, **digest})


def load_teacher(folder: str | Path) -> Any:
    """Load a published teacher folder (such as runs/NAME/teachers/metaworld/reach-v3), or ``zoo:metaworld/reach-v3``.

    The policy (`hpc_cpd.tasks.policy.Policy`) is of the class of the algorithm that trained it, of PPO a
    `TeacherPolicy`, and has the attributes `task_id` and `provenance`.

    Raises UserError: not published, not in the zoo, of an algorithm that is not installed, another schema, or damaged.
    """
    named = str(folder)
    folder = zoo_folder(named.removeprefix(ZOO_PREFIX)) if named.startswith(ZOO_PREFIX) else Path(folder)
    if not is_done(folder):
        raise UserError(
            f"{folder} holds no published teacher (no DONE file); run 'python -m hpc_cpd.launch --stage teachers' first"
        )
    if (folder / STUDENT_FOLDER).is_dir():
        raise UserError(f"the teacher in {folder} is a student; load it with load_student({folder / STUDENT_FOLDER})")
    description = read_json(folder / DESCRIPTION)
    version = description.get("schema_version") if isinstance(description, dict) else None
    if version not in SCHEMA_VERSIONS:
        raise UserError(
            f"{folder / DESCRIPTION} has schema_version {version}, but this version reads 1 and 2; {_REMEDY}"
        )
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise UserError(f"{weights} is missing; {_REMEDY}")
    if sha256(weights) != description.get("sha256"):
        raise UserError(f"{weights} is damaged (its SHA-256 is not the one in {DESCRIPTION}); {_REMEDY}")
    try:
        algorithm = plugins.load("algorithms", description.get("algorithm", "ppo"))
    except UserError as error:
        raise UserError(f"{folder / DESCRIPTION}: {error}; install the package that brings it") from None
    try:
        policy: Any = algorithm.load_policy(description, load_file(weights))
        policy.provenance = dict(description["provenance"])
    except (KeyError, TypeError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} is no teacher of schema {version} ({error}); {_REMEDY}") from None
    return policy


def _network(sizes: Sequence[int], activation: str, output_gain: float, drawn: torch.Generator) -> nn.Sequential:
    """A perceptron with layers of `sizes`, inputs and outputs included: orthogonal weights and zero biases."""
    hidden_gain = 5.0 / 3.0 if activation == "tanh" else math.sqrt(2.0)  # keeps the variance of what passes through
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(itertools.pairwise(sizes), start=2):
        layer = empty_linear(inputs, outputs)
        nn.init.orthogonal_(layer.weight, output_gain if number == len(sizes) else hidden_gain, generator=drawn)
        nn.init.zeros_(layer.bias)
        layers += [layer, ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])
