"""Which task is this? What a student that is not told can know of it.

Three kinds of evidence: how the episode began, what it has looked like since (the contrastive encoder), and how long
it has lasted. The first is the surest, as nothing that the student does has touched it. The last tells apart what
begins alike, such as reach and pick-place: an episode that goes on when most of a task's have ended is of another task,
or the student has failed at it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hpc_cpd.student.task_encoder import TaskEncoder
from hpc_cpd.student.tokenizers.base import OBSERVATION_CLIP

if TYPE_CHECKING:
    from hpc_cpd.student.embeddings.contrastive import ContrastiveSettings
    from hpc_cpd.student.policy import StudentParts

MOST = 0.9
"""Share of a task's episodes that end within its `steps`."""
LEAST_DEVIATION = 0.1
"""Of a number in the first observation, in the normaliser's units: what never varied in training may a little."""
ENCODER_TEMPERATURE = 0.1
PLAUSIBLE = 30.0
"""A task whose likelihood is further below the best one's, in nats, is not worth a try."""


@dataclass(frozen=True)
class EpisodeStatistics:
    """What the recorded episodes of a task are like."""

    steps: int  # most of them end within so many
    start: np.ndarray  # float32 [2, obs]: mean and standard deviation of the first observation, as recorded

    @staticmethod
    def of(lengths: list[int], first_observations: np.ndarray) -> EpisodeStatistics:
        """From the steps of each episode, and float32 [episodes, obs]."""
        seen = first_observations.astype(np.float64)
        start = np.stack([seen.mean(axis=0), seen.std(axis=0)]).astype(np.float32)
        return EpisodeStatistics(int(np.quantile(lengths, MOST)), start)


class TaskInference:
    """Keeps the evidence of the episode in each environment."""

    def __init__(self, settings: ContrastiveSettings, parts: StudentParts, device: torch.device) -> None:
        """For a student of these `parts`, whose task encoder has these `settings`."""
        self._device = device
        self._mean, self._deviation = (torch.tensor(numbers, device=device) for numbers in parts.normaliser())
        self.encoder = TaskEncoder(len(self._mean), settings)
        self.encoder.load_state_dict(parts.task_embedding_state)
        self.encoder.to(device).eval().requires_grad_(False)
        self.known = torch.tensor(np.stack(list(parts.task_vectors.values())), device=device)
        statistics = [parts.episode_statistics[task] for task in parts.task_vectors]
        starts = torch.tensor(np.stack([task.start for task in statistics]), device=device)
        self._start_mean = (starts[:, 0] - self._mean) / self._deviation
        self._start_deviation = (starts[:, 1] / self._deviation).clamp_min(LEAST_DEVIATION)
        self._steps = torch.tensor([task.steps for task in statistics], device=device)

    def begin(self, rows: int) -> None:
        """Forget everything; `rows` environments begin an episode each."""
        tasks, size = self.known.shape
        self._window = torch.zeros(rows, self.encoder.window, len(self._mean), device=self._device)
        self._encodings = torch.zeros(rows, size, device=self._device)
        self._start = torch.zeros(rows, tasks, device=self._device)
        # steps that each task was thought to be on
        self._spent = torch.zeros(rows, tasks, dtype=torch.int64, device=self._device)

    def vectors(self, seen: Tensor, ages: Tensor) -> Tensor:
        """The vector of the likeliest task, float32 [rows, D], with the newest observations `seen` float32 [rows, obs].

        `ages` int64 [rows]: how many observations of its episode each row had before.
        """
        remember(self._window, seen, ages)
        first = ages == 0
        self._encodings[first], self._spent[first] = 0.0, 0
        if first.any():
            self._start[first] = self._start_likelihood(self._normalised(seen[first]))
        self._encodings += self.encoder(self._normalised(self._window))
        looks = self._encodings @ self.known.T / (ages + 1)[:, None] / ENCODER_TEMPERATURE
        evidence = self._start + looks
        plausible = evidence >= evidence.amax(dim=1, keepdim=True) - PLAUSIBLE
        over = self._spent >= self._steps
        self._spent[(over | ~plausible).all(dim=1)] = 0  # what is plausible has been tried: it is tried again
        likeliest = evidence.masked_fill(self._spent >= self._steps, -math.inf).argmax(dim=1)
        self._spent[torch.arange(len(seen), device=self._device), likeliest] += 1
        return self.known[likeliest]

    def _start_likelihood(self, normalised: Tensor) -> Tensor:
        """Logarithm of the density of first observations [n, obs] under each task's normal distribution, [n, tasks]."""
        apart = (normalised[:, None] - self._start_mean) / self._start_deviation
        return -0.5 * apart.square().sum(dim=2) - self._start_deviation.log().sum(dim=1)

    def _normalised(self, observations: Tensor) -> Tensor:
        normalised = (observations - self._mean) / self._deviation
        return normalised.clamp(-OBSERVATION_CLIP, OBSERVATION_CLIP)


def remember(buffer: Tensor, seen: Tensor, ages: Tensor) -> None:
    """Put `seen` behind what each row of `buffer` [rows, length, obs] holds, oldest first out.

    The rest of a row repeats it, as in training.
    """
    length = buffer.shape[1]
    full = ages >= length
    buffer[full, :-1] = buffer[full, 1:].clone()
    behind = torch.arange(length, device=ages.device) >= ages.clamp(max=length - 1)[:, None]
    buffer.copy_(torch.where(behind[:, :, None], seen[:, None], buffer))
