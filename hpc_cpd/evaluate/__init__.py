"""How good is a policy: seeded, batched rollouts, and the numbers of continual learning."""
