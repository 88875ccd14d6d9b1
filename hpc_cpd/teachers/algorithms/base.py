"""What a teacher algorithm must offer, and what it is given.

An algorithm is found by its name, like every plug-in (`hpc_cpd.plugins`). Its settings are checked on machines without
torch, so a built-in one imports torch only inside `learner` and `load_policy`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from hpc_cpd.errors import UserError
from hpc_cpd.settings import PluginSettings
from hpc_cpd.tasks.families.base import TaskSpec
from hpc_cpd.tasks.policy import Policy

if TYPE_CHECKING:
    from torch import Tensor

    from hpc_cpd.distributed.mpi import Communicator


@dataclass(frozen=True)
class Hints:
    """What the start of a teacher advises the algorithm, which may use or ignore each of these."""

    initial_log_std: float = 0.0
    """of a Gaussian policy's exploration noise"""
    activation: str = "tanh"
    """of the hidden layers: tanh or relu"""
    policy_learning_rate: float | None = None
    """of a policy that can do something already; None: the algorithm's own"""
    critic_only_rounds: int = 0
    """so many rounds fit the critic alone, because the policy is ahead of it"""
    freeze_normaliser: bool = False
    """the statistics of the observations stay as the start left them"""
    smallest_std: float = 1e-3
    """observations that vary less are divided by this, not by their standard deviation"""
    desired_kl: float | None = None
    """the learning rate follows this divergence per round; None: it stays as it is"""


@dataclass(frozen=True)
class TeacherContext:
    """The task that one teacher learns, the seed of the run, and the ranks that share the work."""

    task: TaskSpec
    seed: int
    communicator: Communicator


class TrainablePolicy(Policy, Protocol):
    """The policy that is trained, evaluated and published."""

    task_id: str

    def description(self) -> dict[str, Any]:
        """What `Algorithm.load_policy` needs besides the tensors; plain JSON values."""

    def tensors(self) -> dict[str, Tensor]:
        """A copy of every tensor that decides how it acts, and of what training goes on with."""

    def set_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave."""


class RoundResult(NamedTuple):
    """What a round cost, over all ranks, and what was measured.

    `numbers` go into metrics.jsonl; ``success`` (a rate) and ``mean_return`` are also shown. The same on every rank.
    """

    environment_steps: int
    numbers: dict[str, float]


class Learner(Protocol):
    """The training of one teacher, on every rank alike: all methods are called on all ranks together.

    Every draw must be a pure function of the seed, the task, what it is for and the number of the round
    (`hpc_cpd.teachers.rollouts.generator`): then a training that was killed goes on to the same bits.
    """

    @property
    def policy(self) -> TrainablePolicy:
        """What it trains."""

    rounds: int
    """How many rounds there are at most; 0 publishes the policy as the start left it."""

    def collect(self, number: int) -> Any:
        """Gather the experience of round `number`, counted from 0."""

    def update(self, number: int, experience: Any) -> RoundResult:
        """Learn from what `collect` returned."""

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint must hold besides the policy's tensors: tensors by name, and plain JSON values."""

    def load_state_dict(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; the policy has its tensors already."""

    def close(self) -> None:
        """Free the environments; no round follows."""


class Algorithm(Protocol):
    """The plug-in."""

    Settings: type[PluginSettings]
    can_clone: bool
    """Whether its policy can start as a clone of demonstrations: a module with `actor`, `action_mean(observations)` and
    `set_normaliser(mean, var, count)`, as `hpc_cpd.teachers.policy.TeacherPolicy` has them."""

    def check(self, settings: Any, task: TaskSpec, ranks: int) -> None:
        """Raise UserError when `task` cannot be learnt with these `settings` on so many ranks. Imports no torch."""

    def learner(self, settings: Any, hints: Hints, context: TeacherContext) -> Learner:
        """Build the policy, with weights drawn from the seed, and what trains it."""

    def load_policy(self, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Policy:
        """The published policy, from its `description` (with the key ``task_id`` too) and its tensors.

        Raises KeyError, TypeError, ValueError or RuntimeError when they do not fit.
        """


def require_one_each(key: str, value: int, ranks: int) -> None:
    """Raise UserError when the setting `key` has a `value` that cannot give each of `ranks` at least one."""
    if value < ranks:
        raise UserError(f"{key} is {value}, but there are {ranks} ranks; give each at least one")
