"""Meta-World simulated in batches: upstream's own code, once for all environments."""
