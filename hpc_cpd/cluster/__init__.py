"""Where jobs run: ranks on this machine, or Slurm through submitit. Knows no models and no tasks."""
