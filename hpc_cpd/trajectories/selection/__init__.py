"""Which trajectories a replay memory keeps: one file per selection; ``base`` says what one must offer."""
