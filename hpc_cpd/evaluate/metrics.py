"""Kept for those who import it from here: the metrics moved to `hpc_cpd.evaluation.metrics`."""

from hpc_cpd.evaluation.metrics import *  # noqa: F403
from hpc_cpd.evaluation.metrics import continual_metrics as continual_metrics
