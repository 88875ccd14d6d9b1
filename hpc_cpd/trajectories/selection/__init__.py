"""Which trajectories a replay memory keeps: one file per selection."""
