"""Plumbing that no chapter is about: configuration, devices, processes, checkpoints, metrics, plots."""
