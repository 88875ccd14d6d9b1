"""The task encoder: a few observations in, a unit vector out; windows of one task lie together.

Contrastive (InfoNCE, arXiv 1807.03748): two windows of one task are a positive pair, windows of other tasks are the
negatives. A task's vector is fixed once and for all in the stage that brings the task; later stages pull the windows
of old tasks to the stored vectors and keep new tasks away from them.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_cpd.layers import seeded_linear
from hpc_cpd.optimizers import Adam
from hpc_cpd.randomness import numpy_generator, torch_generator
from hpc_cpd.student.embeddings.base import NewTasks
from hpc_cpd.student.embeddings.contrastive import ContrastiveSettings
from hpc_cpd.student.tokenizers.base import OBSERVATION_CLIP

POOL_WINDOWS = 1024
"""Windows drawn once per task; the steps sample from them, and their mean encoding is the task's vector."""
MOST_REMEMBERED = 64
"""Old tasks that a stage rehearses, drawn where there are more: no stage needs more time and memory than that takes."""


class TaskEncoder(nn.Module):
    """Normalised observations float32 [B, window, obs] -> unit vectors float32 [B, size]."""

    def __init__(self, observation_size: int, settings: ContrastiveSettings, seed: int = 0) -> None:
        super().__init__()
        self.window = settings.window
        generator = torch_generator(seed, "task encoder")
        self.first = seeded_linear(settings.window * observation_size, settings.width, generator)
        self.second = seeded_linear(settings.width, settings.width, generator)
        self.last = seeded_linear(settings.width, settings.size, generator)

    def forward(self, windows: Tensor) -> Tensor:
        """Encode windows."""
        hidden = F.gelu(self.second(F.gelu(self.first(windows.flatten(1)))))
        return F.normalize(self.last(hidden), dim=1)


def info_nce(first: Tensor, second: Tensor, task_index: Tensor, stored: Tensor, temperature: float) -> Tensor:
    """Contrastive loss of pairs of unit vectors, float [B, D] each; `task_index` int64 [B].

    Row i of `second` is the positive of row i of `first`. Other windows of the same task are no negatives: they are
    left out of the softmax. The `stored` vectors of old tasks, float [old, D], are further negatives.
    """
    logits = first @ torch.cat([second, stored]).T / temperature
    same = task_index[:, None] == F.pad(task_index, (0, len(stored)), value=-1)
    same.fill_diagonal_(False)
    return F.cross_entropy(logits.masked_fill(same, -torch.inf), torch.arange(len(first)))


def learn_task_vectors(settings: ContrastiveSettings, new: NewTasks) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """Train the encoder for one stage and give every new task its vector.

    Returns (encoder state, float32 [size] unit vector of each new task). A pure function of its arguments.
    """
    rng = numpy_generator(new.seed, "task embedding", new.stage)
    new_tasks, old_tasks, remembered = new.tasks, list(new.old_vectors), list(new.remembered)
    if len(remembered) > MOST_REMEMBERED:
        remembered = [remembered[n] for n in sorted(rng.permutation(len(remembered))[:MOST_REMEMBERED])]
    pools = {task: _pool(new, task, settings.window, rng) for task in [*new_tasks, *remembered]}
    encoder = TaskEncoder(next(iter(pools.values())).shape[2], settings, new.seed)
    if new.state:
        encoder.load_state_dict(dict(new.state))
    stored = torch.tensor(np.array(list(new.old_vectors.values()), np.float32)).view(-1, settings.size)
    optimizer = Adam(encoder.parameters(), lr=settings.learning_rate)
    places = torch.tensor([old_tasks.index(task) for task in remembered], dtype=torch.int64)
    per_task = settings.windows_per_task
    new_index = torch.arange(len(new_tasks)).repeat_interleave(per_task)
    for _ in range(settings.gradient_steps):
        drawn = {task: _augmented(_sample(pool, 2 * per_task, rng), rng) for task, pool in pools.items()}
        encoded = encoder(torch.cat(list(drawn.values()))).view(len(pools), 2, per_task, -1)
        ours = encoded[: len(new_tasks)]
        first, second = ours[:, 0].flatten(0, 1), ours[:, 1].flatten(0, 1)
        loss = info_nce(first, second, new_index, stored, settings.temperature)
        if remembered:
            loss = loss + _pull(encoded[len(new_tasks) :], ours, stored, places, settings.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    encoder.requires_grad_(False)
    vectors = {}
    for task in new_tasks:
        encoded = encoder(torch.cat([pools[task], _augmented(pools[task], rng)]))
        vectors[task] = F.normalize(encoded.double().mean(dim=0), dim=0).float().numpy()
    return {name: tensor.detach().clone() for name, tensor in encoder.state_dict().items()}, vectors


def _pull(old: Tensor, new: Tensor, stored: Tensor, places: Tensor, temperature: float) -> Tensor:
    """Windows of remembered tasks [tasks, 2, n, D] towards their vectors, away from the others and the new tasks.

    `places` int64 [tasks]: which of the `stored` vectors belongs to each.
    """
    centres = F.normalize(new.flatten(1, 2).mean(dim=1), dim=1)
    logits = old.flatten(1, 2) @ torch.cat([stored, centres]).T / temperature
    target = places.repeat_interleave(logits.shape[1])
    distance = 1.0 - (old.flatten(1, 2) * stored[places][:, None]).sum(dim=2)
    return F.cross_entropy(logits.flatten(0, 1), target) + distance.mean() / temperature


def _pool(new: NewTasks, task: str, window: int, rng: np.random.Generator) -> Tensor:
    drawn = new.windows_of(task, POOL_WINDOWS, window, rng)
    windows = (torch.tensor(drawn) - torch.tensor(new.mean)) / torch.tensor(new.std)
    return windows.clamp(-OBSERVATION_CLIP, OBSERVATION_CLIP).float()


def _sample(pool: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    return pool[torch.tensor(rng.integers(len(pool), size=count))]


def _augmented(windows: Tensor, rng: np.random.Generator) -> Tensor:
    """Half of the windows [n, window, obs] cut after a random observation, which is repeated to the end.

    So looks the history of an episode that has just begun, when the task has to be inferred.
    """
    length = windows.shape[1]
    last = np.where(rng.random(len(windows)) < 0.5, rng.integers(length, size=len(windows)), length - 1)
    steps = np.minimum(np.arange(length), last[:, None])
    return windows.gather(1, torch.tensor(steps)[:, :, None].expand(-1, -1, windows.shape[2]))
