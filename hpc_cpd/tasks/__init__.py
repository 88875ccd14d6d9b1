"""Tasks: named simulators, stepped in batches. Nothing here knows about learning."""

from hpc_cpd.tasks.families.base import Batch, Simulator, Step, Steps, TaskFamily, TaskSpec

__all__ = ["Batch", "Simulator", "Step", "Steps", "TaskFamily", "TaskSpec"]
