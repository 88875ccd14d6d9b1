"""Continual-learning methods: one file each. What a method may decide is in `base`."""
