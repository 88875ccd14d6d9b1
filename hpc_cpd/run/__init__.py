"""A run on disk: its folders, atomic publishing, locks, metrics."""
