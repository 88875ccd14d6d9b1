"""Teachers: single-task experts, and the trajectories they leave behind."""
