"""Demonstrations of the benchmark's scripted policies."""

from hpc_cpd.distributed.mpi import Communicator
from hpc_cpd.tasks.registry import describe
from hpc_cpd.teachers.starts._cloning import record_demonstrations
from hpc_cpd.teachers.starts.demonstrations import DemonstrationsSettings


def test_the_script_of_a_task_plays_a_part_of_its_goals() -> None:
    settings = DemonstrationsSettings(episodes=3)
    task = describe("metaworld/drawer-close-v3@1of2")
    demonstrations = record_demonstrations(task, settings, seed=0, communicator=Communicator())
    assert len(demonstrations[0]) >= 3
    assert demonstrations[0].shape[1:] == task.observation_space.shape
