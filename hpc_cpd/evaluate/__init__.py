"""The former name of `hpc_cpd.evaluation`."""
