"""N environments of one Meta-World task: physics in MuJoCo's own C code on several cores, all else once per batch.

One upstream environment (the template) makes each goal's first state, once; a reset afterwards copies it. The rows own
nothing but their MjData. A goal moves bodies and sites *of the model*, so every thread has a model, into which it
writes the places of the row that it steps.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any, NamedTuple

import mujoco
import numpy as np
from numpy.typing import NDArray

from hpc_cpd.tasks.families.base import Steps
from hpc_cpd.tasks.metaworld.classes import environment_class
from hpc_cpd.tasks.metaworld.program import REWARD_VERSION, rows_class
from hpc_cpd.tasks.metaworld.vector_ops import Mixed, norm

Floats = NDArray[np.float64]
_STATE = mujoco.mjtState.mjSTATE_INTEGRATION
_POINTS_DOWN = (1.0, 0.0, 1.0, 0.0)
_FRAME = 18
"""Numbers of one observed moment: hand, gripper, two objects."""


class Start(NamedTuple):
    """The first state of a goal."""

    state: Floats
    """MuJoCo's, with the solver's warm start, which the next bits depend on"""
    body_places: Floats
    site_places: Floats
    observation: Floats
    """float64 [39]"""
    attributes: dict[str, Any]
    """what upstream's reset left in the environment and its reward reads"""


