"""A teacher: two small networks behind a frozen or running observation normaliser, and its folder on disk."""

from __future__ import annotations

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

from hpc_cpd.errors import UserError
from hpc_cpd.layers import empty_linear
from hpc_cpd.run.publish import is_done, read_json, sha256, write_bytes, write_json

SCHEMA_VERSION = 1
WEIGHTS = "policy.safetensors"
DESCRIPTION = "policy.json"
STUDENT_FOLDER = "student"
"""A teacher that is a student (`joint.py`) has it instead of the two files above."""
ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}
_NORMALISED_LIMIT = 10.0
SMALLEST_STD = 1e-3
"""A coordinate that never moved must not be blown up by its rounding noise."""
ZOO = Path(__file__).parents[1] / "zoo"
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
        smallest_std: float = SMALLEST_STD,
    ) -> None:
        """Orthogonal weights drawn from `rng` (None: a fixed seed); `activation` is a key of ACTIVATIONS.

        `smallest_std`: of a coordinate that varies less, the normaliser takes this for its standard deviation.
        """
        super().__init__()
        self.task_id = task_id
        self.observation_size = observation_size
        self.action_size = action_size
        self.hidden = tuple(hidden)
        self.activation = activation
        self.smallest_std = smallest_std
        drawn = torch.Generator().manual_seed(int((rng or np.random.default_rng(0)).integers(2**62)))
        self.provenance: dict[str, Any] = {}
        """Where a loaded teacher comes from."""
        self.has_critic = True
        self.actor = _network(observation_size, self.hidden, action_size, activation, 0.01, drawn)
        self.critic = _network(observation_size, self.hidden, 1, activation, 1.0, drawn)
        self.log_std = nn.Parameter(torch.full((action_size,), float(log_std)))
        self.register_buffer("normaliser_mean", torch.zeros(observation_size, dtype=torch.float64))
        self.register_buffer("normaliser_var", torch.ones(observation_size, dtype=torch.float64))
        self.register_buffer("normaliser_count", torch.zeros((), dtype=torch.float64))
        self._shift = torch.zeros(observation_size)
        self._scale = torch.ones(observation_size)

    def set_normaliser(self, mean: NDArray[np.float64], var: NDArray[np.float64], count: float) -> None:
        """Replace the statistics: `mean`, `var` float64 [obs], `count` samples."""
        self.normaliser_mean = torch.tensor(mean, dtype=torch.float64)
        self.normaliser_var = torch.tensor(var, dtype=torch.float64)
        self.normaliser_count = torch.tensor(count, dtype=torch.float64)
        self._cache_normaliser()

    def set_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over every weight and statistic (the names of `state_dict`)."""
        self.load_state_dict(dict(tensors))
        self._cache_normaliser()

    def tensors(self) -> dict[str, Tensor]:
        """A copy of every weight and statistic."""
        return {name: value.detach().clone() for name, value in self.state_dict().items()}

    def normalise(self, observations: Tensor) -> Tensor:
        """float32 [..., obs] -> float32 [..., obs], zero mean and unit variance at most, limited to +-10."""
        return ((observations - self._shift) * self._scale).clamp(-_NORMALISED_LIMIT, _NORMALISED_LIMIT)

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


def save_teacher(folder: Path, policy: TeacherPolicy, provenance: Mapping[str, Any], small: bool = False) -> None:
    """Write policy.safetensors, then policy.json (sizes, `provenance`, the weights' SHA-256).

    `small`: without the critic, weights in float16 (the statistics of the normaliser stay float64).
    """
    tensors, critic = policy.tensors(), policy.has_critic and not small
    if not critic:
        tensors = {name: value for name, value in tensors.items() if not name.startswith("critic.")}
    if small:
        tensors = {name: value.half() if value.dtype == torch.float32 else value for name, value in tensors.items()}
    write_bytes(folder / WEIGHTS, save(tensors))
    description = {
        "schema_version": SCHEMA_VERSION,
        "task_id": policy.task_id,
        "observation_size": policy.observation_size,
        "action_size": policy.action_size,
        "hidden": list(policy.hidden),
        "activation": policy.activation,
        "smallest_std": policy.smallest_std,
        "critic": critic,
        "sha256": sha256(folder / WEIGHTS),
        "provenance": dict(provenance),
    }
    write_json(folder / DESCRIPTION, description)


def load_teacher(folder: str | Path) -> TeacherPolicy:
    """Load a published teacher folder (such as runs/NAME/teachers/metaworld/reach-v3), or ``zoo:metaworld/reach-v3``.

    Raises UserError: not published, not in the zoo, another schema, or damaged files.
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
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{folder / DESCRIPTION} has schema_version {version}, but this version reads {SCHEMA_VERSION}; {_REMEDY}"
        )
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise UserError(f"{weights} is missing; {_REMEDY}")
    if sha256(weights) != description.get("sha256"):
        raise UserError(f"{weights} is damaged (its SHA-256 is not the one in {DESCRIPTION}); {_REMEDY}")
    try:
        policy = TeacherPolicy(
            description["task_id"],
            description["observation_size"],
            description["action_size"],
            description["hidden"],
            description["activation"],
            smallest_std=description.get("smallest_std", SMALLEST_STD),
        )
        tensors = load_file(weights)
        policy.has_critic = description.get("critic", True)
        if not policy.has_critic:
            tensors |= {f"critic.{name}": value for name, value in policy.critic.state_dict().items()}
        policy.set_tensors(tensors)
        policy.provenance = dict(description["provenance"])
    except (KeyError, TypeError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} is no teacher of schema {SCHEMA_VERSION} ({error}); {_REMEDY}") from None
    return policy.eval()


def zoo_folder(task_id: str) -> Path:
    """The folder of the zoo's teacher of `task_id`. Raises UserError when it has none."""
    folder = ZOO / task_id
    if not is_done(folder):
        known = sorted(str(path.parent.relative_to(ZOO)) for path in ZOO.glob("*/*/DONE"))
        raise UserError(
            f"the zoo has no teacher of {task_id} (it has {', '.join(known) or 'none yet'}); set teachers.source=train"
        )
    return folder


def _network(
    inputs: int,
    hidden: Sequence[int],
    outputs: int,
    activation: str,
    output_gain: float,
    drawn: torch.Generator,
) -> nn.Sequential:
    """A perceptron with orthogonal weights and zero biases."""
    layers: list[nn.Module] = []
    gain = 5.0 / 3.0 if activation == "tanh" else math.sqrt(2.0)  # keeps the variance of what passes through
    for width in hidden:
        layers += [_linear(inputs, width, gain, drawn), ACTIVATIONS[activation]()]
        inputs = width
    return nn.Sequential(*layers, _linear(inputs, outputs, output_gain, drawn))


def _linear(inputs: int, outputs: int, gain: float, drawn: torch.Generator) -> nn.Linear:
    layer = empty_linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain, generator=drawn)
    nn.init.zeros_(layer.bias)
    return layer
