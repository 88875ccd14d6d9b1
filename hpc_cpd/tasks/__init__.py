"""Tasks: named simulators, stepped in batches. Nothing here knows about learning."""