class MetaWorldBatch:
    """See :class:`hpc_cpd.tasks.families.base.Batch`. Observations float64 [rows, 39], rewards float64 [rows]."""

    def __init__(self, name: str, goals: Sequence[Any], num: int, threads: int, starts: dict[int, Start]) -> None:
        """`goals`: upstream's task objects; `threads`: cores that step the physics; `starts`: the first states that
        other batches of the same goals have found, to be added to.
        """
        self._goals = goals
        self.num_envs = num
        self._template = environment_class(name)(reward_function_version=REWARD_VERSION)
        self._starts = starts
        model = self._template.model
        self._datas = [mujoco.MjData(model) for _ in range(num)]
        self._models = [deepcopy(model) for _ in range(min(threads, num))]
        self._pool = ThreadPoolExecutor(len(self._models)) if len(self._models) > 1 else None
        self._mocap = np.zeros((num, 3))
        self._places: list[tuple[Floats, Floats]] = [(model.body_pos, model.site_pos)] * num
        self._frame, self._before = np.zeros((2, _FRAME, num))
        self._goal_places = np.zeros((3, num))
        kind = rows_class(name)
        touches = "touching_main_object" in kind.attributes
        self._rows: Any = kind(self._datas, self._template._get_id_main_object() if touches else None)
        self._live: dict[str, list[Floats]] = {}
        self._begin(0)  # always, for it tells what is to be followed
        space = self._template.sawyer_observation_space
        self._low, self._high = space.low[:, None], space.high[:, None]

    @property
    def num_goals(self) -> int:
        return len(self._goals)

    def reset(self, rows: NDArray[np.int64], goals: NDArray[np.int64]) -> Floats:
        observations = np.empty((len(rows), 2 * _FRAME + 3))
        for index, (row, goal) in enumerate(zip(rows, goals, strict=True)):
            start = self._starts.get(int(goal)) or self._begin(int(goal))
            data = self._datas[row]
            mujoco.mj_setState(self._models[0], data, start.state, _STATE)
            self._mocap[row] = data.mocap_pos[0]
            self._places[row] = (start.body_places, start.site_places)
            self._before[:, row] = start.observation[:_FRAME]
            self._goal_places[:, row] = start.observation[-3:]
            for word, value in start.attributes.items():
                self._write(word, row, value)
            observations[index] = start.observation
        return observations

    def step(self, rows: NDArray[np.int64], actions: NDArray[np.float32]) -> Steps:
        template, view = self._template, self._rows
        moved = self._mocap[rows] + actions[rows, :3] * template.action_scale
        self._mocap[rows] = np.clip(moved, template.mocap_low, template.mocap_high)
        self._advance(rows, actions)
        view.data.step += 1
        for word, places in self._live.items():
            setattr(view, word, np.concatenate(places).reshape(self.num_envs, -1).T)
        frame = self._observe(view)
        observations = np.concatenate([frame, self._before, self._goal_places]).clip(self._low, self._high)
        self._before[:, rows] = frame[:, rows]
        with np.errstate(all="ignore"):  # both sides of a branch are computed
            reward, info = view.evaluate_state(observations, Mixed(actions.T.astype(np.float64), True))
        columns = {word: self._column(value) for word, value in info.items()}
        never, success = np.zeros(len(rows), np.bool_), columns.pop("success")[rows].astype(np.bool_)
        info = {word: column[rows] for word, column in columns.items()}
        return Steps(observations.T[rows], self._column(reward)[rows], never, never, success, info)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        self._template.close()
        self._datas.clear()
        self._models.clear()
        _give_back_memory()

    def _column(self, value: Any) -> NDArray[Any]:
        """float64 [N] from what the vectorized code returned: [N], or the same number for all."""
        column = np.empty(self.num_envs)
        column[:] = value.values if isinstance(value, Mixed) else value
        return column

    def _observe(self, view: Any) -> Floats:
        """``_get_curr_obs_combined_no_goal`` of all rows, [18, N]."""
        frame = self._frame
        frame[4:] = 0.0
        frame[:3] = view.data.body("hand").xpos
        apart = view.data.body("rightclaw").xpos - view.data.body("leftclaw").xpos
        frame[3] = np.clip(norm(apart) / 0.1, 0.0, 1.0)
        positions, quaternions = view._get_pos_objects(), view._get_quat_objects()
        for index in range(len(positions) // 3):
            start = 4 + 7 * index
            frame[start : start + 3] = positions[3 * index : 3 * index + 3]
            frame[start + 3 : start + 7] = quaternions[4 * index : 4 * index + 4]
        return frame

    def _advance(self, rows: NDArray[np.int64], actions: NDArray[np.float32]) -> None:
        for row, place, grip in zip(rows.tolist(), self._mocap[rows], actions[rows, 3].tolist(), strict=True):
            data = self._datas[row]
            data.mocap_pos[0] = place
            data.mocap_quat[0] = _POINTS_DOWN
            data.ctrl[:] = (grip, -grip)
        waiting = iter(rows.tolist())  # shared: whoever is free takes the next row
        if self._pool is None:
            self._simulate(self._models[0], waiting)
        else:
            for done in [self._pool.submit(self._simulate, model, waiting) for model in self._models]:
                done.result()

    def _simulate(self, model: Any, waiting: Iterator[int]) -> None:
        step, forward, frames = mujoco.mj_step, mujoco.mj_forward, self._template.frame_skip
        body_places, site_places, written = model.body_pos, model.site_pos, None
        for row in waiting:
            if self._places[row] is not written:
                written = self._places[row]
                body_places[...], site_places[...] = written
            step(model, self._datas[row], frames)
            forward(model, self._datas[row])

    def _begin(self, goal: int) -> Start:
        # reset(seed=) is ignored upstream: all randomness of an episode is the vector frozen in the task object
        template = self._template
        template.set_task(self._goals[goal])
        observation = template.reset()[0]
        state = np.empty(mujoco.mj_stateSize(template.model, _STATE))
        mujoco.mj_getState(template.model, template.data, state, _STATE)
        attributes = {word: vars(template)[word] for word in self._rows.attributes if word in vars(template)}
        for word, value in attributes.items():
            if isinstance(value, np.ndarray) and not value.flags.owndata and word not in self._live:
                self._follow(word, value)
        kept = {word: deepcopy(value) for word, value in attributes.items() if word not in self._live}
        model = template.model
        start = Start(state, model.body_pos.copy(), model.site_pos.copy(), observation.copy(), kept)
        self._starts[goal] = start
        return start

    def _follow(self, word: str, value: Floats) -> None:
        """Upstream kept a view of MuJoCo's memory where it meant a copy: its "initial" place moves with the body."""
        for field in ("xpos", "site_xpos", "geom_xpos"):
            source = getattr(self._template.data, field)
            if np.shares_memory(source, value):
                begin = (value.ctypes.data - source.ctypes.data) // value.itemsize
                part = slice(begin, begin + value.size)
                self._live[word] = [getattr(data, field).reshape(-1)[part] for data in self._datas]

    def _write(self, word: str, row: int, value: Any) -> None:
        """Set the attribute of one row."""
        current = vars(self._rows).get(word)
        if current is None:
            if isinstance(value, np.ndarray):
                current = np.zeros((self.num_envs, len(value))).T
            elif value is None or isinstance(value, np.floating):
                current = np.zeros(self.num_envs)
            else:
                current = value
            setattr(self._rows, word, current)
        if isinstance(current, np.ndarray):
            current[..., row] = np.nan if value is None else value
        elif current != value:
            raise RuntimeError(f"upstream's {word} differs between goals: {current} and {value}")


def _give_back_memory() -> None:
    """Blocks of many megabytes do not go back to the system by themselves: fifty evaluations would hold gigabytes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
