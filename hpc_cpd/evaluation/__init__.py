"""Success of policies: rollouts, episode records, continual-learning metrics."""
